"""LoRA and QLoRA: from a run's options to arguments of PEFT and bitsandbytes."""

import re
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, TrainingArguments

from cppo.assets import resolve_model
from cppo.errors import UserError
from cppo.options import RunOptions

ALL_LINEAR = "all-linear"


def adapter_arguments(options: RunOptions, args: TrainingArguments) -> dict[str, Any]:
    """Arguments of TRL's trainers for an adapter: `peft_config` and, for QLoRA, `quantization_config`; {} without one.

    args: the trainer's; its precision is the compute precision. Raises UserError for quantized weights without a CUDA
    GPU, or a model with unknown parts.
    """
    if not options.use_peft:
        return {}
    arguments: dict[str, Any] = {"peft_config": lora_config(options)}
    if options.load_in_4bit or options.load_in_8bit:
        compute_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        arguments["quantization_config"] = quantization(options, compute_dtype)
    return arguments


def lora_config(options: RunOptions) -> LoraConfig:
    """The adapter; by default on the linear layers of the language model, not on vision tower, projector and head."""
    targets: Any = options.lora_target_modules
    if targets is None:
        targets = language_model_layers(options.model)
    elif targets == [ALL_LINEAR]:
        targets = ALL_LINEAR
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def quantization(options: RunOptions, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The quantization of the model's weights by bitsandbytes. Raises UserError without a CUDA GPU."""
    name = "load_in_4bit" if options.load_in_4bit else "load_in_8bit"
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs a CUDA GPU; train the adapter without it here")
    return BitsAndBytesConfig(
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def language_model_layers(model: str) -> str:
    """A PEFT pattern for the linear layers of a vision-language model's language model.

    Names alone would also match in the vision tower, since its layers often have the same names.
    """
    config = AutoConfig.from_pretrained(resolve_model(model), trust_remote_code=False)
    with init_empty_weights():
        empty = AutoModelForImageTextToText.from_config(config)
    decoder = empty.get_decoder()
    (prefix,) = [name for name, module in empty.named_modules() if module is decoder]
    linear = {name.split(".")[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return rf"{re.escape(prefix)}\.(?:.*\.)?(?:{'|'.join(sorted(linear))})"


def name_base(model: Any, name: str) -> None:
    """Set the base of a PEFT model's adapters to `name` instead of a local folder."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
