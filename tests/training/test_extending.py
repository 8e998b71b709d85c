"""The examples of docs/extend/extending.md run: each file is written, each command trains a step."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from rollout_stubs import inject, make_rows, step_logs, token_reward

from cppo.cli.main import main
from cppo.imports import import_object
from cppo.options import schema
from cppo.perception import ResponseScores, ViewScores
from cppo.recipes import load_recipe
from cppo.values import value_from_words

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "extending.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
FILES = {code.splitlines()[0].removeprefix("# "): code for language, code in BLOCKS if language}
COMMANDS = [line for language, code in BLOCKS if not language for line in code.splitlines()]
TRAINED = [command for command in COMMANDS if command.startswith("cppo train")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with every file of the page, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    for name, code in FILES.items():
        Path(name).write_text(code)
    return tmp_path


def options_of(command):
    """The options of a command, converted to their types."""
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
    assert len(TRAINED) == 10
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


def test_the_papers_method_has_the_weights_that_the_page_says(folder):
    S = torch.tensor([[0.0, 1.0, math.e - 1, math.e**2 - 1, 9.0], [2.0, 2.0, 7.0, 7.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    anchor = ResponseScores(torch.zeros_like(S), torch.zeros_like(S))
    weigh = import_object("pgpo_development.py:weigh", "perception_sink")
    found = weigh(ViewScores(anchor, anchor, None, mask, score=S), torch.tensor([1.0, -1.0]), None)
    # By hand: I = (0, ln 2 / 2, 0.5, 1), and tau is a fifth of the way from its second to its third value.
    second = math.log(2) / 2
    tau = second + (0.5 - second) / 5
    weights = [0.1, second / tau, 1 + 2 * (0.5 - tau) / (1 - tau), 3.0, 0.0]
    assert weights == pytest.approx([0.1, 0.919, 1.394, 3.0, 0.0], abs=5e-4)
    assert found[0].tolist() == pytest.approx(weights)
    assert found[1].tolist() == pytest.approx([-1.0, -1.0, 0.0, 0.0, 0.0])  # equal scores have equal weights
