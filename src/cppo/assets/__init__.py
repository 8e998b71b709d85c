"""The packaged model, the names of packaged models, and the base models of adapters."""

from pathlib import Path

from cppo.errors import UserError
from cppo.parsing import parse_json

MICRO_DIR = Path(__file__).parent / "micro"
ADAPTER_CONFIG = "adapter_config.json"


def resolve_model(name: str) -> str:
    """The folder of a packaged model; any other name (folder, hub id) is returned unchanged."""
    return str(MICRO_DIR) if name == "micro" else name


def adapter_base(name: str) -> str | None:
    """The base model of the adapter in the folder `name`; None if it has no adapter.

    A folder that also holds a complete model counts as that model. A relative path counts from the working directory,
    else from the adapter's folder or one above it, as when training started there.

    Raises:
        UserError: the adapter does not name its base, or names itself or another adapter.
    """
    folder = Path(resolve_model(name))
    file = folder / ADAPTER_CONFIG
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    try:
        base = parse_json(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"model: {file} is not the configuration of an adapter") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"model: {file} names no model: set its `base_model_name_or_path`")
    base = _found_from(folder, base)
    if (Path(base) / ADAPTER_CONFIG).is_file() and not (Path(base) / "config.json").is_file():
        raise UserError(f"model: {file} names {base}, which is an adapter too: name a complete model instead")
    return base


def _found_from(folder: Path, name: str) -> str:
    if Path(name).is_absolute() or Path(name).exists():
        return name
    above = (place / name for place in (folder, *folder.resolve().parents))
    return next((str(path) for path in above if (path / "config.json").is_file()), name)
