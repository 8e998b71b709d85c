"""One step of verl's engine on the injected rollouts: one loss for every split, equal to the trainer's."""

import math

import engine
import pytest
import reference
from injected import METHODS, read

CUTS = {
    "dynamic": {},
    "static": {"dynamic": False},
    "one micro-batch": {"tokens": 100_000},
    "packed": {"packed": True},
}
"""Ways to split a mini-batch of one process, or of two."""
PAPO = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 3.0, "entropy_coeff": -0.05}
"""The options of TRL's that `papo` sets, in verl's terms."""
ACTOR = {"papo": PAPO, "papo-3b": {**PAPO, "entropy_coeff": 0.0}}
CASES = {
    **CUTS,
    "verl's own": {"options": None},
    "weight of nearly 0": {"options": {"perception_weight": 1e-12}},
    "two steps": {"mini_batches": 2},
    "verl's own two steps": {"options": None, "mini_batches": 2},
    "papo, static": {"options": {"method": "papo"}, "dynamic": False, "actor": PAPO},
    "random tokens": {"options": {"method": "cppo-random-tokens"}},
    "short budget": {"tokens": 150},
    "plain entropies": {"engine": {"entropy_from_logits_with_chunking": False}},
    "bfloat16 with padding": {"precision": "bf16"},
    **{
        f"method {name}": {"options": {"method": name, **given}, "actor": ACTOR.get(name, {})}
        for name, given in METHODS.items()
    },
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return engine.run(tmp_path_factory.mktemp("one"), CASES, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return engine.run(
        tmp_path_factory.mktemp("two"),
        {**CUTS, "ulysses": {"packed": True, "parallel": 2}, "papo": CASES["method papo"]},
        2,
    )


@pytest.fixture(scope="module")
def per_rollout():
    return reference.perception(read()[0])


def number(result, name):
    (value,) = result["metrics"][name]
    return value


def test_one_loss_however_it_is_cut(one, two):
    results = [one[name] for name in CUTS] + [two[name] for name in (*CUTS, "ulysses")]
    for name in ("loss", "grad_norm", "perception/cpl"):
        found = [number(result, name) for result in results]
        assert found == pytest.approx([found[0]] * len(found), rel=1e-5, abs=1e-6), name
    assert all(result["selected"] == results[0]["selected"] for result in results)


def test_without_weight_it_is_verls_own_step(one):
    own, ours = one["verl's own"], one["weight of nearly 0"]
    for name in ("loss", "grad_norm"):
        assert number(ours, name) == pytest.approx(number(own, name), rel=1e-5, abs=1e-6)
    assert not math.isnan(number(ours, "perception/cpl"))


def test_it_is_the_loss_of_a_plain_model_row_by_row(one, per_rollout):
    losses, selected = per_rollout
    term = sum(losses.values()) / len(losses)
    assert {name: tokens for name, tokens in one["dynamic"]["selected"].items() if tokens} == selected
    assert number(one["dynamic"], "loss") - number(one["verl's own"], "loss") == pytest.approx(term, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_trainers_loss(one, method):
    _, trainers = read()
    found, result = trainers[method], one[f"method {method}"]
    assert number(result, "loss") == pytest.approx(found.loss, abs=1e-6)
    if method not in ACTOR:
        term = number(result, "loss") - number(one["verl's own"], "loss")
        assert term == pytest.approx(found.term, abs=1e-6)
    selected = {
        f"uid-{row // 4}/{row % 4}": mask.nonzero().squeeze(1).tolist()
        for row, mask in enumerate(found.selected)
        if found.weights[row]
    }
    assert result["selected"] == selected


def test_views_are_scored_once_where_the_method_says_so(one, two):
    for result in (one["papo, static"], two["papo"]):
        assert number(result, "loss") == pytest.approx(number(one["method papo"], "loss"), abs=1e-6)
        assert result["selected"] == one["method papo"]["selected"]


def test_the_steps_of_an_update_divide_by_equal_shares_of_its_gated_in_rollouts(one, per_rollout):
    """The first of two steps trains on the first half of the rollouts."""
    ours, own = (one[name]["metrics"]["loss"][0] for name in ("two steps", "verl's own two steps"))
    first = sum(loss for name, loss in per_rollout[0].items() if name.startswith(("uid-0/", "uid-1/")))
    assert ours - own == pytest.approx(first / (len(per_rollout[0]) / 2), abs=1e-6)
    assert 0 < first < sum(per_rollout[0].values())


def test_random_tokens_are_as_many_as_the_published_rule_selects(one):
    drawn, published = one["random tokens"]["selected"], one["dynamic"]["selected"]
    assert {name: len(tokens) for name, tokens in drawn.items()} == {name: len(t) for name, t in published.items()}
    assert drawn != published


def test_what_cannot_run_is_refused_in_one_line(one):
    groups, _ = read()
    longest = max(len(group.prompt) + len(response) for group in groups for response in group.responses)
    assert one["short budget"]["refused"] == (
        f"a rollout and its views are 3 rows, of up to {longest} tokens each: set "
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu to at least {3 * longest} (now 150)"
    )
    assert "entropy_from_logits_with_chunking=true" in one["plain entropies"]["refused"]
    assert "use_remove_padding=true" in one["bfloat16 with padding"]["refused"]
