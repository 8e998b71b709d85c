"""Rewards by name, import path or file: what is loaded gives the values worked out by hand; mistakes are one line."""

import asyncio
import sys
from pathlib import Path

import pytest

from cppo.errors import UserError
from cppo.rewards import (
    accuracy_reward,
    check_rewards,
    format_reward,
    guarded_rewards,
    load_reward,
    named_rewards,
    number_tolerance,
    reward_columns,
)

OWN = """
import dataclasses

LIMIT = 3

@dataclasses.dataclass
class Shorter:
    limit: int
    def __call__(self, completions, **kwargs):
        return [float(len(text) < self.limit) for text in completions]

def get_shorter(limit=2):
    return Shorter(limit)

def brevity(completions, **kwargs):
    return [1.0 / len(text) for text in completions]

async def later(completions, **kwargs):
    return [0.5 for _ in completions]

def narrow(completions):
    return [0.0 for _ in completions]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_like_this")


TWO_BLOCKS = r"<think> a </think> <think> b </think> \boxed{8}"
"""A form that only the published reward lets pass."""


def load(text):
    (spec,) = check_rewards([text], None)
    return load_reward(spec)


def test_built_in_rewards():
    accuracy, formatted = (load(name) for name in ("accuracy", "format"))
    assert accuracy.__name__ == accuracy_reward.__name__ == "accuracy_reward"
    assert formatted.__name__ == format_reward.__name__ == "format_reward"
    assert formatted([TWO_BLOCKS]) == [0.0]
    assert load("format?form=published")([TWO_BLOCKS]) == [1.0]
    assert load("accuracy?tolerance=0.1")([r"\\boxed{95}"], answer=["100"]) == [1.0]
    assert accuracy([r"\\boxed{95}"], answer=["100"]) == [0.0]


def test_length_penalty():
    """0 up to max - cache tokens, then linear down to -1 at max (DAPO, section 3.4)."""
    penalty = load("length?max_completion_len=100&soft_punish_cache=20")
    lengths = [10, 80, 85, 100, 130]
    values = penalty(completion_ids=[[1] * length for length in lengths], completions=[""] * 5)
    assert values == pytest.approx([0.0, 0.0, -0.25, -1.0, -1.0])


def test_repetition_penalty():
    """-(1 - distinct n-grams / n-grams)."""
    penalty = load("repetition?ngram_size=2")
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1]]
    assert penalty(completion_ids=ids) == pytest.approx([0.0, -(1 - 1 / 4), -(1 - 2 / 4)])


def test_ones_own(own):
    assert load("own.py:brevity")(completions=["abcd"]) == [0.25]
    assert load("own.py:get_shorter?limit=5")(completions=["abcd", "abcde"]) == [1.0, 0.0]
    assert load("own.py:get_shorter?")(completions=["a", "ab"]) == [1.0, 0.0]
    assert asyncio.run(load("own.py:later")(completions=["x"])) == [0.5]
    assert "own" not in sys.modules
    assert load("trl.rewards:think_format_reward").__name__ == "think_format_reward"


def test_columns_that_rewards_name(own):
    Path("named.py").write_text(
        "class Graded:\n"
        "    def __call__(self, *, grade, completions, log_extra, **kwargs):\n"
        "        return [1.0 for _ in completions]\n\n"
        "def get_graded():\n    return Graded()\n\n"
        "async def topical(completions, topic, answer, grade, weight=1.0, **kwargs):\n    return [0.0]\n"
    )
    assert reward_columns(load("named.py:get_graded?")) == {"grade": True}
    assert reward_columns(load("named.py:topical")) == {"topic": True, "answer": True, "grade": True, "weight": False}
    assert reward_columns(load("accuracy")) == {"answer": True, "choices": False}
    assert reward_columns(load("length?max_completion_len=9&soft_punish_cache=2")) == {}
    assert reward_columns(load("own.py:brevity")) == {}
    assert reward_columns(load("trl.rewards:accuracy_reward")) == {"solution": True}


def test_names_in_python(own):
    """What is no name stays: functions, models and the names of models on the hub."""
    assert named_rewards("format")([TWO_BLOCKS]) == [0.0]
    first, second, *rest = named_rewards(["accuracy?tolerance=0.1", "own.py:brevity", format_reward, "org/model"])
    assert first([r"\\boxed{95}"], answer=["100"]) == [1.0]
    assert second(completions=["abcd"]) == [0.25]
    assert rest == [format_reward, "org/model"]
    with pytest.raises(UserError, match=r"there is no file gone.py"):
        named_rewards(["gone.py:f"])


def test_a_column_that_is_not_named_is_told(own):
    Path("named.py").write_text("def graded(completions, **columns):\n    return columns['grade']\n")
    with pytest.raises(
        UserError, match="KeyError: 'grade'; the data's columns are passed to the parameters with their"
    ):
        load("named.py:graded")(completions=["a"])


def test_what_ones_own_code_raises_names_file_and_line(own):
    with pytest.raises(UserError, match=r"'own.py:brevity' failed in own.py line 16: ZeroDivisionError"):
        load("own.py:brevity")(completions=[""])
    with pytest.raises(UserError, match=r"'own.py:later' failed in own.py line 19: TypeError"):
        asyncio.run(load("own.py:later")(completions=None))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("1.5", "it returned float"),
        ("None", "it returned NoneType"),
        ("'ab'", "it returned str"),
        ("[1.0]", "it returned 1$"),
        ("[1.0, '0.5']", "for completion 1 it returned an object of type str"),
        ("[0.0, float('nan')]", "for completion 1 it returned nan$"),
        ("[[1.0], 0.5]", "for completion 0 it returned an object of type list"),
    ],
)
def test_what_is_no_reward_is_one_line(own, returned, said):
    Path("odd.py").write_text(f"def odd(**columns):\n    return {returned}\n")
    with pytest.raises(UserError, match=f"'odd.py:odd' must return a list of 2 numbers.*{said}") as caught:
        load("odd.py:odd")(completions=["a", "b"])
    assert "\n" not in str(caught.value)


def test_a_reward_that_changes_its_arguments_changes_no_others(own):
    text = "def {}(completions, answer, **columns):\n    {}\n    return [0.0, 0.0]\n"
    Path("emptied.py").write_text(text.format("emptied", "completions.clear(), answer.clear()"))
    Path("lowered.py").write_text(text.format("lowered", "completions[0][0]['content'] = ''; answer[1] = ''"))
    completions = [[{"role": "assistant", "content": text}] for text in ("A", "B")]
    answer = ["a", "b"]
    for name in ("emptied", "lowered"):
        assert load(f"{name}.py:{name}")(completions=completions, answer=answer) == [0.0, 0.0]
    assert [completion[0]["content"] for completion in completions] == ["A", "B"]
    assert answer == ["a", "b"]


LEAVING = """
import sys

