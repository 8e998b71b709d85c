"""The options of a run that belong to no trainer configuration: model, data, evaluation, what to do with old files."""

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
"""Options that say nothing without `use_peft`."""


@dataclass(frozen=True)
class RunOptions:
    """Options that `cppo train` and `cppo sft` share."""

    data: str | list[str] = field(
        metadata={
            "help": "Training data: tasks:NAME[?option=value&...], hub:ORG/NAME[:SPLIT][?config=NAME], a .jsonl or "
            ".parquet file, a folder that `datasets` saved, or a list of them."
        }
    )
    model: str = option("micro", "The model: `micro` (it comes with the package), a folder, or a Hugging Face name.")
    eval_data: str | list[str] | None = option(
        None, "Held-out data, written like `data`; the split `test` where a task has splits."
    )
    columns: dict[str, str | None] | str | None = option(
        None,
        "Your column names, e.g. {prompt: question, images: image, answer: solution}, or a known layout: geometry3k, "
        "mmk12, papo, trl, verl, virl39k.",
    )
    system_prompt: str | None = option(None, "A system message put before every prompt that brings none.")
    prompt_suffix: str | None = option(
        None, "Text that ends the user's last message of every prompt, after a space: how to answer, for instance."
    )
    max_bad_fraction: Annotated[float, "[0, 1]"] = option(
        0.01, "Rows that cannot be used are skipped up to this share of the data."
    )
    min_pixels: Annotated[int | None, "[1, 100000000]"] = option(
        None, "Images of fewer pixels are scaled up to so many, before views and the model's own processor."
    )
    max_pixels: Annotated[int | None, "[784, 100000000]"] = option(
        None, "Images of more pixels are scaled down to so many, at least 28 x 28: fewer image tokens, less memory."
    )
    min_side: Annotated[int | None, "[1, 10000]"] = option(
        None, "Images whose shorter side is smaller are scaled up until it has so many pixels (published: 28)."
    )
    images_per_row: Annotated[int | None, "[0, inf)"] = option(
        None, "Rows with another number of images are counted and left out of training (published: 1)."
    )
    max_prompt_tokens: Annotated[int | None, "[1, inf)"] = option(
        None,
        "Rows whose prompt is longer, image tokens included, are named and left out of training. Without it none is "
        "left out, nor shortened.",
    )
    resume_from_checkpoint: bool | str | None = option(
        None,
        "Continue from a checkpoint folder. `true` takes the newest whole one of output_dir and fails without one; "
        "`auto` takes it or begins.",
    )
    overwrite: bool = option(False, "Replace the files of an earlier run in output_dir.")
    quiet: bool = option(False, "Plain lines on a terminal too: no progress bar, no table of samples.")
    use_peft: bool = option(
        False, "Train a LoRA adapter and leave the model's own weights as they are (`cppo export` merges)."
    )
    lora_r: Annotated[int, "[1, inf)"] = option(16, "LoRA: rank of the update.")
    lora_alpha: Annotated[int, "[1, inf)"] = option(32, "LoRA: the update is scaled by lora_alpha / lora_r.")
    lora_dropout: Annotated[float, "[0, 1)"] = option(
        0.0, "LoRA: dropout before the update. Above 0 an image and its views differ by chance too."
    )
    lora_target_modules: list[str] | None = option(
        None,
        "LoRA: names of the modules, matched as PEFT does, in the vision tower too; `all-linear` for every linear "
        "layer but the head. Without it the linear layers of the language model.",
    )
    load_in_4bit: bool = option(False, "QLoRA: hold the model in 4 bit (needs bitsandbytes, a CUDA GPU, use_peft).")
    load_in_8bit: bool = option(False, "The same in 8 bit.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "Kind of 4-bit number.")
    use_bnb_nested_quant: bool = option(False, "Whether the scales of the 4-bit numbers are quantized too.")

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

    eval_limit: Annotated[int | None, "[1, inf)"] = option(
        256, "Items of eval_data used by evaluations DURING training."
    )
    final_eval_samples: Annotated[int, "[0, inf)"] = option(
        0, "Items of eval_data answered greedily before and after training, and after it with a blank image (0 = off)."
    )
    probe_steps: Annotated[int | None, "[0, inf)"] = option(
        None,
        "Every so many steps the report's held-out accuracy and perception tokens are taken on the first probe_items "
        "of eval_data (default: eight times per run, but not with DeepSpeed or FSDP1; 0 = off).",
    )
    probe_items: Annotated[int, "[1, inf)"] = option(64, "Items of eval_data answered greedily at each probe.")
    rewards: list[str] | None = option(
        None,
        "Reward functions, weighted by reward_weights (default 1 each): accuracy, format, description, facts, "
        "length, repetition, word_repetition, or your own as module:function or file.py:function, options after `?`; "
        "`method` for those of the method. Without it the method's, or accuracy and format, weighted 0.9 and 0.1.",
    )
    dry_run: bool = option(
        False,
        "Check options, data and model, train three batches in a temporary folder, print the plan with steps, tokens, "
        "memory and time, and write nothing.",
    )
