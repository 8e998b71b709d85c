"""CPPO: reinforcement learning for vision-language models, with a loss for use of the image (arXiv 2601.00501)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cppo.runs.report_callback import ReportCallback
    from cppo.training.config import CPPOConfig
    from cppo.training.trainer import CPPOTrainer

__version__ = "0.1.0"
__all__ = ["CPPOConfig", "CPPOTrainer", "ReportCallback", "__version__"]


def __getattr__(name: str) -> Any:
    # torch and TRL take seconds to import; the command line must report a mistyped argument before that.
    if name == "CPPOConfig":
        from cppo.training.config import CPPOConfig

        return CPPOConfig
    if name == "CPPOTrainer":
        from cppo.training.trainer import CPPOTrainer

        return CPPOTrainer
    if name == "ReportCallback":
        from cppo.runs.report_callback import ReportCallback

        return ReportCallback
    raise AttributeError(f"module 'cppo' has no attribute {name!r}")
