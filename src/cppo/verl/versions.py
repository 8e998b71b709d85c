"""Versions that work together inside verl. Imports nothing: only looks up what is installed."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cppo.errors import UserError

SUPPORTED_VERL = ">=0.9,<0.10"
"""0.9 is the first version with a trainer registry for other packages; 0.10 is untested."""
OF_TRL = ("huggingface_hub", "tokenizers", "torch", "torchvision", "transformers", "trl")
"""Requirements of TRL's part of cppo with versions that verl excludes, named as in pyproject.toml."""
OF_VERL_TRAINER = ("TransferQueue>=0.1.10", "qwen-vl-utils")
"""Packages that verl's trainer imports, but pip installs only with an extra of verl."""
REMEDY = "in cppo's folder pip install -r constraints-verl.txt, then pip install --no-deps -e . (docs/scale/verl.md)"


def check_versions() -> None:
    """Refuse an environment in which cppo cannot run inside verl.

    Raises:
        UserError: verl or a package that verl or cppo needs is missing or has a wrong version; says what to install.
    """
    verl = installed("verl")
    if verl is None:
        raise UserError(f"verl is not installed here; it needs an environment of its own: {REMEDY}")
    if not SpecifierSet(SUPPORTED_VERL).contains(verl, prereleases=True):
        raise UserError(f"cppo runs inside verl{SUPPORTED_VERL}, but verl {verl} is installed: {REMEDY}")
    for owner, needed in _requirements():
        found = installed(needed.name)
        if found is None:
            raise UserError(f"{owner} needs {needed.name}, which is not installed: pip install '{_plain(needed)}'")
        if not needed.specifier.contains(found, prereleases=True):
            raise UserError(f"{owner} needs {_plain(needed)}, but {needed.name} {found} is installed: {REMEDY}")


def installed(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """The packages needed here, and what needs them."""
    verl = [*(requires("verl") or ()), *OF_VERL_TRAINER]
    own = requires("cppo") if installed("cppo") else None  # without metadata it runs from its source folder
    for owner, lines in ((f"verl {installed('verl')}", verl), ("cppo", own or ())):
        for needed in map(Requirement, lines):
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            if owner != "cppo" or needed.name not in OF_TRL:
                yield owner, needed


def _plain(needed: Requirement) -> str:
    return f"{needed.name}{needed.specifier}"
