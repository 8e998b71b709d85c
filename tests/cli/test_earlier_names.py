"""Choices that were called otherwise once work wherever a value is read, and the user is told once."""

from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser
from trl import TrlParser

from cppo import CPPOConfig
from cppo.cli.fields import parse_recipe
from cppo.errors import UserError
from cppo.methods import METHODS, SHAPING_SINKS
from cppo.options import cppo_fields
from cppo.recipes import dump_recipe, load_recipe
from cppo.recipes.resumed import changed_options
from cppo.runs.checks import check_options
from cppo.values import tell_present_name

SAVED_RUN = Path(__file__).parent / "earlier" / "config.yaml"
"""As `cppo train --method pgpo` wrote it when the sink `scale_advantage` was called `weights`."""
WARNING = "cppo: warning: perception_sink: 'weights' is called 'scale_advantage' now\n"


@pytest.fixture(autouse=True)
def a_process_that_told_nothing():
    tell_present_name.cache_clear()


def test_a_saved_run_of_then_is_the_run_of_now(tmp_path, capsys):
    recipe = load_recipe("train", str(SAVED_RUN))
    check_options(recipe)
    then = yaml.safe_load(SAVED_RUN.read_text())
    assert recipe.config == {
        **{name: then[name] for name in recipe.config},
        "perception_sink": METHODS["pgpo"].options["perception_sink"],
    }
    assert set(then) - set(recipe.config) <= set(vars(recipe.options))
    (tmp_path / "config.yaml").write_text(SAVED_RUN.read_text())
    assert changed_options(recipe, recipe.config, tmp_path / "checkpoint-1") == {}
    assert "perception_sink: scale_advantage\n" in dump_recipe(recipe, recipe.config)
    assert capsys.readouterr().err == WARNING


def from_file(folder, words):
    file = folder / "mine.yaml"
    file.write_text("data: tasks:digits\n" + yaml.safe_dump(words))
    return load_recipe("train", str(file)).config["perception_sink"]


def from_words(folder, words):
    argv = [word for name, value in words.items() for word in (f"--{name}", value)]
    recipe = parse_recipe("train", argv, default_recipe="micro", description="")
    return recipe.config["perception_sink"]


def from_python(folder, words):
    return CPPOConfig(str(folder), use_cpu=True, bf16=False, **words).perception_sink


def from_parser(folder, words):
    line = ["--output_dir", str(folder), "--use_cpu", "true", "--bf16", "false"]
    line += [word for name, value in words.items() for word in (f"--{name}", value)]
    (trls,) = TrlParser((CPPOConfig,)).parse_args_and_config(line)
    (hfs,) = HfArgumentParser((CPPOConfig,)).parse_args_into_dataclasses(line)
    assert trls == hfs
    return trls.perception_sink


@pytest.mark.parametrize("read", [from_file, from_words, from_python, from_parser])
def test_a_former_name_is_read_and_told_once(tmp_path, capsys, read):
    given = {"method": "pgpo", "perception_sink": "weights"}
    assert [read(tmp_path, given), read(tmp_path, given)] == ["scale_advantage"] * 2
    assert capsys.readouterr().err.count("warning: perception_sink") == 1
    assert read(tmp_path, {"method": "vppo", "perception_sink": "advantage"}) == "mask_advantage"


def test_nothing_of_ours_uses_a_former_name(tmp_path, capsys):
    sink = cppo_fields()["perception_sink"]
    assert set(sink.former.values()) <= set(SHAPING_SINKS) <= set(sink.choices)
    assert {method.options["perception_sink"] for method in METHODS.values()} <= set(sink.choices)
    with pytest.raises(
        UserError,
        match=rf"choose one of {', '.join(map(str, sink.choices))}, or give file.py:function$",
    ):
        from_python(tmp_path, {"perception_sink": "weight"})
    assert capsys.readouterr().err == ""
