"""The model that comes with the package, the names of packaged models, and the models behind adapters."""

import json
from pathlib import Path

from cppo.errors import UserError

MICRO_DIR = Path(__file__).parent / "micro"
ADAPTER_CONFIG = "adapter_config.json"


def resolve_model(name: str) -> str:
    """The folder behind a packaged model's name; any other name (folder, hub id) is returned unchanged."""
    return str(MICRO_DIR) if name == "micro" else name


def adapter_base(name: str) -> str | None:
    """The name of the model that the adapter in the folder `name` belongs to; None where there is no adapter.

    A folder that holds a whole model as well is that model. Raises UserError where the adapter does not say.
    """
    folder = Path(resolve_model(name))
    file = folder / ADAPTER_CONFIG
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"model: {file} is not the configuration of an adapter") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"model: {file} names no model: set its `base_model_name_or_path`")
    return base
