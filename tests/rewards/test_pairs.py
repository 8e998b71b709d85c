"""Every pair of the table that was judged by hand, by the reward as a run calls it."""

from pathlib import Path

import pytest

from cppo.rewards import answers_match, get_accuracy_reward
from cppo.rewards.worker import shared_pool

TABLE = Path(__file__).with_name("pairs.tsv")


def read_table() -> dict[str, list[list[str]]]:
    """The rows under each heading, `KIND: how they are judged`."""
    table: dict[str, list[list[str]]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## ") and "\t" not in line:
            rows = table.setdefault(line.removeprefix("## "), [])
        elif line and not line.startswith("# "):
            rows.append(line.split("\t"))
    return table


@pytest.fixture(scope="module", autouse=True)
def _close_workers():
    yield
    shared_pool().close()


@pytest.mark.parametrize(("kind", "rows"), read_table().items(), ids=list(read_table()))
def test_pairs(kind, rows):
    how = kind.partition(": ")[2]
    assert how in ("answers", "tolerant", "responses")
    assert {verdict for _, _, verdict, *_ in rows} == {"right", "wrong"}
    reward = get_accuracy_reward(0.01 if how == "tolerant" else 0.0, budget=600.0)
    texts = [given if how == "responses" else rf"<think>so</think> \boxed{{{given}}}" for _, given, *_ in rows]
    answers = [expected.replace(r"\n#", "\n#") for expected, *_ in rows]
    verdicts = reward(texts, answer=answers, choices=[row[3:] or None for row in rows])
    wrong = [row for row, verdict in zip(rows, verdicts, strict=True) if (verdict == 1.0) != (row[2] == "right")]
    assert not wrong


def test_wrapped_answers_of_any_length_and_kind():
    assert answers_match("6", "because " * 2000 + "\n#### 6")
    reward = get_accuracy_reward()
    texts = [r"\boxed{gray}", r"\boxed{A, C}", r"\boxed{A}", r"\boxed{2.0}"]
    assert reward(texts, answer=[["grey", "gray"], ("A", "C"), ["A", "C"], [1, 2]]) == [1.0, 1.0, 0.0, 1.0]
