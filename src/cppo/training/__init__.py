"""Training: configuration and trainer on top of TRL's GRPO. Importing this checks the version of TRL, nothing else."""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

SUPPORTED_TRL = ">=1.16,<1.17"


def check_trl_version(installed: str) -> None:
    """Refuse a TRL whose internals this package was not written against.

    Args:
        installed: the version of TRL, for example "1.16.0".

    Raises:
        ImportError: the version is outside `SUPPORTED_TRL`; the message says what to install.
    """
    if not SpecifierSet(SUPPORTED_TRL).contains(installed, prereleases=True):
        raise ImportError(
            f"cppo works with trl{SUPPORTED_TRL}, but trl {installed} is installed: pip install 'trl{SUPPORTED_TRL}'"
        )


check_trl_version(version("trl"))
