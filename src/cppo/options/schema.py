"""The options of each training command: the run's, CPPO's own, and those inherited from TRL."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cppo.errors import UserError, did_you_mean
from cppo.fields import OptionField, option_fields
from cppo.options.inherited import inherited_fields
from cppo.options.method import cppo_fields
from cppo.options.run import RunOptions, TrainOptions
from cppo.values import check_value

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
"""Names that TRL's scripts and earlier versions use -> what to write here."""


@dataclass(frozen=True)
class Schema:
    """The options of one command: the run's (fields of `options_class`), CPPO's own, and the inherited ones."""

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
        """The defaults of CPPO's own options."""
        return {name: field.default for name, field in self.own.items()}

    @property
    def named_otherwise(self) -> Mapping[str, str]:
        """Names that TRL's users may try -> what to write."""
        return _NAMED_OTHERWISE if self.inherited else {}

    def unknown(self, name: str, *, where: str) -> UserError:
        """The error for an option that does not exist; it names the replacement or the nearest option."""
        near = did_you_mean(name, self.fields)
        if name in self.named_otherwise:
            hint = f"; here it is {self.named_otherwise[name]}"
        elif near:
            hint = f"; {near}"
        else:
            hint = f" (see `cppo {self.command} {'--help-all' if self.inherited else '--help'}`)"
        return UserError(f"{where}: unknown option `{name}`{hint}")

    def check(self, values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """`values`, each converted to its option's type. Raises UserError for an unknown name or an invalid value."""
        checked = {}
        for name, value in values.items():
            if not isinstance(name, str):
                raise UserError(f"{where}: {name!r} is not an option name: put it in quotes, or write option: value")
            if name not in self.fields:
                raise self.unknown(name, where=where)
            checked[name] = check_value(self.fields[name], value, where=f"{where}: {name}")
        return checked


@cache
def schema(command: str) -> Schema:
    """The options of `cppo train` or `cppo sft`; `command` is "train" or "sft"."""
    train = command == "train"
    options_class = TrainOptions if train else RunOptions
    run, own = option_fields(options_class), cppo_fields() if train else {}
    inherited = inherited_fields("trl.trainer.grpo_config.GRPOConfig" if train else "trl.trainer.sft_config.SFTConfig")
    return Schema(command, options_class, run, own, {k: v for k, v in inherited.items() if k not in {*run, *own}})
