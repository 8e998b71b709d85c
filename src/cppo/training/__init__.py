"""Training: configuration and trainer on top of TRL's GRPO. Importing this checks the version of TRL, nothing else."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from cppo import __version__

SUPPORTED_TRL = ">=1.16,<1.17"
VERSIONS_OF = ("torch", "transformers", "trl")
"""The libraries that a run's figures depend on."""


def check_trl_version(installed: str) -> None:
    """Refuse a TRL whose internals this package was not written against.

    Args:
        installed: the version of TRL, for example "1.16.0".

    Raises:
        ImportError: the version is outside `SUPPORTED_TRL`; the message says what to install.
    """
    if not SpecifierSet(SUPPORTED_TRL).contains(installed, prereleases=True):
        raise ImportError(
            f"cppo works with trl{SUPPORTED_TRL}, but trl {installed} is installed: pip install 'trl{SUPPORTED_TRL}'",
            name="trl",
        )


def package_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that a run's figures depend on."""
    return {"cppo": __version__, **{package: version(package) for package in VERSIONS_OF}}


with suppress(PackageNotFoundError):  # without TRL, whatever needs it says so
    check_trl_version(version("trl"))
