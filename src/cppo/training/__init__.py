"""Training: configuration and trainer on top of TRL's GRPO. Importing this checks the version of TRL, nothing else."""

from importlib.metadata import version

SUPPORTED_TRL = ("1.16", "1.17")
"""First supported version of TRL, and the first that is not."""


def check_trl_version(installed: str) -> None:
    """Refuse a TRL whose internals this package was not written against.

    Args:
        installed: the version of TRL, for example "1.16.0".

    Raises:
        ImportError: the version is outside `SUPPORTED_TRL`; the message says what to install.
    """
    low, high = SUPPORTED_TRL
    release = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if not tuple(map(int, low.split("."))) <= release < tuple(map(int, high.split("."))):
        raise ImportError(
            f"cppo works with trl>={low},<{high}, but trl {installed} is installed: pip install 'trl>={low},<{high}'"
        )


check_trl_version(version("trl"))
