"""The loggers of `report_to`, asked before a model is loaded whether they will work."""

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from cppo.errors import UserError, one_line


def check_loggers(args: TrainingArguments) -> None:
    """Refuse a logger that is not known or not installed, and W&B without a key unless it is offline. Raises UserError
    with the logger's own reason.
    """
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
        if "wandb" in (args.report_to or ()) and args.process_index == 0:
            _log_in_to_wandb()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"report_to: {one_line(error)}") from error


def _log_in_to_wandb() -> None:
    """What W&B does at the first step, before the run has evaluated anything; it asks for a key on a terminal."""
    import wandb

    try:
        wandb.login()
    except wandb.Error as error:
        raise ValueError(f"{error} Or set WANDB_MODE=offline, and nothing is sent.") from error
