"""Which versions go together inside verl. Nothing is imported: only what is installed is looked up."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cppo.errors import UserError

SUPPORTED_VERL = ">=0.9,<0.10"
"""0.9 is the first whose trainer can be registered from outside; what 0.10 does is not known."""
OF_TRL = ("huggingface_hub", "tokenizers", "torch", "torchvision", "transformers", "trl")
"""What TRL's part of cppo asks for in versions that verl does not take, as pyproject.toml spells their names."""
OF_VERL_TRAINER = ("TransferQueue>=0.1.10", "qwen-vl-utils")
"""What verl's trainer imports, and pip installs with an extra of verl alone."""
REMEDY = "pip install -r constraints-verl.txt, then pip install --no-deps cppo (docs/scale/verl.md)"


def check_versions() -> None:
    """Refuse an environment in which cppo cannot run inside verl.

    Raises:
        UserError: verl is missing or of another version, or a package is that verl or cppo needs, and what to install.
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
    """What must be installed here, and what for."""
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
