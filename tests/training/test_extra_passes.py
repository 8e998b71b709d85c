"""The extra passes in `cppo methods --table` are those of a step, counted in rows of the model's calls."""

import functools
import re
from collections import Counter

import pytest
import torch
from rollout_stubs import make_rows, parity_reward, step_logs, token_reward

from cppo.methods import METHODS
from cppo.reports.method_table import extra_passes

ROWS, GROUP = 2, 4
ROLLOUTS = ROWS * GROUP
DESCRIBED = "<description>3</description><info>3</info>"


def brief(reward):
    """A reward that asks the policy, with answers of a few tokens."""
    return f"{reward}{'&' if '?' in reward else '?'}max_tokens=3" if reward.startswith("description") else reward


@pytest.fixture
def one_step(make_trainer, tiny_model, monkeypatch):
    """Train a step with a method; returns the rows scored with gradient, without, and generated, and the log."""
    forward, rows = type(tiny_model).forward, Counter()

    @functools.wraps(forward)
    def counted(self, *args, **inputs):
        if inputs.get("use_cache") is False:  # scored, not generated
            rows["with gradient" if torch.is_grad_enabled() else "without"] += len(inputs["input_ids"])
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(tiny_model), "forward", counted)

    def train(method):
        given = {"perception_gate_reward": "parity_reward"} if method == "cppo-correct-gate" else {}
        own = [brief(name) for name in METHODS[method].rewards]
        data = [{**row, "facts": ["3"]} for row in make_rows([1, 2])]
        trainer = make_trainer(
            data, reward_funcs=[*own, token_reward, parity_reward], method=method, scorer="plain", **given
        )
        said = trainer.processing_class.tokenizer(DESCRIBED, add_special_tokens=False)["input_ids"]
        generate = trainer._generate_single_turn

        def described(prompt_ids, *rest):
            rows["generation of"] += len(prompt_ids)
            responses, logps = generate(prompt_ids, *rest)
            return [[*said, *ids] for ids in responses], logps

        trainer._generate_single_turn = described
        trainer.train()
        (log,) = step_logs(trainer)
        return rows, log

    return train


def expected(words, gated_in):
    """The rows of a step that the table's words mean."""
    if "each row before the first step" in words:
        return int(words.split()[0]) * ROWS
    each = gated_in if "gated-in" in words else ROLLOUTS // 2 if "clean" in words else ROLLOUTS
    return each * len(re.findall(r"\bI[-+]?(?!\w)|text-only", words))


@pytest.mark.parametrize("method", METHODS)
def test_the_table_names_what_runs(one_step, method):
    rows, log = one_step(method)
    gated_in = round(log.get("perception/gated_fraction", 0) * ROLLOUTS)
    named = {kind: expected(words, gated_in) for kind, words in extra_passes(METHODS[method]).items()}
    own = {"with gradient": ROLLOUTS, "without": 0, "generation of": ROLLOUTS}
    assert {kind: rows[kind] - own[kind] for kind in own} == named
