"""The options of a run that belong to no trainer configuration: model, data, evaluation, what to do with old files."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunOptions:
    """Options that `cppo train` and `cppo sft` share."""

    data: str | list[str] = field(
        metadata={
            "help": "Training data: tasks:NAME[?option=value&...], hub:ORG/NAME[:SPLIT], a .jsonl or .parquet file, a "
            "folder that `datasets` saved, or a list of them."
        }
    )
    model: str = field(
        default="micro",
        metadata={"help": "The model: `micro` (it comes with the package), a folder, or a Hugging Face name."},
    )
    eval_data: str | list[str] | None = field(
        default=None, metadata={"help": "Held-out data, written like `data`; the split `test` where a task has splits."}
    )
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Your column names, e.g. {prompt: question, images: image, answer: solution}, or a known layout: "
            "geometry3k, trl, verl, virl39k."
        },
    )
    resume_from_checkpoint: bool | str | None = field(
        default=None,
        metadata={"help": "Continue from a checkpoint folder, or with `true` from the latest one of output_dir."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the files of an earlier run in output_dir."})


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Options of `cppo train`."""

    system_prompt: str | None = field(
        default=None, metadata={"help": "A system message put before every prompt that brings none."}
    )
    max_bad_fraction: float = field(
        default=0.01,
        metadata={"help": "Rows that cannot be used are skipped up to this share of the data.", "range": "[0, 1]"},
    )
    eval_limit: int | None = field(
        default=256,
        metadata={"help": "Items of eval_data used by evaluations DURING training.", "range": "[1, inf)"},
    )
    final_eval_samples: int = field(
        default=0,
        metadata={
            "help": "Items of eval_data answered greedily before and after training, and after it with a blank image "
            "(0 = off).",
            "range": "[0, inf)",
        },
    )
