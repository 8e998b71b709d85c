"""Training: configuration and trainer on top of TRL's GRPO. The import checks two versions and loads nothing else."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from cppo import __version__

SUPPORTED_TRL = ">=1.16,<1.17"
OLDEST_TRANSFORMERS = "5.17"
"""Earlier versions, such as verl's, lack parts that the trainer needs."""
VERSIONS_OF = ("torch", "transformers", "trl")
"""The libraries that influence a run's figures."""


def check_versions(trl: str, transformers: str) -> None:
    """Refuse library versions that this package does not support.

    Args:
        trl, transformers: the installed versions, e.g. "1.16.0".

    Raises:
        ImportError: a version is outside its range; the message says what to install.
    """
    for name, found, supported in (
        ("trl", trl, SUPPORTED_TRL),
        ("transformers", transformers, f">={OLDEST_TRANSFORMERS}"),
    ):
        if not SpecifierSet(supported).contains(found, prereleases=True):
            raise ImportError(
                f"cppo's trainer needs {name}{supported}, but {name} {found} is installed: pip install "
                f"'{name}{supported}'",
                name=name,
            )


def package_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that influence a run's figures."""
    return {"cppo": __version__, **{package: version(package) for package in VERSIONS_OF}}


with suppress(PackageNotFoundError):  # code that needs a missing package reports it
    check_versions(version("trl"), version("transformers"))
