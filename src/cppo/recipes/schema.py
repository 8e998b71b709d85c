"""Which options each training command takes: the run's own, those of CPPO, and those inherited from TRL."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cppo.errors import UserError, did_you_mean
from cppo.methods import METHODS
from cppo.recipes.options import RunOptions, TrainOptions
from cppo.recipes.static_fields import OptionField, dataclass_fields
from cppo.recipes.values import check_value

_TRAINING_ARGUMENTS = (("transformers.training_args", "TrainingArguments"), ("trl.trainer.base_config", "_BaseConfig"))
_RUN_OPTIONS = ("cppo.recipes.options", "RunOptions")

# The inherited annotations say `str` and `float` where only some values work. Without this they would be refused after
# torch is imported, or in the first step.
_CHOICES: dict[str, tuple[str, ...]] = {
    "eval_strategy": ("no", "steps", "epoch"),
    "logging_strategy": ("no", "steps", "epoch"),
    "save_strategy": ("no", "steps", "epoch", "best"),
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
_RANGES: dict[str, str] = {
    "max_steps": "[-1, inf)",
    "learning_rate": "[0, inf)",
    "num_train_epochs": "(0, inf)",
    "per_device_train_batch_size": "[1, inf)",
    "per_device_eval_batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "num_generations": "[2, inf)",
    "num_iterations": "[1, inf)",
    "steps_per_generation": "[1, inf)",
    "max_completion_length": "[1, inf)",
    "temperature": "(0, inf)",
    "top_p": "(0, 1]",
    "top_k": "[0, inf)",
    "epsilon": "(0, inf)",
    "beta": "[0, inf)",
    "max_grad_norm": "[0, inf)",
    "weight_decay": "[0, inf)",
    "warmup_steps": "[0, inf)",
    "logging_steps": "(0, inf)",
    "save_steps": "(0, inf)",
    "eval_steps": "(0, inf)",
    "dataloader_num_workers": "[0, inf)",
}


_NAMED_OTHERWISE = {
    "model_name_or_path": "`model`",
    "dataset_name": "`data`, with hub:ORG/NAME or a file",
    "dataset_train_split": "`data`, with hub:ORG/NAME:SPLIT",
    "dataset_test_split": "`eval_data`, with hub:ORG/NAME:SPLIT",
    "dtype": "`model_init_kwargs`, with {dtype: bfloat16}",
    "torch_dtype": "`model_init_kwargs`, with {dtype: bfloat16}",
    "attn_implementation": "`model_init_kwargs`, with {attn_implementation: NAME}",
    "trust_remote_code": "`model_init_kwargs`, with {trust_remote_code: true}",
    "max_prompt_length": "`max_prompt_tokens`",
    "warmup_ratio": "`warmup_steps`, which may be a fraction below 1",
    "reward_funcs": "`rewards`",
    "reward_model_name_or_path": "`rewards`, with file.py:function",
}
"""What TRL's scripts and earlier versions call what is another option here."""


@dataclass(frozen=True)
class Schema:
    """The options of one command: `run` ones (of `options_class`), `own` configuration fields, `inherited` ones."""

    command: str
    options_class: type[Any]
    run: Mapping[str, OptionField]
    own: Mapping[str, OptionField]
    inherited: Mapping[str, OptionField]

    @property
    def fields(self) -> dict[str, OptionField]:
        """Every option by name."""
        return {**self.inherited, **self.own, **self.run}

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of every option of CPPO's own."""
        return {name: field.default for name, field in self.own.items()}

    @property
    def named_otherwise(self) -> Mapping[str, str]:
        """Names that users of TRL may try, and what to write."""
        return _NAMED_OTHERWISE if self.inherited else {}

    def unknown(self, name: str, *, where: str) -> UserError:
        """The error for an option that does not exist, with what takes its place or the nearest existing name."""
        near = did_you_mean(name, self.fields)
        if name in self.named_otherwise:
            hint = f"; here it is {self.named_otherwise[name]}"
        elif near:
            hint = f"; {near}"
        else:
            hint = f" (see `cppo {self.command} {'--help-all' if self.inherited else '--help'}`)"
        return UserError(f"{where}: unknown option `{name}`{hint}")

    def check(self, values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """`values`, each in its option's type. Raises UserError for an unknown name or a value that does not fit."""
        checked = {}
        for name, value in values.items():
            if not isinstance(name, str):
                raise UserError(f"{where}: {name!r} is no option's name: put it in quotes, or write option: value")
            if name not in self.fields:
                raise self.unknown(name, where=where)
            checked[name] = check_value(self.fields[name], value, where=f"{where}: {name}")
        return checked


@cache
def schema(command: str) -> Schema:
    """The options of "train" or "sft"."""
    if command == "train":
        run = {**dataclass_fields(*_RUN_OPTIONS), **dataclass_fields(_RUN_OPTIONS[0], "TrainOptions")}
        own = dataclass_fields("cppo.training.config", "CPPOConfig")
        own["method"] = replace(own["method"], choices=tuple(METHODS))
        inherited = _inherited(("trl.trainer.grpo_config", "GRPOConfig"))
        options_class: type[RunOptions] = TrainOptions
    else:
        run, own = dataclass_fields(*_RUN_OPTIONS), {}
        inherited = _inherited(("trl.trainer.sft_config", "SFTConfig"))
        options_class = RunOptions
    return Schema(command, options_class, run, own, {k: v for k, v in inherited.items() if k not in {*run, *own}})


def _inherited(config_class: tuple[str, str]) -> dict[str, OptionField]:
    fields: dict[str, OptionField] = {}
    for module, name in (*_TRAINING_ARGUMENTS, config_class):
        fields |= dataclass_fields(module, name)
    return {
        name: replace(field, choices=_CHOICES.get(name, field.choices), interval=_RANGES.get(name, field.interval))
        for name, field in fields.items()
    }
