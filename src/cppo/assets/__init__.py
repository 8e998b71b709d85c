"""The model that comes with the package, and the names of packaged models."""

from pathlib import Path

MICRO_DIR = Path(__file__).parent / "micro"


def resolve_model(name: str) -> str:
    """The folder behind a packaged model's name; any other name (folder, hub id) is returned unchanged."""
    return str(MICRO_DIR) if name == "micro" else name
