"""Several views of part of a batch in one forward: joint or one after another, every token or the selected ones."""

import functools
from typing import Any

import pytest
import torch
from test_packed_parity import assert_same_gradients, gradients, oracle
from tiny_models import make_batch, make_model

from cppo.errors import UserError
from cppo.policy import PromptGroup, add_shared_prompt_forward, pack, prompt_groups

GATED = [0, 3, 4, 8]
"""Rows of several prompts, no prompt complete."""


def view_groups(config: Any, batch: Any, rows: list[int]) -> list[PromptGroup]:
    groups = batch.groups(config)
    kept = [([row for row in group.rollouts if row in rows], group.vision) for group in groups]
    return [PromptGroup(found, vision) for found, vision in kept if found]


def packed_views(model: Any, family: str, sequential: bool) -> tuple[Any, Any, Any]:
    anchor, removing = make_batch(family), make_batch(family, view=1)
    views = {
        "anchor": view_groups(model.config, anchor, list(range(10))),
        "removing": view_groups(model.config, removing, GATED),
    }
    batch = pack(model, anchor.input_ids, anchor.attention_mask, anchor.num_response_tokens, views, sequential)
    return anchor, removing, batch


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_selected_tokens_of_a_view(family, sequential, checkpointing):
    """The anchor decides inside the forward which tokens of the view are scored."""
    model = make_model(family)
    add_shared_prompt_forward(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    anchor, removing, batch = packed_views(model, family, sequential)
    assert len(batch.passes) == (2 if sequential else 1)

    def readout(hidden, head):
        first = batch.tokens["anchor"]
        logps, _ = head.scores(hidden[first], batch.targets[first], 0.7)
        picked = batch.places("removing", batch.unpack(first, logps) < logps.median())
        view, _ = head.scores(hidden[picked], batch.targets[picked], 0.7)
        at = logps[batch.counterparts("anchor", picked)]
        return {"logps": batch.unpack(first, logps), "view": view, "at": at}

    found = model(shared_prompt=batch, readout=readout)
    (found["logps"].sum() + ((found["at"] - found["view"]) ** 2).sum()).backward()
    found_gradients = gradients(model)

    mask = anchor.response_mask
    logps = oracle(model, anchor).logps.masked_fill(~mask, 0.0)
    gated = torch.zeros(10, 1, dtype=torch.bool).index_fill(0, torch.tensor(GATED), True)
    picked = (logps < logps[mask].median()) & mask & gated
    view = oracle(model, removing).logps
    torch.testing.assert_close(found["logps"], logps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["view"].sort()[0], view[picked].sort()[0], rtol=1e-9, atol=1e-9)
    assert 0 < len(found["view"]) < int(mask[GATED].sum())
    (logps.sum() + ((logps - view)[picked] ** 2).sum()).backward()
    assert_same_gradients(found_gradients, gradients(model), 1e-6)


def test_sequential_passes_keep_less():
    """Between forward and backward only one pass's inputs are held, no layer's activations."""
    kept = {}
    for sequential in (False, True):
        model = make_model("qwen2_5_vl")
        add_shared_prompt_forward(model)
        _, _, batch = packed_views(model, "qwen2_5_vl", sequential)
        tensors = []
        keep = functools.partial(remember, tensors)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(shared_prompt=batch, readout=lambda hidden, head: {"sum": hidden.sum()})
        kept[sequential] = sum(tensors)
    assert kept[True] < kept[False] / 10


def remember(sizes: list[int], tensor: torch.Tensor) -> torch.Tensor:
    sizes.append(tensor.numel())
    return tensor


def test_groups_are_rows_with_one_id_in_order_of_appearance():
    images = [{"pixel_values": torch.full((1,), float(row))} for row in range(5)]
    groups = prompt_groups([7, -3, 7, 0, -3], images)
    assert [group.rollouts for group in groups] == [[0, 2], [1, 4], [3]]
    assert [group.vision["pixel_values"].item() for group in groups] == [0, 1, 3]


def test_an_empty_prompt_is_an_error():
    model = make_model("llava")
    ids, mask = torch.ones(1, 4, dtype=torch.long), torch.tensor([[0, 0, 1, 1]])
    with pytest.raises(UserError, match="row 0 of the batch has an empty prompt"):
        pack(model, ids, mask, 2, {"anchor": [PromptGroup([0], {})]})