def leave(completions, **kwargs):
    sys.exit()

async def leave_later(completions, **kwargs):
    sys.exit(0)

def get_leaving(code=0):
    sys.exit(code)
"""


@pytest.mark.parametrize("name", ["leave", "leave_later"])
def test_a_reward_that_exits_is_an_error(own, name):
    Path("leaving.py").write_text(LEAVING)
    reward = load(f"leaving.py:{name}")
    with pytest.raises(UserError, match=rf"'leaving.py:{name}' failed in leaving.py line \d+: SystemExit"):
        asyncio.run(reward(completions=["a"]))
    (inside,) = guarded_rewards([reward])
    assert inside.__name__ == name


def test_code_that_exits_where_it_is_loaded_is_an_error(own):
    Path("leaving.py").write_text(LEAVING)
    with pytest.raises(UserError, match=r"'leaving.py:get_leaving\?code=0': 0"):
        load("leaving.py:get_leaving?code=0")
    Path("gone.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=r"'gone.py:f' cannot be imported: SystemExit"):
        load("gone.py:f")


def test_functions_in_python_are_guarded():
    def leave(completions, **columns):
        sys.exit(0)

    def broken(completions, **columns):
        raise ZeroDivisionError

    def odd(completions, level, **columns):
        return [float("nan")]

    class Model:
        def forward(self): ...
        def __call__(self): ...

    model = Model()
    guarded = guarded_rewards([leave, broken, odd, "org/model", model])
    assert guarded[3:] == ["org/model", model]
    with pytest.raises(UserError, match=r"reward_funcs: 'leave' failed in test_spec.py line \d+: SystemExit: 0"):
        guarded[0](completions=["a"])
    with pytest.raises(ZeroDivisionError):
        guarded[1](completions=["a"])
    with pytest.raises(UserError, match=r"reward_funcs: 'odd' must return .* for completion 0 it returned nan"):
        guarded[2](completions=["a"], level=["easy"])
    assert reward_columns(guarded[2]) == {"level": True}


def test_kinds_of_numbers_that_are_rewards(own):
    Path("odd.py").write_text(
        "import numpy, torch\n\ndef odd(**columns):\n    return (True, None, numpy.float32(0.5), torch.tensor(2.0))\n"
    )
    assert load("odd.py:odd")(completions=["a"] * 4) == [1.0, None, 0.5, 2.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acuracy", "'acuracy' is unknown; did you mean `accuracy`? choose one of accuracy, format,"),
        ("format?x=1", "'x'"),
        ("format?form=loose", "form = 'loose' is unknown; choose one of strict, published"),
        ("accuracy?tolerance", "'tolerance' is not option=value"),
        ("accuracy?tolerance=2", "tolerance = 2 must be in"),
        ("accuracy?tol=2", "'tol'"),
        ("length", "max_completion_len"),
        ("gone.py:f", "there is no file gone.py"),
        ("nothing_like_this.rewards:f", "there is no module nothing_like_this.rewards"),
        ("trl.nothing:f", "cannot be imported"),
        ("own.py:gone", "own.py has no gone"),
        ("own.py:LIMIT", "is of type int, not a function"),
        ("own.py:Shorter", "is of type type, not a function"),
        ("own.py:get_shorter", "must take **kwargs"),
        ("own.py:narrow", "must take **kwargs"),
        ("own.py:get_shorter?size=2", "'size'"),
        ("broken.py:f", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_mistakes(own, text, words):
    with pytest.raises(UserError) as error:
        load(text)
    assert words in str(error.value)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_and_tolerance():
    assert len(check_rewards(["accuracy", "format"], [1.0, 2.0])) == 2
    add = r"1 weight \(0.5\) for 2 rewards \(accuracy, format\): add 1 weight or remove 1 reward; `.* 1 1`"
    with pytest.raises(UserError, match=add):
        check_rewards(["accuracy", "format"], [0.5])
    remove = r"3 weights \(0.9, 0.1, 2\) for 1 reward \(accuracy\): add 2 rewards or remove 2 weights; .* 1` gives"
    with pytest.raises(UserError, match=remove):
        check_rewards(["accuracy"], [0.9, 0.1, 2.0])
    with pytest.raises(UserError, match="given twice"):
        check_rewards(["format", "format"], None)
    with pytest.raises(UserError, match="at least one"):
        check_rewards([], None)
    assert number_tolerance(check_rewards(["format", "accuracy?tolerance=0.05"], None)) == 0.05
    assert number_tolerance(check_rewards(["accuracy"], None)) == 0.0
