"""Shared prompts in the trainer: passes, models that cannot share, and the memory switch."""

import logging
from fractions import Fraction
from itertools import groupby

import pytest
import torch
from rollout_stubs import flat_weights, generation_batch, inject, make_rows, step_logs

from cppo.policy import unshared_reason
from cppo.training.rollouts import rollouts_a_pass, shuffled_micro_batches


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
    has_image = ["pixel_values" in images for images in batch["prompt_images"]]
    expected = 0
    for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        views = 3 if has_image[place] else 1
        # A prompt without its last token, which begins each response.
        expected += views * (response + (prompt - 1 if place % copies == 0 else 0))
    assert tokens_through_the_backbone(trainer, batch) == expected
    grids = [images["image_grid_thw"] for images in batch["prompt_images"][::copies] if "image_grid_thw" in images]
    patches = sum(grid.prod(dim=1).sum().item() for grid in grids)
    assert images_through_the_tower(trainer, batch) == 3 * patches

    unshared = inject(make_trainer(rows, perception_gate="none", scorer="kernel"))
    batch = generation_batch(unshared, rows)
    assert images_through_the_tower(unshared, batch) == 3 * patches * copies


def test_micro_batches_hold_whole_groups(make_trainer):
    rows = make_rows([1, 2, 0, 1])
    trainer = inject(make_trainer(rows, per_device_train_batch_size=4, gradient_accumulation_steps=4))
    batch = generation_batch(trainer, rows)
    torch.manual_seed(0)
    parts = shuffled_micro_batches(batch, batch["group_id"], 4)
    prompts = [part["prompt_ids"].tolist() for part in parts]
    assert all(group.count(group[0]) == 4 for group in prompts)
    groups = [batch["prompt_ids"][place].tolist() for place in range(0, 16, 4)]
    order = [groups.index(group[0]) for group in prompts]
    assert sorted(order) == [0, 1, 2, 3]
    assert order != [0, 1, 2, 3]
    for part, place in zip(parts, order, strict=True):
        assert torch.equal(part["completion_ids"], batch["completion_ids"][4 * place : 4 * place + 4])
        assert part["rollout_place"] == batch["rollout_place"][4 * place : 4 * place + 4]
        assert part["prompt_images"] == [batch["prompt_images"][4 * place]] * 4
        assert part["group_id"] == [place] * 4
        assert part["perception_num_rollouts"] == batch["perception_num_rollouts"]


@pytest.mark.parametrize("first", [0, 2, 5])
def test_parts_of_groups_stay_side_by_side(first):
    """On a process with rows that begin or end inside a group, in micro-batches that split groups."""
    rows, size = 12, 4
    group = [(first + row) // size for row in range(rows)]
    batch = {"prompt_ids": torch.arange(rows)[:, None], "label": list("abcdefghijkl"), "total": torch.tensor(3)}
    orders = set()
    for seed in range(20):
        torch.manual_seed(seed)
        parts = shuffled_micro_batches({**batch, "absent": None}, group, 3)
        assert [len(part["label"]) for part in parts] == [4, 4, 4]
        places = [place for part in parts for place in part["prompt_ids"].flatten().tolist()]
        assert sorted(places) == list(range(rows))
        assert [label for part in parts for label in part["label"]] == [batch["label"][place] for place in places]
        assert all(part["total"] == 3 and part["absent"] is None for part in parts)
        runs = [list(run) for _, run in groupby(places, key=group.__getitem__)]
        assert len(runs) == len(set(group))
        assert all(run == sorted(run) for run in runs)
        orders.add(tuple(group[run[0]] for run in runs))
    assert len(orders) > 3


def test_rows_without_groups_are_shuffled_in_trls_order():
    torch.manual_seed(5)
    parts = shuffled_micro_batches({"prompt_ids": torch.arange(6)[:, None]}, range(6), 2)
    torch.manual_seed(5)
    assert torch.cat([part["prompt_ids"] for part in parts]).flatten().tolist() == torch.randperm(6).tolist()


@pytest.mark.parametrize(
    ("rows", "group", "micro_batch", "passes"),
    [
        (40, 5, 5, 8),  # whole groups
        (40, 5, 8, 12),  # four of the eight groups are cut once
        (10, 5, 2, 6),  # two, two, one; one, two, two
        (12, 4, 8, 3),
        (6, 3, 1, 6),
    ],
)
def test_rollouts_that_share_a_pass(rows, group, micro_batch, passes):
    assert rollouts_a_pass(rows, group, micro_batch) == Fraction(rows, passes)


PUBLISHED_CUT = {
    "num_generations": 5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 5,
    "perception_normalization": "microbatch",
    "perception_weight": 1.0,
    "loss_type": "bnpo",
    "delta": 3.0,
    "beta": 0.05,
    "optim": "sgd",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 2,
    "logging_steps": 1,
}


def test_parts_of_groups_share_and_learn_the_same(make_trainer, monkeypatch):
    """Micro-batches of 8 from groups of 5, two steps of SGD in float64, against rows that share nothing."""

    def cut_alike(batch, groups, count):
        parts = shuffled_micro_batches(batch, batch["group_id"], count)
        prompts = [len({tuple(ids) for ids in part["prompt_ids"].tolist()}) for part in parts]
        assert prompts == [2, 3, 2, 3, 2]  # 12 passes for 40 rollouts, as counted above
        return parts

    monkeypatch.setattr("cppo.training.trainer.shuffled_micro_batches", cut_alike)
    rows = make_rows([1, 2, 1, 0, 1, 1, 2, 1])
    weights, logs, patches = [], [], []
    for scorer in ("shared", "plain"):
        trainer = inject(make_trainer(rows, **PUBLISHED_CUT, scorer=scorer))
        trainer.model.double()
        trainer.ref_model.double()
        before, seen = flat_weights(trainer.model), []
        trainer.model.model.visual.patch_embed.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(args[0].shape[0])
        )
        trainer.train()
        weights.append(flat_weights(trainer.model) - before)
        logs.append([(log["loss"], log["perception/cpl"], log["kl"]) for log in step_logs(trainer)])
        patches.append(sum(seen))
    assert patches[0] < 0.5 * patches[1]
    assert logs[0] == [pytest.approx(log, rel=1e-5) for log in logs[1]]
    assert logs[1][1][2] > 0
    assert (weights[0] - weights[1]).norm() <= 1e-5 * weights[1].norm()


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
    monkeypatch.setattr("cppo.training.fit.unshared_reason", lambda config: reason)
    with caplog.at_level(logging.WARNING, logger="cppo.training.setup"):
        trainer = inject(make_trainer(make_rows([1, 0]), max_steps=1))
    line = f"rollouts and updates do not share prompts and images in a group: {reason}"
    assert [record.getMessage() for record in caplog.records] == trainer.fallbacks == [line]
    trainer.train()
    assert not trainer._shares_prompts
    assert unshared_reason(trainer.model.config) is None
