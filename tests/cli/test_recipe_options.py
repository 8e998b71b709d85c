"""Recipes and option values, and the reading of configuration classes against the imported classes."""

import dataclasses
import json
import math
import typing

import pytest
import yaml
from trl import SFTConfig

from cppo import CPPOConfig
from cppo.checkpoints import write_manifest
from cppo.cli.fields import parse_recipe
from cppo.errors import UserError
from cppo.fields import NO_DEFAULT, OptionField, in_interval, method_option, option_fields
from cppo.fields import option as declare
from cppo.options import TrainOptions, schema
from cppo.options.inherited import inherited_fields
from cppo.recipes import RunDirectory, dump_recipe, load_recipe, recipe_file, recipe_names
from cppo.recipes.run_dir import CONFIG_HEADER
from cppo.runs.checks import check_recipe
from cppo.values import check_value, value_from_words


def option(*kinds, items=(), choices=(), interval=None, default=NO_DEFAULT):
    return OptionField("x", frozenset(kinds), frozenset(items), tuple(choices), default, "", interval)


def train(*argv):
    return parse_recipe("train", [str(word) for word in argv], default_recipe="micro", description="")


# Reading fields

KINDS = {"none", "bool", "int", "float", "str", "list", "dict"}


@pytest.mark.parametrize("command", ["train", "sft"])
def test_fields_read_from_the_libraries_source_are_those_of_the_imported_class(command):
    config_class = {"train": CPPOConfig, "sft": SFTConfig}[command]
    real = {name: field for name, field in option_fields(config_class).items() if not name.startswith("_")}
    ours = schema(command).run
    read = {**schema(command).inherited, **schema(command).own}
    assert set(read) - set(ours) == set(real) - set(ours)
    for name, field in read.items():
        if field.default != NO_DEFAULT:
            assert field.default == real[name].default, name
        # A library's own class is read as the text that YAML holds.
        assert field.kinds - {"str"} == (real[name].kinds & KINDS) - {"str"}, name
        assert ("str" in field.kinds) == ("str" in real[name].kinds or not real[name].kinds <= KINDS), name
        assert field.item_kinds == real[name].item_kinds or not real[name].item_kinds <= KINDS, name
        assert field.help.split() == real[name].help.replace("%%", "%").split() or "log_level" in name, name


def test_an_annotation_says_what_a_value_may_be():
    @dataclasses.dataclass
    class Options:
        needed: tuple[float, float] = dataclasses.field(metadata={"help": "Two."})
        many: typing.Annotated[list[int] | None, "[1, inf)"] = method_option([3], "Numbers.")
        one: typing.Literal["a", "b", None] = declare("a", "A letter.")
        pairs: dict[str, int] | str = dataclasses.field(default_factory=dict)

    assert list(option_fields(Options).values()) == [
        OptionField("needed", frozenset({"list"}), frozenset({"float"}), (), NO_DEFAULT, "Two.", None),
        OptionField("many", frozenset({"list", "none"}), frozenset({"int"}), (), [3], "Numbers.", "[1, inf)"),
        OptionField("one", frozenset({"str", "none"}), frozenset(), ("a", "b"), "a", "A letter.", None),
        OptionField("pairs", frozenset({"dict", "str"}), frozenset(), (), {}, "", None),
    ]


def test_a_class_that_a_library_lacks_is_told():
    for name in ("trl.nothing.Class", "trl.trainer.grpo_config.Nothing"):
        with pytest.raises(ImportError) as caught:
            inherited_fields(name)
        assert caught.value.name.startswith("trl")  # by which the command line tells it in one line
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        inherited_fields("nowhere_at_all.module.Class")


def test_choices_of_inherited_fields_are_the_real_ones():
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    fields = schema("train").fields
    assert set(fields["eval_strategy"].choices) == {member.value for member in IntervalStrategy}
    assert set(fields["logging_strategy"].choices) == {member.value for member in IntervalStrategy}
    assert set(fields["save_strategy"].choices) == {member.value for member in SaveStrategy}


