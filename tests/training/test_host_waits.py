"""A micro-batch waits for a GPU a bounded number of times, for any content."""

import copy

import pytest
import torch
from host_waits import HostWaits
from rollout_stubs import generation_batch, inject, make_rows

from cppo.policy import vision_tower as tower_module
from cppo.policy.vision_tower import attend_at_once

BOUNDS = {"cppo/": 3, "trl/": 10, "transformers/": 11}
"""CPPO's: the selected tokens under each view, and a check that TRL asks for the scored rollouts. TRL's: its metrics.
transformers': 3 in each layer of the vision tower, and 8 reads of the images' layout.
"""


def waits_of(make_trainer, images, **options):
    rows = make_rows(images)
    options = {"per_device_train_batch_size": 4 * len(images), "perception_gate": "none", **options}
    trainer = inject(make_trainer(rows, **options))
    trainer.model.train()
    with HostWaits() as waits:
        batch = generation_batch(trainer, rows)
        waits.places.clear()
        assert all(value.on_host for inputs in batch["prompt_images"] for value in inputs.values())
        seen = []
        trainer.model.model.visual.register_forward_pre_hook(lambda _, args: seen.append(hasattr(args[0], "on_host")))
        trainer._compute_loss(trainer.model, batch).backward()
        assert set(seen) == {False}  # the vision tower has them on the trainer's device
        trainer._keep_samples()
    assert len(trainer.last_samples) == 4
    return waits


@pytest.mark.parametrize("images", [[1], [1, 1, 1, 1], [2, 0, 1]], ids=["a group", "four groups", "mixed rows"])
def test_a_micro_batch_waits_as_often_however_many_groups_it_holds(make_trainer, images):
    waits = waits_of(make_trainer, images)
    assert {part for part, most in BOUNDS.items() if waits.of(part) > most} == set()
    assert waits.of("cppo/policy/packing.py") == waits.of("places")
    assert sum(waits.places.values()) == sum(waits.of(part) for part in BOUNDS)


def test_a_reference_model_adds_one_wait(make_trainer):
    """TRL logs the KL divergence from it."""
    assert waits_of(make_trainer, [1], beta=0.1).of("trl/") == waits_of(make_trainer, [1]).of("trl/") + 1


def test_a_tower_with_one_call_per_layer_waits_twice_at_any_depth(tiny_model):
    model = copy.deepcopy(tiny_model)
    attend_at_once(model)
    tower, grid = model.model.visual, torch.tensor([[1, 4, 4], [1, 4, 6]])
    tower.blocks.extend(copy.deepcopy(tower.blocks[0]) for _ in range(2))
    pixels = torch.zeros(int(grid.prod(dim=1).sum()), tower.patch_embed.proj.weight[0].numel())
    with pytest.MonkeyPatch.context() as patch, HostWaits() as waits:
        patch.setattr(tower_module, "no_varlen_reason", lambda *query: None)
        patch.setattr(tower_module, "varlen_attention", lambda query, *others, causal: query)
        tower(pixels, grid_thw=grid)
    assert waits.of("transformers/utils/generic.py") == 2  # the longest window, and the longest image
    assert waits.of("modeling_qwen2_5_vl.py") == 0
    assert waits.of("cppo/") == 0


def test_what_counts_as_a_wait():
    mask = torch.tensor([True, False])
    with HostWaits() as waits:
        mask.any().item(), bool(mask.any()), mask.tolist(), mask.nonzero(), mask[mask], torch.equal(mask, mask)
        assert sum(waits.places.values()) == 6
        host = mask.cpu()
        assert sum(waits.places.values()) == 7
        host.tolist(), host[host], bool(host.any()), torch.arange(2).tolist()
        assert sum(waits.places.values()) == 7
        there = torch.arange(2).to(mask.device)
        there.tolist(), torch.arange(2, device=mask.device).tolist()
    assert sum(waits.places.values()) == 9
