"""The gated-in rollouts, banned tokens, and the forms of images in a row."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from PIL import Image
from rollout_stubs import (
    generation_batch,
    inject,
    make_rows,
    picture,
    step_logs,
    token_reward,
)
from transformers import AutoProcessor

from cppo.training.fit import ban_vision_placeholders
from cppo.training.rollouts import GenerationBatch
from cppo.training.trainer import CPPOTrainer
from cppo.views import load_rgb


def test_rows_whose_prompt_an_environment_brings_stay_as_they_are():
    rows = [{"task": 1}, {"task": 1}]
    batch = GenerationBatch.of(rows, 0, 2, alone=True)
    assert batch.rows == rows
    assert len(set(batch.group_ids)) == 2


def test_gates_on_groups_that_are_all_wrong_or_half_right(make_trainer):
    """Row 0: all wrong, half of them well formed; row 1: half right, all badly formed."""

    def accuracy(answer, **kwargs):
        return [float(row == "1" and place % 2) for place, row in enumerate(answer)]

    def formatted(answer, **kwargs):
        return [float(row == "0" and place % 2) for place, row in enumerate(answer)]

    rows = make_rows([1, 1])
    options = {"reward_funcs": [accuracy, formatted], "reward_weights": [0.9, 0.1]}
    expected = {
        "advantage": [False, True] * 4,
        "correct": [False] * 4 + [False, True] * 2,
        "none": [True] * 8,
    }
    for gate, open_for in expected.items():
        trainer = inject(make_trainer(rows, perception_gate=gate, perception_gate_reward="accuracy", **options))
        batch = generation_batch(trainer, rows)
        assert [view is not None for view in batch["perception_views"]] == open_for
        assert batch["perception_num_rollouts"].item() == sum(open_for)
        assert trainer._metrics["train"]["perception/gated_fraction"] == [sum(open_for) / 8]


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize(("group", "reward"), [(12, 0.9), (3, 0.9), (8, 0.7), (7, 0.3), (8, 50.7)])
def test_a_group_of_equal_rewards_has_no_advantage(make_trainer, scale_rewards, group, reward):
    """The float32 mean of 12 rewards of 0.9 is slightly below 0.9; no rollout is a success."""

    def equal(completions, **kwargs):
        return [reward] * len(completions)

    rows = make_rows([1])
    options = {"per_device_train_batch_size": group, "num_generations": group, "scale_rewards": scale_rewards}
    trainer = inject(make_trainer(rows, reward_funcs=equal, **options))
    assert not any(generation_batch(trainer, rows)["perception_views"])


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_a_small_lead_is_an_advantage(make_trainer, scale_rewards):
    def nearly(completions, **kwargs):
        return [0.9 + 0.001 * (place == 2) for place in range(len(completions))]

    rows = make_rows([1])
    trainer = inject(make_trainer(rows, reward_funcs=nearly, scale_rewards=scale_rewards))
    views = generation_batch(trainer, rows)["perception_views"]
    assert [view is not None for view in views] == [False, False, True, False]


def test_a_step_without_gated_rollouts_trains_on(make_trainer):
    trainer = inject(make_trainer(make_rows([0, 0]), perception_gate="none", max_steps=2))
    trainer.train()
    assert [log["perception/gated_fraction"] for log in step_logs(trainer)] == [0.0, 0.0]
    assert all(log["perception/cpl"] is None for log in step_logs(trainer))


def test_vision_placeholders_are_never_sampled(make_trainer, tiny_model):
    """A head that always prefers "image" gives other tokens until the ban is lifted."""
    sampled = []

    def remember(completion_ids, **kwargs):
        sampled.extend(completion_ids)
        return [float(len(sampled) + place) for place in range(len(completion_ids))]

    model = copy.deepcopy(tiny_model)
    vocabulary = AutoProcessor.from_pretrained(tiny_model.config.name_or_path).tokenizer.get_vocab()
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    banned = {vocabulary[name] for name in names}

    def favour(module, args, output):
        output[..., sorted(banned)] += 100.0
        return output

    model.lm_head.register_forward_hook(favour)
    rows = make_rows([1, 1])
    own = vocabulary["<|im_start|>"]
    trainer = make_trainer(rows, model=model, reward_funcs=remember, generation_kwargs={"suppress_tokens": [own]})
    trainer.train()
    assert len(sampled) == 8
    assert not {token for ids in sampled for token in ids} & {*banned, own}
    trainer.generation_config.suppress_tokens = trainer.generation_kwargs["suppress_tokens"] = None
    sampled.clear()
    prompts = trainer._tokenize_prompts([[{"role": "user", "content": "What?"}]] * 4)
    completions, _ = trainer._generate_single_turn(*prompts, 4)
    assert {token for ids in completions for token in ids} <= banned


def test_vllm_never_samples_vision_placeholders(make_trainer):
    trainer = make_trainer(make_rows([1, 1]))
    placeholders = trainer._placeholder_ids
    trainer.use_vllm = True
    trainer.vllm_generation = SimpleNamespace(generation_kwargs={"seed": 1, "logit_bias": {9: 2.0}})
    assert ban_vision_placeholders(trainer) == placeholders
    bias = {**dict.fromkeys(placeholders, -100.0), 9: 2.0}
    assert trainer.vllm_generation.generation_kwargs == {"seed": 1, "logit_bias": bias}
    assert trainer.model.config.image_token_id in placeholders


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_sharing_prefills_once_a_group_and_samples_the_same(make_trainer, options):
    rows = make_rows([1, 2, 0, 1])
    found = []
    for scorer in ("shared", "kernel"):
        trainer = make_trainer(rows, scorer=scorer, num_generations=4, **options)
        trainer.model.double()
        seen = []
        trainer.model.model.language_model.layers[0].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(args[0].shape[0])
        )
        torch.manual_seed(11)
        batch = generation_batch(trainer, rows)
        found.append((seen[0], batch["completion_ids"], batch["completion_mask"]))
    (shared_prompts, *shared), (prompts, *plain) = found
    assert (shared_prompts, prompts) == (4, 16)
    assert all(torch.equal(one, other) for one, other in zip(shared, plain, strict=True))
    assert len({tuple(ids) for ids in plain[0].tolist()}) == 16


@pytest.mark.parametrize("scorer", ["shared", "kernel"])
def test_rollouts_a_few_at_a_time(make_trainer, scorer):
    rows, found = make_rows([1, 2, 0, 1]), []
    for size in (None, 6):
        trainer = make_trainer(rows, scorer=scorer, top_k=1, per_device_generation_batch_size=size)
        trainer.model.double()
        seen = []
        trainer.model.lm_head.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(args[0].shape[0])
        )
        batch = generation_batch(trainer, rows)
        found.append((max(seen), batch["completion_ids"], batch["completion_mask"]))
    (whole, *expected), (largest, *sliced) = found
    assert (whole, largest) == (16, 6)
    assert all(torch.equal(one, other) for one, other in zip(expected, sliced, strict=True))


def test_the_same_image_however_the_row_carries_it(make_trainer):
    """As `images`, as `image`, inside the message, in another mode or not yet upright: the same prompt and pixels."""
    upright = picture(5, 32, 48)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    assert load_rgb(turned).tobytes() == upright.tobytes()
    text = {"type": "text", "text": "What is it?"}
    plain = [{"role": "user", "content": "What is it?"}]
    placeholder = [{"role": "user", "content": [{"type": "image"}, text]}]
    forms = [
        {"prompt": plain, "images": [upright]},
        {"prompt": plain, "image": upright},
        {"prompt": placeholder, "images": [upright]},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": upright}, text]}]},
        {"prompt": plain, "images": [upright.convert("RGBA")]},
        {"prompt": plain, "image": turned},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": turned}, text]}]},
    ]
    found = []
    for form in forms:
        row = {**form, "sample_id": "one", "answer": ""}
        trainer = inject(make_trainer([row, row], perception_gate="none"))
        batch = generation_batch(trainer, [row])
        views = batch["perception_views"]
        assert all(view["removing"] is views[0]["removing"] for view in views)
        found.append(
            (
                batch["prompt_ids"],
                batch["prompt_images"][0]["pixel_values"],
                *(views[0][k]["pixel_values"] for k in views[0]),
            )
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not torch.equal(found[0][1][:8], found[0][2])


def test_messages_with_images_beside_rows_of_text(make_trainer):
    part = {"type": "image", "image": picture(1)}
    rows = [
        {"prompt": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}, part]}], "answer": ""},
        {"prompt": [{"role": "user", "content": "And this?"}], "answer": ""},
    ]
    trainer = inject(make_trainer(rows, perception_gate="none", num_train_epochs=1, max_steps=-1))
    trainer.train()
    (log,) = step_logs(trainer)
    assert log["perception/gated_fraction"] == 0.5
    assert log["perception/cpl"] > 0


def test_rows_without_an_id_have_stable_views(make_trainer):
    def views_of(rows):
        trainer = inject(make_trainer(rows, perception_gate="none"))
        batch = generation_batch(trainer, rows)
        return [view["removing"]["pixel_values"] for view in batch["perception_views"][::4]]

    rows = make_rows([1, 2, 1])
    bare = [{key: value for key, value in row.items() if key != "sample_id"} for row in rows]
    first, again, turned = views_of(bare), views_of(copy.deepcopy(bare)), views_of(bare[::-1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, turned[::-1], strict=True))
    named = [{**row, "id": f"row-{index}"} for index, row in enumerate(bare)]
    assert all(torch.equal(a, b) for a, b in zip(views_of(rows), views_of(named), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, views_of(rows), strict=True))
    same_image = [{**row, "images": rows[0]["images"]} for row in (bare[0], bare[2])]
    assert not torch.equal(*views_of(same_image))
    same_text = [{**row, "prompt": rows[0]["prompt"]} for row in (bare[0], bare[2])]
    assert not torch.equal(*views_of(same_text))


def test_a_streamed_dataset_trains(make_trainer, tiny_model, processor):
    rows = make_rows([1, 0, 2, 1])
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    args = make_trainer(rows, max_steps=2).args
    model = copy.deepcopy(tiny_model)
    trainer = inject(CPPOTrainer(model, token_reward, args, streamed, processing_class=processor))
    trainer.train()
    assert [log["perception/gated_fraction"] > 0 for log in step_logs(trainer)] == [True, True]
    assert trainer.last_samples