# Values


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        (option("int"), "3", 3),
        (option("float"), "1e-6", 1e-6),
        (option("float"), 3, 3),
        (option("float"), "3", 3),
        (option("float"), "3.0", 3.0),
        (option("float"), "inf", math.inf),
        (option("bool"), "true", True),
        (option("bool"), "No", False),
        (option("bool", "str"), "true", True),
        (option("bool", "str"), "runs/x", "runs/x"),
        (option("int", "none"), "none", None),
        (option("int", "none"), None, None),
        (option("str", "none", default="none"), "none", "none"),
        (option("str", "none", default=None), "none", None),
        (option("str"), "3", "3"),
        (option("str", choices=("no", "steps")), False, "no"),
        (option("list", items=["float"]), "[0.9, 1]", [0.9, 1.0]),
        (option("list", items=["str"]), "crop", ["crop"]),
        (option("list", "str", items=["str"]), "a.jsonl", "a.jsonl"),
        (option("list", "str", items=["str"]), ["a", "b"], ["a", "b"]),
        (option("dict", "str"), "{a: 1}", {"a": 1}),
        (option("dict", "str"), "file.json", "file.json"),
    ],
)
def test_values_that_fit(field, given, expected):
    value = check_value(field, given, where="x")
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        (option("int"), "1.5"),
        (option("int"), 1.5),
        (option("int"), True),
        (option("float"), "nan"),
        (option("float"), True),
        (option("int"), None),
        (option("bool"), "1.0"),
        (option("list", items=["float"]), ["a"]),
        (option("dict"), "text"),
        (option("str"), ["a"]),
        (option("str", choices=("a", "b")), "c"),
        (option("float", interval="(0, 1]"), 0.0),
        (option("float", interval="(0, 1]"), "1.0001"),
    ],
)
def test_values_that_do_not_fit(field, given):
    with pytest.raises(UserError, match=r"^x: "):
        check_value(field, given, where="x")


def test_several_words_for_one_value():
    with pytest.raises(UserError, match="takes one value"):
        value_from_words(option("int"), ["1", "2"], where="--x")
    assert value_from_words(option("list", items=["float"]), ["0.9", "0.1"], where="--x") == [0.9, 0.1]


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [("[0, 1)", [0, 0.999], [-0.001, 1]), ("(0, 1]", [0.001, 1], [0, 1.001]), ("[2, inf)", [2, 1e9], [1])],
)
def test_intervals(interval, inside, outside):
    assert all(in_interval(number, interval) for number in inside)
    assert not any(in_interval(number, interval) for number in outside)


# Recipes


def test_every_packaged_recipe_is_valid():
    for name in recipe_names():
        given = yaml.safe_load(recipe_file(name).read_text())
        command = "train" if {"method", "extends"} & given.keys() else "sft"
        # These are for the user's own data, and bring none.
        recipe = load_recipe(command, name, {"data": "my.jsonl"} if name in ("sft", "few-rows") else None)
        assert recipe.options.data
        assert recipe.output_dir
        # A recipe with data of its own loses the held-out data of the one that it extends.
        assert command == "sft" or recipe.options.eval_data or not str(recipe.options.data).startswith("tasks:")


def test_no_arguments_mean_the_micro_recipe():
    recipe = train()
    assert recipe.options.model == "micro"
    assert recipe.config["output_dir"] == "runs/micro"
    assert recipe.config["method"] == "cppo"


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: tasks:digits\nlearning_rate: 1e-5\nmax_steps: 7\n")
    recipe = train("--config", file, "--max_steps", 3, "--beta=0.5", "--reward-weights", 1, 0, "--bf16")
    assert recipe.config["max_steps"] == 3
    assert recipe.config["learning_rate"] == 1e-5  # YAML 1.1 reads `1e-5` as text
    assert recipe.config["beta"] == 0.5
    assert recipe.config["reward_weights"] == [1.0, 0.0]
    assert recipe.config["bf16"] is True
    assert recipe.output_dir == "runs/mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: tasks:digits\nlerning_rate: 3\n", ["mine.yaml", "lerning_rate", "learning_rate"]),
        ("data: tasks:digits\nmax_steps: many\n", ["mine.yaml", "max_steps", "many"]),
        ("learning_rate: 3\n", ["mine.yaml", "no `data`"]),
        ("- a\n- b\n", ["mine.yaml", "a mapping"]),
        ("a: [\n", ["mine.yaml: not valid YAML: line 2: expected the node content"]),
        ("a: 1\n  b: 2\n", ["mine.yaml: not valid YAML: line 2: mapping values are not allowed here"]),
        ("a: 'x\n", ["line 2: found unexpected end of stream (while scanning a quoted scalar from line 1)"]),
        ("a: 2026-02-30\n", ["mine.yaml: not valid YAML: day is out of range"]),
        ("a: " + "[" * 20_000, ["mine.yaml: not valid YAML: it is nested too deeply"]),
        ("a: " + "{b: " * 5_000, ["mine.yaml: not valid YAML: it is nested too deeply"]),
        ("data: tasks:digits\ndataset_text_field: text\n", ["cppo sft", "dataset_text_field"]),
    ],
)
def test_bad_recipe_files(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        train("--config", file)
    for word in words:
        assert word in str(caught.value)


def test_a_dumped_recipe_reads_back_the_same(tmp_path):
    recipe = train("--system_prompt", "Über: answer", "--columns", "{prompt: question}", "--max_steps", 3)
    file = tmp_path / "config.yaml"
    file.write_text(dump_recipe(recipe, recipe.config))
    again = load_recipe("train", str(file))
    assert again.options == recipe.options
    assert again.config == recipe.config
    assert file.read_text().startswith(CONFIG_HEADER)


# Run directory


def checkpoint(path, step):
    folder = path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "optimizer.pt").write_bytes(b"state")
    write_manifest(folder, processes=1)
    return folder


