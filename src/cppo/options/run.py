"""Options of a run that no trainer configuration has: model, data, evaluation, earlier files."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from cppo.errors import UserError
from cppo.fields import option

ADAPTER_OPTIONS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
)
"""Options that need `use_peft`."""
RATED_OPTIONS = ("data_order", "data_confidence_band", "data_accuracy_band")
"""Options that need `data_ratings`."""


@dataclass(frozen=True)
class RunOptions:
    """Options that `cppo train` and `cppo sft` share."""

    data: str | list[str] = field(
        metadata={
            "help": (
                "Training data: tasks:NAME[?option=value&...], hub:ORG/NAME[:SPLIT][?config=NAME], a .jsonl or "
                ".parquet file, a folder saved by `datasets`, or a list of these."
            )
        }
    )
    model: str = option("micro", "The model: `micro` (part of this package), a folder, or a Hugging Face name.")
    eval_data: str | list[str] | None = option(
        None, "Held-out data, written like `data`. A task with splits uses its split `test`."
    )
    columns: dict[str, str | None] | str | None = option(
        None,
        "Your column names, e.g. {prompt: question, images: image, answer: solution}, or a known layout: geometry3k, "
        "mmk12, papo, trl, verl, virl39k.",
    )
    system_prompt: str | None = option(None, "System message for every prompt that has none.")
    prompt_suffix: str | None = option(
        None, "Text added after a space to the end of the last user message of every prompt, e.g. how to answer."
    )
    max_bad_fraction: Annotated[float, "[0, 1]"] = option(
        0.01, "Largest share of unusable rows in the data; up to it they are skipped, above it the run stops."
    )
    min_pixels: Annotated[int | None, "[1, 100000000]"] = option(
        None, "Images with fewer pixels are scaled up to this many, before views and the model's own processor."
    )
    max_pixels: Annotated[int | None, "[784, 100000000]"] = option(
        None,
        "Images with more pixels are scaled down to this many (at least 28 x 28): fewer image tokens, less memory.",
    )
    min_side: Annotated[int | None, "[1, 10000]"] = option(
        None, "Images whose shorter side has fewer pixels are scaled up to this side (published: 28)."
    )
    images_per_row: Annotated[int | None, "[0, inf)"] = option(
        None, "Rows with another number of images are counted and skipped (published: 1)."
    )
    max_prompt_tokens: Annotated[int | None, "[1, inf)"] = option(
        None,
        "Rows with longer prompts, image tokens included, are reported and skipped. Default: no limit; no prompt is "
        "truncated.",
    )
    resume_from_checkpoint: bool | str | None = option(
        None,
        "Continue from a checkpoint folder. `true`: the newest complete checkpoint in output_dir, an error without "
        "one. `auto`: the same, or a new run without one.",
    )
    overwrite: bool = option(False, "Replace the files of an earlier run in output_dir.")
    quiet: bool = option(False, "Print plain lines on a terminal too: no progress bar, no table of samples.")
    use_peft: bool = option(
        False, "Train a LoRA adapter and keep the model's own weights fixed (`cppo export` merges them)."
    )
    lora_r: Annotated[int, "[1, inf)"] = option(16, "LoRA: rank of the update.")
    lora_alpha: Annotated[int, "[1, inf)"] = option(32, "LoRA: scale of the update is lora_alpha / lora_r.")
    lora_dropout: Annotated[float, "[0, 1)"] = option(
        0.0,
        "LoRA: dropout before the update. Above 0, dropout adds a random difference between an image and its views.",
    )
    lora_target_modules: list[str] | None = option(
        None,
        "LoRA: module names, matched as in PEFT, also in the vision tower; `all-linear`: every linear layer except "
        "the head. Default: the linear layers of the language model.",
    )
    load_in_4bit: bool = option(False, "QLoRA: load the model in 4 bit (needs bitsandbytes, a CUDA GPU and use_peft).")
    load_in_8bit: bool = option(False, "QLoRA: load the model in 8 bit, with the same needs.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "QLoRA: 4-bit number format.")
    use_bnb_nested_quant: bool = option(False, "QLoRA: quantize the scales of the 4-bit numbers too.")

    def __post_init__(self) -> None:
        if not self.use_peft:
            for option in fields(self):
                value = getattr(self, option.name)
                if option.name in ADAPTER_OPTIONS and value != option.default:
                    raise UserError(f"{option.name} = {value!r} needs use_peft = true")
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit and load_in_8bit are both true: choose one")


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Options of `cppo train`."""

    data_ratings: str | None = option(
        None,
        "File of ratings of the training rows, written by `cppo data rate`. The next three options need it, and "
        "data_stages sorts the rows by it.",
    )
    data_order: Literal["semantic_entropy", "discrete_semantic_entropy"] = option(
        "semantic_entropy",
        "Measure by which data_stages sorts rated rows, from low to high: the semantic entropy with answers weighted "
        "by their probabilities (SENT), or by their counts.",
    )
    data_confidence_band: list[float] | None = option(
        None,
        "[low, high]: rows whose rated confidence (share of the most frequent answer) lies outside are counted and "
        "skipped (VisPlay: 0.25 to 0.75).",
    )
    data_accuracy_band: list[float] | None = option(
        None, "[low, high]: the same for the rated share of right answers (CodeV: 0 to 0.9)."
    )
    eval_limit: Annotated[int | None, "[1, inf)"] = option(
        256, "Number of eval_data items that evaluations during training use."
    )
    final_eval_samples: Annotated[int, "[0, inf)"] = option(
        0,
        "Number of eval_data items answered greedily before and after training, and after it with a blank image "
        "(0 = off).",
    )
    probe_steps: Annotated[int | None, "[0, inf)"] = option(
        None,
        "Steps between probes: held-out accuracy and perception tokens for the report, on the first probe_items of "
        "eval_data (default: eight probes per run, none with DeepSpeed or FSDP1; 0 = off).",
    )
    probe_items: Annotated[int, "[1, inf)"] = option(64, "Number of eval_data items answered greedily at each probe.")
    rewards: list[str] | None = option(
        None,
        "Reward functions: accuracy, format, description, facts, length, repetition, word_repetition, or your own as "
        "module:function or file.py:function, with options after `?`; `method` adds the method's. reward_weights "
        "weighs them (default 1 each). Default: the method's rewards, or 0.9 accuracy + 0.1 format.",
    )
    dry_run: bool = option(
        False,
        "Check options, data and model, train three batches in a temporary folder, print the plan (steps, tokens, "
        "memory, time), and save nothing.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data_confidence_band", "data_accuracy_band"):
            band = getattr(self, name)
            if band is not None and not (len(band) == 2 and 0 <= band[0] <= band[1] <= 1):
                raise UserError(f"{name} = {band}: give two fractions, [low, high], 0 <= low <= high <= 1")
        if self.data_ratings is None:
            for declared in fields(self):
                value = getattr(self, declared.name)
                if declared.name in RATED_OPTIONS and value != declared.default:
                    raise UserError(
                        f"{declared.name} = {value!r} needs data_ratings: give the file that `cppo data rate` writes"
                    )
