"""Shared prompts in the trainer: what runs, what a model that cannot share does, and the memory switch."""

import logging

import pytest
import torch
from rollout_stubs import generation_batch, inject, make_rows

from cppo.policy import unshared_reason
from cppo.training.group_shuffle import shuffled_micro_batches


def gradient(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def tokens_through_the_backbone(trainer, batch):
    """Tokens that the text model sees in one update, counted by a hook on its first layer."""
    seen = []
    layer = trainer.model.model.language_model.layers[0]
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0] * args[0].shape[1]))
    gradient(trainer, batch)
    hook.remove()
    return sum(seen)


def images_through_the_tower(trainer, batch):
    """Image patches that the vision tower sees in one update."""
    seen = []
    hook = trainer.model.model.visual.patch_embed.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[0])
    )
    gradient(trainer, batch)
    hook.remove()
    return sum(seen)


def test_each_prompt_and_image_once_a_group_and_view(make_trainer):
    rows = make_rows([1, 2, 0, 1])
    trainer = inject(make_trainer(rows, perception_gate="none"))
    batch = generation_batch(trainer, rows)
    prompts = batch["prompt_mask"].sum(dim=1).tolist()
    responses = batch["completion_mask"].sum(dim=1).tolist()
    copies = len(prompts) // len(rows)
    has_image = [count > 0 for count in batch["num_images"]]
    expected = 0
    for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        views = 3 if has_image[place] else 1
        # A prompt less its last token, which each response begins with.
        expected += views * (response + (prompt - 1 if place % copies == 0 else 0))
    assert tokens_through_the_backbone(trainer, batch) == expected
    patches = batch["image_grid_thw"].prod(dim=1).sum().item() // copies
    assert images_through_the_tower(trainer, batch) == 3 * patches

    unshared = inject(make_trainer(rows, perception_gate="none", scorer="kernel"))
    batch = generation_batch(unshared, rows)
    assert images_through_the_tower(unshared, batch) == 3 * patches * copies


def test_micro_batches_hold_whole_groups(make_trainer):
    rows = make_rows([1, 2, 0, 1])
    trainer = inject(make_trainer(rows, per_device_train_batch_size=4, gradient_accumulation_steps=4))
    batch = generation_batch(trainer, rows)
    torch.manual_seed(0)
    parts = shuffled_micro_batches(batch, 4, 4)
    prompts = [part["prompt_ids"].tolist() for part in parts]
    assert all(group.count(group[0]) == 4 for group in prompts)
    groups = [batch["prompt_ids"][place].tolist() for place in range(0, 16, 4)]
    order = [groups.index(group[0]) for group in prompts]
    assert sorted(order) == [0, 1, 2, 3]
    assert order != [0, 1, 2, 3]
    for part, place in zip(parts, order, strict=True):
        assert torch.equal(part["completion_ids"], batch["completion_ids"][4 * place : 4 * place + 4])
        assert part["rollout_place"] == batch["rollout_place"][4 * place : 4 * place + 4]
        assert part["num_images"] == [len(rows[place]["images"])] * 4
        patches = part["image_grid_thw"].prod(dim=1).sum().item() if rows[place]["images"] else 0
        assert part["pixel_values"].shape[0] == patches
        assert part["perception_num_rollouts"] == batch["perception_num_rollouts"]


def test_rows_that_are_no_multiple_of_the_group_are_shuffled_one_by_one():
    batch = {"prompt_ids": torch.arange(6)[:, None], "label": list("abcdef"), "total": torch.tensor(3), "absent": None}
    torch.manual_seed(0)
    parts = shuffled_micro_batches(batch, 4, 2)
    places = [place for part in parts for place in part["prompt_ids"].flatten().tolist()]
    assert sorted(places) == list(range(6))
    assert [label for part in parts for label in part["label"]] == ["abcdef"[place] for place in places]
    assert all(part["total"] == 3 and part["absent"] is None for part in parts)


@pytest.mark.parametrize(
    "options", [{}, {"perception_divergence": "js", "perception_score": "kl"}], ids=["k3", "exact"]
)
def test_one_view_after_another_gives_the_same_gradient(make_trainer, options):
    rows = make_rows([1, 2, 0, 1])
    results = []
    for memory in ("joint", "sequential"):
        trainer = inject(make_trainer(rows, perception_memory=memory, perception_weight=1.0, **options))
        trainer.model.double()
        results.append(gradient(trainer, generation_batch(trainer, rows)))
    (joint_loss, joint), (loss, sequential) = results
    assert loss == pytest.approx(joint_loss, abs=1e-6)
    assert (sequential - joint).norm() <= 1e-5 * joint.norm()


def test_views_without_gradients_take_no_backward_pass(make_trainer):
    rows = make_rows([1, 2])
    trainer = inject(make_trainer(rows, perception_view_gradients=False, perception_weight=1.0))
    ran, back = [], []
    layer = trainer.model.model.language_model.layers[0]
    layer.register_forward_hook(lambda module, args, output: ran.append(args[0].shape[1]))
    layer.register_full_backward_hook(lambda module, into, out: back.append(out[0].shape[1]))
    gradient(trainer, generation_batch(trainer, rows))
    assert len(ran) == 2  # the image; both views together
    assert back == ran[:1]


def test_a_model_that_cannot_share_says_why_and_trains(make_trainer, caplog, monkeypatch):
    reason = "its text part attends through a sliding window"
    monkeypatch.setattr("cppo.training.setup.unshared_reason", lambda config: reason)
    with caplog.at_level(logging.WARNING, logger="cppo.training.setup"):
        trainer = inject(make_trainer(make_rows([1, 0]), max_steps=1))
    assert [record.getMessage() for record in caplog.records] == [
        f"Prompts and images are not shared over a group's rollouts: {reason}."
    ]
    trainer.train()
    assert not trainer._shares_prompts
    assert unshared_reason(trainer.model.config) is None
