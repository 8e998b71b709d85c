"""Options inherited from TRL and transformers, read without importing either.

Importing their classes loads torch and takes seconds; a misspelt option must be found at once. So names, annotations,
defaults and help texts come from the libraries' syntax trees.
"""

import ast
import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal

from cppo.fields import NO_DEFAULT, OptionField, option_field

# The libraries annotate these as `str` or `float`, but only some values work. Without these tables a wrong value would
# fail after torch is imported, or in the first step.
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
    "num_generations": "[1, inf)",
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
_TYPES = {"bool": bool, "int": int, "float": float, "list": list, "dict": dict}
_FACTORIES: dict[str, Any] = {"list": [], "dict": {}}
_EVERY_TRAINER = ("transformers.training_args.TrainingArguments", "trl.trainer.base_config._BaseConfig")


def inherited_fields(config_class: str) -> dict[str, OptionField]:
    """The fields of one of TRL's configuration classes, `module.Class`, and of its base classes.

    Raises ImportError where the library is not installed, or where its version lacks the file or the class.
    """
    declared = {name: field for one in (*_EVERY_TRAINER, config_class) for name, field in _declared_fields(one).items()}
    return {
        name: replace(field, choices=_CHOICES.get(name, field.choices), interval=_RANGES.get(name, field.interval))
        for name, field in declared.items()
    }


def _declared_fields(config_class: str) -> dict[str, OptionField]:
    """The fields that a class declares itself, in source order."""
    module, _, class_name = config_class.rpartition(".")
    for node in _syntax_tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {
                statement.target.id: _option_field(statement.target.id, statement)
                for statement in node.body
                if isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and not statement.target.id.startswith("_")
                and "ClassVar" not in ast.unparse(statement.annotation)
            }
    raise ImportError(f"there is no {config_class}", name=module)


@cache
def _syntax_tree(module: str) -> ast.Module:
    """A module's syntax tree. Looks up only the top package: `find_spec` of a submodule imports its parents."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    file = Path(spec.submodule_search_locations[0], *rest).with_suffix(".py")
    if not file.is_file():
        raise ImportError(f"there is no file {file}", name=package)
    return ast.parse(file.read_text(encoding="utf-8"))


def _option_field(name: str, statement: ast.AnnAssign) -> OptionField:
    """The option that `NAME: TYPE = DEFAULT` or `NAME: TYPE = field(default=..., metadata={"help": ...})` declares."""
    parts: dict[str | None, ast.expr | None] = {"default": statement.value}
    if isinstance(statement.value, ast.Call):
        parts = {keyword.arg: keyword.value for keyword in statement.value.keywords}
    factory, metadata = parts.get("default_factory"), parts.get("metadata")
    default = _FACTORIES.get(ast.unparse(factory), NO_DEFAULT) if factory else _literal(parts.get("default"))
    help = ""
    if isinstance(metadata, ast.Dict):
        entries = zip(metadata.keys, metadata.values, strict=True)
        help = next((str(_literal(value)) for key, value in entries if _literal(key) == "help"), "")
    return option_field(name, _type(statement.annotation), default, " ".join(help.replace("%%", "%").split()))


def _type(node: ast.expr) -> Any:
    """The type that an annotation names; `str` for a library's class, which YAML writes as text."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, right=right):
            return _type(left) | _type(right)
        case ast.Subscript(value=ast.Name("Literal"), slice=values):
            literal: Any = Literal
            return literal[ast.literal_eval(values)]
        case ast.Subscript(value=ast.Name("list"), slice=item):
            return GenericAlias(list, (_type(item),))
        case ast.Subscript(value=generic):
            return _type(generic)
        case _:
            return _TYPES.get(ast.unparse(node), str)


def _literal(node: ast.expr | None) -> Any:
    """The literal value of a node; NO_DEFAULT where it is computed or missing."""
    try:
        return NO_DEFAULT if node is None else ast.literal_eval(node)
    except ValueError:
        return NO_DEFAULT
