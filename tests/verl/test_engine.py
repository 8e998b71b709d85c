"""One step of verl's engine on the injected rollouts: one loss however it is cut, and the trainer's."""

import math

import engine
import pytest
from injected import METHODS

CUTS = {
    "dynamic": {},
    "static": {"dynamic": False},
    "one micro-batch": {"tokens": 100_000},
    "packed": {"packed": True},
}
"""Ways to cut a mini-batch of one process, or of two."""
CASES = {
    **CUTS,
    "verl's own": {"options": None},
    "weight of nearly 0": {"options": {"perception_weight": 1e-12}},
    "two steps": {"mini_batches": 2},
    **{f"method {name}": {"options": {"method": name, **given}} for name, given in METHODS.items()},
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return engine.run(tmp_path_factory.mktemp("one"), CASES, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return engine.run(tmp_path_factory.mktemp("two"), {**CUTS, "ulysses": {"packed": True, "parallel": 2}}, 2)


def number(result, name):
    (value,) = result["metrics"][name]
    return value


def test_one_loss_however_it_is_cut(one, two):
    results = [one[name] for name in CUTS] + list(two.values())
    for name in ("loss", "grad_norm", "perception/cpl"):
        found = [number(result, name) for result in results]
        assert found == pytest.approx([found[0]] * len(found), rel=1e-5, abs=1e-6), name
    assert all(result["selected"] == results[0]["selected"] for result in results)


def test_without_weight_it_is_verls_own_step(one):
    own, ours = one["verl's own"], one["weight of nearly 0"]
    for name in ("loss", "grad_norm"):
        assert number(ours, name) == pytest.approx(number(own, name), rel=1e-5, abs=1e-6)
    assert not math.isnan(number(ours, "perception/cpl"))
