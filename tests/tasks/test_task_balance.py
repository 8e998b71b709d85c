"""Shares of answers: what a blind guesser can reach, and the correlation that `prior` plants in training alone."""

import re
from collections import Counter, defaultdict
from functools import lru_cache

import pytest
from scipy.stats import chi2_contingency

from cppo.tasks import TASK_NAMES, TaskOptions, make_item

SECOND_WORDINGS = ("What do ", "By how much ", "Add up ", "Count ", "Find ", "What height ")
NAMES = r"(?:top|bottom|falling|rising|left|right) (?:row|column|diagonal)|(?:top|bottom) (?:left|right)"
NAMES += r"|red|green|blue|yellow|pink|circle|square|triangle|cross"


@lru_cache
def draws(name, split, prior=0.0, level=1):
    """(kind of question without its wording's names, whether it is the second wording, answer) of 600 items."""
    options = TaskOptions(prior=prior, level=level)
    items = [make_item(name, options, seed=11, index=index, split=split) for index in range(600)]
    return [(re.sub(NAMES, "_", i.prompt), i.prompt.startswith(SECOND_WORDINGS), i.answer) for i in items]


def p_value(pairs):
    """Chi-square test of independence of the two members of the pairs (rare answers pooled)."""
    pairs = list(pairs)
    shares = Counter(answer for _, answer in pairs)
    table = Counter((side, answer if shares[answer] >= 20 else "rare") for side, answer in pairs)
    columns = sorted({answer for _, answer in table})
    return chi2_contingency([[table[side, answer] for answer in columns] for side in (False, True)]).pvalue


@pytest.mark.parametrize("name", TASK_NAMES)
def test_prior_ties_wording_to_answer_in_training_alone(name):
    tied = [(second, answer) for _, second, answer in draws(name, "train", prior=0.8)]
    free = [(second, answer) for _, second, answer in draws(name, "train")]
    test = [(second, answer) for _, second, answer in draws(name, "test")]
    assert p_value(tied) < 1e-12
    assert p_value(free) > 1e-3
    assert p_value(test) > 1e-3


@pytest.mark.parametrize("name", TASK_NAMES)
def test_test_items_are_the_same_at_every_prior(name):
    for index in range(20):
        free, tied = (make_item(name, TaskOptions(prior=p), seed=1, index=index, split="test") for p in (0, 1))
        assert (free.prompt, free.response) == (tied.prompt, tied.response)
        assert free.image.tobytes() == tied.image.tobytes()


@pytest.mark.parametrize("name", TASK_NAMES)
def test_prior_leaves_the_shares_of_wordings_and_answers_alone(name):
    tied, test = draws(name, "train", prior=0.8), draws(name, "test")
    assert p_value([(True, answer) for *_, answer in tied] + [(False, answer) for *_, answer in test]) > 1e-3
    assert 0.43 < sum(second for _, second, _ in tied) / len(tied) < 0.57


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_guesser_that_learnt_each_questions_commonest_answer_gets_at_most_a_quarter(name, level):
    learnt = defaultdict(Counter)
    for question, _, answer in draws(name, "train", level=level):
        learnt[question][answer] += 1
    test = draws(name, "test", level=level)
    right = sum(answer == learnt[question].most_common(1)[0][0] for question, _, answer in test)
    assert right / len(test) <= 0.25
