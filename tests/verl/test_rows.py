"""The rows of a mini-batch with its views, and the gate of an update, by brute force over small batches."""

import itertools

import pytest
import torch
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from cppo.errors import UserError
from cppo.verl.gate import Candidates, equal_groups, rollout_weights
from cppo.verl.options import options_from
from cppo.verl.rows import ANCHOR, FILLER, LONE, ROLE, count_groups, lay_out, with_views


@pytest.mark.parametrize("size", [2, 3])
def test_every_rollout_has_its_rows_side_by_side_and_nothing_else_is_added(size):
    for gate in itertools.product((False, True), repeat=6):
        least = count_groups(gate, size)
        assert least == sum(gate) + -(-gate.count(False) // size)
        for groups in (least, least + 2):
            layout = lay_out(gate, size, groups, filler=4)
            assert len(layout.sources) == len(layout.roles) == groups * size
            rows = list(zip(layout.sources, layout.roles, strict=True))
            for row, passes in enumerate(gate):
                places = [place for place, (source, role) in enumerate(rows) if source == row and role != FILLER]
                if passes:
                    assert places == list(range(places[0], places[0] + size))
                    assert places[0] % size == 0
                    assert [rows[place][1] for place in places] == list(range(size))
                else:
                    assert [rows[place][1] for place in places] == [LONE]
            assert {source for source, role in rows if role == FILLER} <= {4}


def batch(rows):
    """Rows of (uid, reward, advantage, tokens); where it is -1, the last token is not the model's own."""
    return list_of_dict_to_tensordict(
        [
            {
                "uid": uid,
                "input_ids": torch.arange(tokens + 2),
                "response_mask": torch.ones(tokens, dtype=torch.long),
                "loss_mask": torch.ones(tokens, dtype=torch.long),
                "advantages": torch.full((tokens,), advantage),
                "rm_scores": torch.tensor([0.0] * (tokens - 1) + [reward]),
                "multi_modal_inputs": {"pixel_values": torch.full((1,), float(place)), "image_grid_thw": place},
                "extra_fields": {"reward_extra_info": {"accuracy_reward": reward > 0.5}},
            }
            for place, (uid, reward, advantage, tokens) in enumerate(rows)
        ]
    )


ROWS = [("a", 1.0, 0.9, 3), ("a", 0.0, -0.9, 4), ("b", 0.9, 6e-4, 2), ("b", 0.9, 6e-4, 5), ("c", 0.2, 0.3, 2)]


def test_views_rows_have_their_own_pixels_and_are_outside_verls_loss():
    data, gate = batch(ROWS), [True, False, False, False, True]
    views = {
        row: {kind: {"pixel_values": torch.tensor([100.0 * sign + row])} for kind, sign in (("removing", 1), ("x", 2))}
        for row in (0, 4)
    }
    laid = with_views(data, lay_out(gate, 3, 4, filler=2), ("removing", "x"), views)
    pixels = [float(inputs["pixel_values"]) for inputs in laid["multi_modal_inputs"]]
    assert pixels == [0.0, 100.0, 200.0, 4.0, 104.0, 204.0, 1.0, 2.0, 3.0, 2.0, 2.0, 2.0]
    assert [inputs["image_grid_thw"] for inputs in laid["multi_modal_inputs"]][:6] == [0, 0, 0, 4, 4, 4]
    for name in ("response_mask", "loss_mask"):
        kept = [bool(row.any()) for row in laid[name].unbind()]
        assert kept == [role in (ANCHOR, LONE) for role in laid[ROLE].tolist()]
        assert laid[name].values().sum() == sum(tokens for *_, tokens in ROWS)
    assert data["response_mask"].values().sum() == sum(tokens for *_, tokens in ROWS)


def weights(rows, eligible, **given):
    options = options_from(given)
    own = Candidates.of(batch(rows), eligible, options)
    return rollout_weights(own, equal_groups(zip(own.uids, own.rewards, strict=True)), options).tolist()


def test_a_group_of_equal_rewards_is_gated_out_and_one_rollout_is_no_group():
    everything = [True] * 5
    assert weights(ROWS, everything) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert weights(ROWS, [False, True, True, True, True]) == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert weights(ROWS, everything, perception_gate="none") == [1.0] * 5
    assert weights(ROWS, everything, perception_weighting="advantage") == pytest.approx([0.9, 0.0, 0.0, 0.0, 0.3])
    correct = {"perception_gate": "correct", "perception_gate_reward": "accuracy_reward"}
    assert weights(ROWS, everything, **correct) == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_equal_groups_take_the_rewards_of_all_ranks():
    ranks = [[("a", 0.9), ("b", 0.1)], [("a", 0.9), ("b", 0.2)]]
    assert equal_groups(pair for rank in ranks for pair in rank) == {"a"}
    assert equal_groups(ranks[0]) == set()


def test_what_the_gate_cannot_use_is_refused_in_one_line():
    data = batch(ROWS)
    options = options_from({})
    tokens = [row.clone() for row in data["advantages"].unbind()]
    tokens[0][1] += 0.5
    data["advantages"] = torch.nested.as_nested_tensor(tokens, layout=torch.jagged)
    with pytest.raises(
        UserError, match=r"the tokens of one have different advantages: choose algorithm.adv_estimator=grpo"
    ):
        Candidates.of(data, [True] * 5, options)
    named = options_from({"perception_gate": "correct", "perception_gate_reward": "exact_reward"})
    with pytest.raises(UserError, match=r"reports no such value \(it reports: accuracy_reward\)"):
        Candidates.of(data, [True] * 5, named)
