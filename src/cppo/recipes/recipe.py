"""A recipe: flat YAML that says what to train, on what data, and how; packaged by name, or a user's own file."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cppo.errors import UserError, choose_one, one_line
from cppo.methods import DEFAULT_METHOD, with_method
from cppo.options import ADAPTER_OPTIONS, RunOptions, TrainOptions, schema, without_method
from cppo.parsing import parse_yaml
from cppo.recipes.run_dir import config_header
from cppo.rewards import chosen_rewards

RECIPES_DIR = Path(__file__).parent
ACCELERATE_DIR = RECIPES_DIR / "accelerate"
EXTENDS = "extends"
"""The entry that names another recipe; its options apply unless the recipe sets them."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    `options` are the run's own (model, data ...). `config` has the fields given for the trainer's configuration class
    (`CPPOConfig` for the command "train", TRL's `SFTConfig` for "sft"), with `output_dir`.
    """

    name: str
    command: str
    options: RunOptions
    config: Mapping[str, Any]

    @property
    def output_dir(self) -> str:
        return self.config["output_dir"]

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option of CPPO, and the inherited ones that method and recipe set; only for a "train" recipe."""
        return {**schema(self.command).defaults, **with_method(self.config, self.method)}

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.config.get("method", DEFAULT_METHOD)

    @property
    def rewards(self) -> list[str]:
        """The names of the rewards, with the method's; only for a "train" recipe."""
        return self._rewards_and_weights[0]

    @property
    def reward_weights(self) -> list[float]:
        """Default weight of each reward."""
        return self._rewards_and_weights[1]

    @property
    def _rewards_and_weights(self) -> tuple[list[str], list[float]]:
        assert isinstance(self.options, TrainOptions)
        return chosen_rewards(self.options.rewards, self.method)


def packaged_names(folder: Path) -> list[str]:
    """Names of the YAML files in a folder of the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def packaged_or_file(folder: Path, what: str, name_or_file: str) -> Path:
    """The file of a packaged name in `folder`, or a user's own.

    Raises UserError for neither; the message calls it `what`: "recipe".
    """
    names = packaged_names(folder)
    if name_or_file in names:
        return folder / f"{name_or_file}.yaml"
    if Path(name_or_file).is_file():
        return Path(name_or_file)
    raise UserError(f"{what} {name_or_file!r}: no such file, nor a packaged name; {choose_one(name_or_file, names)}")


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return packaged_names(RECIPES_DIR)


def recipe_file(name_or_file: str) -> Path:
    """The file of a packaged recipe, or a user's own. Raises UserError for neither."""
    return packaged_or_file(RECIPES_DIR, "recipe", name_or_file)


def accelerate_files() -> dict[str, Path]:
    """The packaged configurations of `accelerate launch` by name."""
    return {path.stem: path for path in sorted(ACCELERATE_DIR.glob("*.yaml"))}


def recipe_summary(file: Path) -> str:
    """The first comment line of a recipe: its purpose."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def load_recipe(command: str, name_or_file: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe for the command "train" or "sft"; `overrides` (checked values) replace the file's.

    The default `output_dir` is `runs/<name of the recipe>`. Other `data` in `overrides` drop the recipe's `columns` and
    held-out data. Another `method` drops the recipe's options of methods, and the options that its method sets. A
    recipe that `extends` another overrides it in the same way. Raises UserError, which names file and option, for an
    unreadable file, an unknown option, a wrong value, no data, or recipes that extend each other.
    """
    file = recipe_file(name_or_file)
    where = f"recipe {name_or_file}"
    given = _read_recipe(name_or_file)
    options = schema(command)
    strangers = [name for name in given if name not in options.fields]
    other = "sft" if command == "train" else "train"
    if strangers and all(name in schema(other).fields for name in given):
        raise UserError(f"{where} is for `cppo {other}`: `cppo {command}` has no option `{strangers[0]}`")
    checked, overrides = options.check(given, where=where), overrides or {}
    values = _override(checked, overrides)
    if not values.get("data"):
        raise UserError(f"{where}: no `data` is given; write e.g. data: tasks:digits or data: my.jsonl")
    values["output_dir"] = values.get("output_dir") or f"runs/{file.stem}"
    return _divided(command, name_or_file, values)


def make_recipe(command: str, name: str, values: Mapping[str, Any]) -> Recipe:
    """A recipe of options that are given here, `output_dir` among them. Raises UserError as `load_recipe` does."""
    return _divided(command, name, schema(command).check(values, where=name))


def _divided(command: str, name: str, values: Mapping[str, Any]) -> Recipe:
    """A recipe from checked options, the run's own apart from the trainer's."""
    options = schema(command)
    config = {name: value for name, value in values.items() if name not in options.run}
    run = options.options_class(**{name: value for name, value in values.items() if name in options.run})
    return Recipe(name, command, run, config)


def given_options(recipe: Recipe) -> dict[str, Any]:
    """The options that a recipe and its method set, by name."""
    given = {**dataclasses.asdict(recipe.options), **with_method(recipe.config, recipe.method)}
    return {name: value for name, value in given.items() if value is not None}


def resolved_options(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's options that define the run, with the trainer's fields from `config`."""
    run = dataclasses.asdict(recipe.options)
    for name in ("resume_from_checkpoint", "overwrite", "quiet", "dry_run"):
        run.pop(name, None)  # they say how a run was started, not what it is
    if not run["use_peft"]:
        run = {name: value for name, value in run.items() if name not in ("use_peft", *ADAPTER_OPTIONS)}
    return {**{name: value for name, value in run.items() if value is not None}, **config}


def dump_recipe(recipe: Recipe, config: Mapping[str, Any], remarks: Sequence[str] = ()) -> str:
    """`resolved_options` as YAML for `load_recipe`; one-line remarks about the run become comments."""
    header = f"{config_header(recipe.command)}{recipe.name}).\n" + "".join(f"# {remark}\n" for remark in remarks)
    return header + yaml.safe_dump(resolved_options(recipe, config), sort_keys=False, allow_unicode=True)


def _read_recipe(name_or_file: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's options with the options of the recipe it extends, unchecked."""
    if name_or_file in extended_by:
        raise UserError(f"recipe {name_or_file!r} extends itself, through {', '.join(extended_by)}")
    given = read_mapping(recipe_file(name_or_file), f"recipe {name_or_file}")
    if EXTENDS not in given:
        return given
    base = given.pop(EXTENDS)
    if not isinstance(base, str):
        raise UserError(f"recipe {name_or_file}: {EXTENDS}: {base!r} is neither the name of a recipe nor a file")
    beside = recipe_file(name_or_file).parent / base
    return _override(_read_recipe(str(beside) if beside.is_file() else base, (*extended_by, name_or_file)), given)


def _override(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `overrides`.

    Column names, held-out data and its evaluation belong to their data, and a method's options to the method. Setting
    an interval of saving turns saving on.
    """
    kept = dict(values)
    if "method" in overrides and overrides["method"] != values.get("method", DEFAULT_METHOD):
        kept = without_method(kept, overrides["method"])
    if "data" in overrides:
        kept.pop("columns", None)
        kept.pop("eval_data", None)
        if "eval_data" not in overrides:
            kept.pop("final_eval_samples", None)
    if "save_steps" in overrides and kept.get("save_strategy") == "no":
        kept.pop("save_strategy")
    return {**kept, **overrides}


def _syntax_error(error: yaml.MarkedYAMLError) -> str:
    """The line of wrong YAML, and the mistake; also the line where it began, if different."""
    line, begun = (None if mark is None else mark.line + 1 for mark in (error.problem_mark, error.context_mark))
    since = "" if begun in (None, line) else f" ({error.context} from line {begun})"
    return f"line {line}: {error.problem}{since}"


def read_mapping(file: Path, where: str) -> dict[str, Any]:
    """The options in a YAML file, unchecked. Raises UserError for a file that is no mapping of names."""
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # bytes that are no text, or a date such as 2026-02-30
        raise UserError(f"{where}: cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_syntax_error(error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{where}: expected a mapping, one `option: value` a line")
    return content
