"""Training: configuration and trainer on top of TRL's GRPO. Importing this checks two versions, and loads nothing."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from cppo import __version__

SUPPORTED_TRL = ">=1.16,<1.17"
OLDEST_TRANSFORMERS = "5.17"
"""An earlier one, such as verl takes, lacks what the trainer leans on."""
VERSIONS_OF = ("torch", "transformers", "trl")
"""The libraries that a run's figures depend on."""


def check_versions(trl: str, transformers: str) -> None:
    """Refuse libraries whose internals this package was not written against.

    Args:
        trl, transformers: the versions installed, for example "1.16.0".

    Raises:
        ImportError: one is outside its range; the message says what to install.
    """
    for name, found, supported in (
        ("trl", trl, SUPPORTED_TRL),
        ("transformers", transformers, f">={OLDEST_TRANSFORMERS}"),
    ):
        if not SpecifierSet(supported).contains(found, prereleases=True):
            raise ImportError(
                f"cppo's trainer works with {name}{supported}, but {name} {found} is installed: "
                f"pip install '{name}{supported}'",
                name=name,
            )


def package_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that a run's figures depend on."""
    return {"cppo": __version__, **{package: version(package) for package in VERSIONS_OF}}


with suppress(PackageNotFoundError):  # without one, whatever needs it says so
    check_versions(version("trl"), version("transformers"))