def test_the_latest_complete_checkpoint_is_found(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()
    files = RunDirectory(tmp_path)
    assert files.find_checkpoint(True) == tmp_path / "checkpoint-100"
    assert files.find_checkpoint(str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    assert files.find_checkpoint(None) is None
    with pytest.raises(UserError, match="cannot be resumed from"):
        files.find_checkpoint(str(tmp_path / "checkpoint-200"))


def test_an_unfinished_run_asks_what_to_do(tmp_path):
    checkpoint(tmp_path, 5)
    (tmp_path / "config.yaml").write_text(CONFIG_HEADER)
    files = RunDirectory(tmp_path)
    with pytest.raises(UserError, match="unfinished run"):
        files.check_usable(checkpoint=None)
    files.check_usable(checkpoint=files.find_checkpoint(True))
    files.check_usable(overwrite=True)


def test_who_says_how_often_to_save_saves():
    assert load_recipe("sft", "micro-sft").config["save_strategy"] == "no"
    assert "save_strategy" not in load_recipe("sft", "micro-sft", {"save_steps": 5}).config
    given = {"save_steps": 5, "save_strategy": "no"}
    assert load_recipe("sft", "micro-sft", given).config["save_strategy"] == "no"


@pytest.mark.parametrize(
    ("command", "name", "changed", "words"),
    [
        ("sft", "micro-sft", {"model": "micro"}, "`cppo sft` did not write "),
        ("train", "micro", {"method": "papo"}, "of a run with method cppo; add --method cppo"),
        ("train", "micro", {"max_steps": 5}, "is at step 5 already; raise max_steps"),
    ],
)
def test_a_checkpoint_that_cannot_be_continued_is_refused_at_once(tmp_path, command, name, changed, words):
    recipe = load_recipe("train", "micro", {"output_dir": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe, recipe.config))
    given = {"output_dir": str(tmp_path), "resume_from_checkpoint": str(checkpoint(tmp_path, 5))}
    (tmp_path / "summary.json").write_text("{}")
    check_recipe(load_recipe("train", "micro", given))
    with pytest.raises(UserError, match=words):
        check_recipe(load_recipe(command, name, {**given, **changed}))


def test_a_checkpoint_of_another_run_replaces_no_run(tmp_path):
    other, files = tmp_path / "other", RunDirectory(tmp_path / "finished")
    for folder in (other, files.path):
        folder.mkdir()
    resume = checkpoint(other, 5)
    files.check_usable(checkpoint=resume)
    files.config.write_text(CONFIG_HEADER)
    files.summary.write_text("{}")
    files.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="finished run; give --overwrite"):
        files.check_usable(checkpoint=resume)
    files.check_usable(checkpoint=resume, overwrite=True)
    files.begin(checkpoint=resume, overwrite=True)
    assert list(files.path.iterdir()) == [files.config]
    assert resume.is_dir()


def test_a_foreign_config_file_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: true\n")
    with pytest.raises(UserError, match=r"files that no run wrote \(config.yaml\)"):
        RunDirectory(tmp_path).check_usable(overwrite=True)


def test_a_resumed_run_keeps_the_steps_up_to_its_checkpoint(tmp_path):
    files = RunDirectory(tmp_path)
    files.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 8)) + '{"step": 8, "rew')
    files.summary.write_text("{}")
    files.begin(checkpoint=checkpoint(tmp_path, 5), overwrite=False)
    assert [json.loads(line)["step"] for line in files.metrics.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert not files.summary.exists()


def test_overwriting_removes_the_files_of_the_earlier_run_alone(tmp_path):
    checkpoint(tmp_path, 5)
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoint-mine").mkdir()
    RunDirectory(tmp_path).begin(checkpoint=None, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-mine", "config.yaml", "notes.txt"]


def test_run_options_have_help_and_defaults():
    assert set(schema("train").run) == {field.name for field in dataclasses.fields(TrainOptions)}
    assert all(field.help for field in {**schema("train").run, **schema("train").own}.values())
