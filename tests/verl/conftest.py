"""These tests run where verl is installed; there TRL is not."""

from importlib import metadata

try:
    metadata.version("verl")
except metadata.PackageNotFoundError:
    collect_ignore_glob = ["*"]
