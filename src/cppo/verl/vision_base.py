"""The rotary base of a model's vision tower, which the transformers that verl 0.9 takes does not read."""

from pathlib import Path

from packaging.version import Version

from cppo.errors import UserError
from cppo.parsing import parse_json
from cppo.runs.checks import check_whole_model
from cppo.verl.versions import installed

READS_IT = "5.11"
"""The first version of transformers that reads the base from a model's configuration."""
WITHOUT = 10000.0
"""The base that earlier versions use, which is that of Qwen's published models."""


def lost_base(model: str) -> str | None:
    """How earlier transformers changes the model in a folder; None where nothing changes, or no folder is there.

    Raises UserError where the folder is not a complete model.
    """
    if not Path(model).exists():
        return None
    check_whole_model(model)
    found = parse_json((Path(model) / "config.json").read_text(encoding="utf-8"))
    for name in ("vision_config", "rope_parameters", "rope_theta"):
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, int | float) or found == WITHOUT:
        return None
    return (
        f"transformers before {READS_IT} ignores its vision tower's rotary base {found:g} and uses {WITHOUT:g}, which "
        "makes another model of it"
    )


def check_base(option: str, model: str) -> None:
    """Raise UserError where the transformers here would make another model of the one in this folder."""
    version, loss = installed("transformers"), lost_base(model)
    if loss is not None and version is not None and Version(version) < Version(READS_IT):
        raise UserError(
            f"{option} = {model}: {loss}; {version} is installed, since verl {installed('verl')} takes no later one: "
            "train this model with `cppo train`"
        )
