"""The methods that run inside verl, and why the others do not; decided without torch's engines and verl."""

import pytest

from cppo.errors import UserError
from cppo.methods import METHODS
from cppo.verl.options import NOT_OURS, WHERE, options_from

GATE = {"cppo-correct-gate": {"perception_gate_reward": "accuracy_reward"}}
WITHOUT_TERM = {"grpo", "dapo", "perception-r1", "vision-sr1"}
REASONS = {
    "rollout_views": {"grpo+views", "noisyrollout", "saei"},
    "is inside the model": {"pgpo", "tor", "cfpo"},
    "changes the model's inputs": {"vepo"},
    "shapes advantages": {"vppo", "mssr", "pepo", "vgpo", "prpo"},
    "needs logits": {"dvrp", "cppo-kl", "cppo-js"},
    "needs logits, but inside": {"cppo-score-kl", "cppo-score-js", "cppo-static-js", "cppo-likelihood"},
    "needs advantages": {"sent"},
    "change weights by the step": {"visionary-r1"},
    "asks the policy": {"vision-sr1-two-advantages"},
}
REFUSED = {method: reason for reason, methods in REASONS.items() for method in methods}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_or_is_refused_with_its_reason(method):
    given = {"method": method, **GATE.get(method, {})}
    if method in REFUSED:
        with pytest.raises(UserError, match=REFUSED[method]) as refused:
            options_from(given)
        assert str(refused.value).startswith(f"{WHERE}: method = {method!r} cannot run inside verl: ")
        assert "\n" not in str(refused.value)
        return
    options = options_from(given)
    assert (options.kinds == ()) == (method in WITHOUT_TERM)
    for name, value in METHODS[method].options.items():
        assert getattr(options, name, value) == value


def test_a_given_value_wins_over_the_methods():
    options = options_from({"method": "cppo-async", "perception_weight": "0.5", "seed": 7, "view_threads": 3})
    assert (options.perception_weight, options.perception_divergence, options.seed) == (0.5, "k1", 7)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"perception_wieght": 0.1}, r"custom.cppo: unknown option `perception_wieght`; did you mean `perception_w"),
        ({"learning_rate": 1e-6}, "unknown option `learning_rate`"),
        ({"scorer": "plain"}, "`scorer` sets how TRL's trainer computes, but verl computes here: leave it out"),
        ({"method": "cpo"}, "did you mean `cppo`"),
        ({"perception_weight": "much"}, "custom.cppo: perception_weight: expected a number, got 'much'"),
        ({"perception_gate": "correct"}, "needs perception_gate_reward"),
        ({"perception_normalization": "token"}, "needs the selected tokens of a step before its first update"),
        ({"perception_normalization": "microbatch"}, "would depend on verl's mini-batches"),
        ({"perception_selector_scope": "batch"}, "would depend on verl's mini-batches"),
        ({"perception_rollouts_per_group": 2}, "draws from whole groups"),
        ({"schedules": ["perception_weight=linear"]}, "change weights by the step"),
        ({"removing_views": ["fog"]}, "removing_views"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(given, says):
    with pytest.raises(UserError, match=says) as refused:
        options_from(given)
    assert "\n" not in str(refused.value)


def test_options_of_execution_alone_are_none_of_a_method():
    assert "scorer" in NOT_OURS
    assert "view_threads" not in NOT_OURS
    assert options_from(None) == options_from({})
