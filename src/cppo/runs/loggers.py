"""The loggers of `report_to`: are they installed (before torch), do they work (before a model is loaded)."""

import importlib.util
from typing import TYPE_CHECKING

from cppo.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import TrainingArguments

LOGGERS = ("tensorboard", "trackio", "wandb")
"""The loggers that are an extra of this package. transformers knows others."""


def check_installed(report_to: str | list[str] | None) -> None:
    """Check that the loggers of `report_to` are installed, if they are among `LOGGERS`. Raises UserError."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        # PyTorch's writer takes either package.
        modules = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if name in LOGGERS and not any(map(importlib.util.find_spec, modules)):
            raise UserError(f"report_to: {name} is not installed; pip install 'cppo[{name}]'")


def check_loggers(args: "TrainingArguments") -> None:
    """Refuse an unknown or missing logger, and W&B without a key unless it is offline.

    Raises UserError with the logger's own reason.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
        if "wandb" in (args.report_to or ()) and args.process_index == 0:
            _log_in_to_wandb()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"report_to: {one_line(error)}") from error


def _log_in_to_wandb() -> None:
    """Log in as W&B does at the first step, but before the run evaluates anything; a terminal is asked for a key."""
    import wandb

    try:
        wandb.login()
    except wandb.Error as error:
        raise ValueError(f"{error} Or set WANDB_MODE=offline: then nothing is sent.") from error
