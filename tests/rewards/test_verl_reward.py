"""The rewards as verl calls them: one response at a time."""

import pytest

from cppo.errors import UserError
from cppo.verl.reward import compute_score

RIGHT, WRONG = r"<think>2 + 2</think> \boxed{4}", r"<think>2 + 2</think> \boxed{5}"


def test_the_score_is_the_weighted_sum():
    parts = compute_score("any", RIGHT, "4", {"index": 3}, num_turns=2)
    assert parts == pytest.approx({"score": 1.0, "accuracy_reward": 1.0, "format_reward": 1.0})
    assert compute_score("any", WRONG, "4")["score"] == pytest.approx(0.1)
    weighted = compute_score("any", RIGHT.replace("<think>", ""), "4", rewards=["accuracy", "format"], weights=[2, 5])
    assert weighted == {"score": 2.0, "accuracy_reward": 1.0, "format_reward": 0.0}
    assert compute_score("any", RIGHT, "4", rewards=["accuracy"], weights=None)["score"] == 1.0


def test_columns_reach_the_rewards():
    letter = RIGHT.replace("4", "B")
    assert compute_score("any", letter, "four", {"choices": ["three", "four"]})["accuracy_reward"] == 1.0
    assert compute_score("any", letter, "four", {"choices": None})["accuracy_reward"] == 0.0
    assert compute_score("any", "4.05", "4", rewards=["accuracy?tolerance=0.02"], weights=None)["score"] == 0.0
    near = r"\boxed{4.05}"
    assert compute_score("any", near, "4", rewards=["accuracy?tolerance=0.02"], weights=None)["score"] == 1.0


def test_functions_of_the_users_own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "async def brief(completions, index, **columns):\n"
        "    return [None if index[0] else 1.0 / len(chat[-1]['content']) for chat in completions]\n"
        "def broken(completions, **columns):\n"
        "    return [1 / 0]\n"
    )
    rewards = [f"{file}:brief"]
    assert compute_score("any", "four", "4", {"index": 0}, rewards, [2.0]) == {"score": 0.5, "brief": 0.25}
    assert compute_score("any", "four", "4", {"index": 1}, rewards, [2.0]) == {"score": 0.0, "brief": 0.0}
    with pytest.raises(UserError, match=r"own\.py line 4: ZeroDivisionError"):
        compute_score("any", "four", "4", {}, [f"{file}:broken"], None)
    with pytest.raises(UserError, match="brief needs index, but the row's `extra_info` does not have it"):
        compute_score("any", "four", "4", {}, rewards, [2.0])


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        (["acuracy"], None, "did you mean `accuracy`"),
        (["accuracy"], [0.9, 0.1], "2 weights \\(0.9, 0.1\\) for 1 reward"),
        (["accuracy", "accuracy?tolerance=0.1"], None, "same name"),
        (
            ["accuracy", "description"],
            None,
            "description_reward needs ask_policy, which verl's reward workers do not have",
        ),
    ],
)
def test_what_is_refused(rewards, weights, message):
    with pytest.raises(UserError, match=message):
        compute_score("any", RIGHT, "4", rewards=rewards, weights=weights)
