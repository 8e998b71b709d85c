"""What docs/extending.md shows is run as it stands there: each file is written, each command trains a step by it."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from rollout_stubs import inject, make_rows, step_logs, token_reward

from cppo.cli.main import main
from cppo.options import schema
from cppo.recipes import load_recipe
from cppo.values import value_from_words

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
FILES = {code.splitlines()[0].removeprefix("# "): code for language, code in BLOCKS if language}
COMMANDS = [line for language, code in BLOCKS if not language for line in code.splitlines()]
TRAINED = [command for command in COMMANDS if command.startswith("cppo train")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with every file that the page shows, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    for name, code in FILES.items():
        Path(name).write_text(code)
    return tmp_path


def options_of(command):
    """The options that a command gives, in their types."""
    options, fields = {}, schema("train").fields
    for word in shlex.split(command)[2:]:
        if word.startswith("--"):
            options[name := word.removeprefix("--")] = []
        else:
            options[name].append(word)
    config = options.pop("config", [None])[0]
    given = {name: value_from_words(fields[name], words, where=name) for name, words in options.items()}
    return {**(load_recipe("train", config).config if config else {}), **given}


def test_each_is_short_and_is_named():
    assert len(TRAINED) == 9
    assert all(len(code.strip().splitlines()) <= 15 for code in FILES.values())
    assert all(any(name in command for command in TRAINED) for name in FILES)


@pytest.mark.parametrize("command", TRAINED)
def test_a_step_is_trained_by_each(folder, make_trainer, command):
    given = {name: value for name, value in options_of(command).items() if name in {*schema("train").own, "rewards"}}
    rewards = given.pop("rewards", [token_reward])
    trainer = make_trainer(make_rows([1, 2]), reward_funcs=rewards, **given)
    inject(trainer).train()
    (log,) = step_logs(trainer)
    assert rewards != [token_reward] or 0 < log["perception/selected_fraction"] <= 1
    assert given.get("perception_sink") != "my_term.py:hinge" or log["perception/cpl"] > 0


def test_the_view_is_shown(folder):
    (command,) = [command for command in COMMANDS if command.startswith("cppo views")]
    Image.new("RGB", (48, 48), "red").save("picture.png")
    assert main(shlex.split(command)[1:]) == 0
    assert "out_of_focus" in Path("views.html").read_text()
