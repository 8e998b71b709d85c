"""Mistakes in options, data and processors: one clear line each."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from rollout_stubs import (
    build_trainer,
    generation_batch,
    inject,
    make_rows,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Qwen2_5_VLProcessor
from trl import GRPOConfig

from cppo.errors import UserError
from cppo.policy.prompts import canonical_row, prompt_messages
from cppo.rewards import accuracy_reward
from cppo.training.fit import check_head, share_prompts
from cppo.training.setup import check_columns, check_setup, keep_float32_outputs
from cppo.training.trainer import CPPOTrainer


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gate_reward_that_is_not_there_is_refused(make_trainer):
    with pytest.raises(UserError, match="perception_gate_reward = 'acuracy'") as caught:
        make_trainer(make_rows([1, 1]), perception_gate="correct", perception_gate_reward="acuracy")
    assert "token_reward" in one_line(caught)


@pytest.mark.parametrize(
    ("options", "zero3", "named"),
    [
        ({"log_perception_grad_share": True}, False, "log_perception_grad_share"),
        ({"perception_memory": "sequential"}, False, "perception_memory"),
        ({"perception_view_gradients": False}, False, "perception_view_gradients"),
        ({}, True, "scorer = 'shared' does not gather ZeRO-3 weights in the same order on all ranks"),
    ],
)
def test_what_sharded_training_cannot_do_is_refused(make_trainer, monkeypatch, options, zero3, named):
    trainer = make_trainer(make_rows([1, 1]), **options)
    check_setup(trainer)
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = zero3, not zero3
    monkeypatch.setattr("cppo.training.setup.is_deepspeed_zero3_enabled", lambda: zero3)
    with pytest.raises(UserError, match=named) as caught:
        check_setup(trainer)
    one_line(caught)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("scorer", ["shared", "kernel", "plain"])
def test_trls_fused_head_is_refused_where_fsdp2_shards_it_alone(make_trainer, monkeypatch, untied, scorer):
    trainer = make_trainer(make_rows([1, 1]), scorer=scorer)
    if untied:
        head = trainer.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    check_head(trainer, trainer._shares_prompts)
    monkeypatch.setattr(type(trainer.accelerator), "is_fsdp2", True)
    if untied and scorer == "kernel":
        with pytest.raises(UserError, match="use 'shared'") as caught:
            check_head(trainer, trainer._shares_prompts)
        one_line(caught)
    else:
        check_head(trainer, trainer._shares_prompts)


def test_a_column_that_a_reward_needs():
    def graded(completions, level, images, weight=1, **kwargs):
        return [0.0] * len(completions)

    row = {"prompt": "What?", "images": [], "answer": "7"}
    with pytest.raises(
        UserError, match="reward graded needs the column 'level', but train_dataset has prompt"
    ) as caught:
        check_columns([row], False, ["my/reward-model", torch.nn.Linear(1, 1), graded])
    one_line(caught)
    with pytest.raises(UserError, match="needs the columns 'level', 'unit', but train_dataset has prompt"):
        check_columns([row], False, lambda completions, level, unit: [])
    with pytest.raises(UserError, match="needs the column 'answer'"):
        check_columns([{"prompt": "What?"}], False, accuracy_reward)
    with pytest.raises(UserError, match=r"keeps more, or `dataset.rename_column\('solution', 'answer'\)`$"):
        check_columns([{"prompt": "What?", "solution": "7"}], False, accuracy_reward)
    check_columns([{**row, "level": 1}], False, graded)


def test_columns_with_other_names(caplog):
    image, chat = Image.new("RGB", (64, 64)), [{"role": "user", "content": "What?"}]
    with_image = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]

    def warned(columns, **options):
        caplog.clear()
        check_columns(Dataset.from_list([columns]), **options)
        return "needs images: is it among" in caplog.text

    with pytest.raises(UserError, match="no column `prompt`: rename one; its columns are question, images") as caught:
        check_columns(Dataset.from_list([{"question": "What?", "images": [image]}]), True)
    one_line(caught)
    assert warned({"prompt": chat, "pictures": [image]}, uses_perception=True)
    assert warned({"prompt": "What?"}, uses_perception=True)
    assert not warned({"prompt": chat, "pictures": [image]}, uses_perception=False)
    for columns in ({"prompt": chat, "image": image}, {"prompt": chat, "images": [image]}):
        assert not warned(columns, uses_perception=True)
    caplog.clear()
    check_columns([{"prompt": with_image}], True)
    check_columns([], True)
    check_columns(IterableDataset.from_generator(lambda: iter([{"question": "What?"}])), True)
    assert not caplog.text


def test_fewer_rows_than_prompts_generated_together_are_refused(make_trainer):
    with pytest.raises(UserError, match="train_dataset: 1 usable rows are fewer than the 2 prompts") as caught:
        inject(make_trainer(make_rows([1]))).train()
    one_line(caught)
    inject(make_trainer(make_rows([1, 1]))).train()


def test_an_image_in_place_of_a_list_is_refused(make_trainer):
    rows = make_rows([1, 1])
    rows[0]["images"] = rows[0]["images"][0]
    with pytest.raises(UserError, match="images: expected a list of images, got Image; a single image") as caught:
        generation_batch(inject(make_trainer(rows)), rows)
    one_line(caught)


def test_an_infinite_reward_is_refused(make_trainer):
    def endless(completions, **columns):
        return [float("inf")] + [0.0] * (len(completions) - 1)

    trainer = inject(make_trainer(make_rows([1, 1]), reward_funcs=[endless]))
    with pytest.raises(UserError, match="the reward endless is infinite") as caught:
        generation_batch(trainer, make_rows([1, 1]))
    one_line(caught)


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        (([3e38, -3e38], [3e38, 3e38]), [1.0, 1.0]),
        (([1e30, 0.0], [-1e30, 0.0]), [1.0, 1.0]),
        (([1.0], [2.0]), [1e19, 0.0]),
    ],
)
def test_rewards_too_large_for_float32_are_refused(make_trainer, values, weights):
    """Their sum, their squares, or their products with the weights overflow, which would silently make weights NaN."""

    def first(completions, **columns):
        return (values[0] * len(completions))[: len(completions)]

    def second(completions, **columns):
        return (values[1] * len(completions))[: len(completions)]

    trainer = inject(make_trainer(make_rows([1, 1]), reward_funcs=[first, second], reward_weights=weights))
    with pytest.raises(UserError, match=r"the weighted rewards \(first, second\) reach") as caught:
        generation_batch(trainer, make_rows([1, 1]))
    one_line(caught)


def test_a_reward_that_is_nan_in_python_is_refused(make_trainer):
    def lost(completions, **columns):
        return [float("nan")] * len(completions)

    trainer = inject(make_trainer(make_rows([1, 1]), reward_funcs=[lost]))
    with pytest.raises(UserError, match=r"reward_funcs: 'lost' must return a list .* it returned nan") as caught:
        generation_batch(trainer, make_rows([1, 1]))
    one_line(caught)


def test_slices_of_images_that_are_not_understood_are_refused(make_trainer, monkeypatch):
    monkeypatch.setattr("cppo.training.setup.unshared_reason", lambda config: "its kind is new")
    make_trainer(make_rows([1, 1]))
    with pytest.raises(UserError, match="per_device_generation_batch_size splits batches by images, but its kind is"):
        make_trainer(make_rows([1, 1]), per_device_generation_batch_size=4)


@pytest.mark.parametrize("sharded", ["fsdp", "zero3"])
def test_rows_of_both_kinds_are_refused_where_the_vision_tower_is_sharded(make_trainer, monkeypatch, sharded):
    pictures, text = make_rows([1, 2]), make_rows([0, 0])
    embedded = [{**row, "prompt": prompt_messages(row), "images": []} for row in make_rows([1])]
    trainer = inject(make_trainer([pictures[0], text[0]]))
    generation_batch(trainer, [pictures[0], text[0]])
    monkeypatch.setattr(trainer, "is_fsdp_enabled", sharded == "fsdp")
    monkeypatch.setattr("cppo.training.setup.is_deepspeed_zero3_enabled", lambda: sharded == "zero3")
    for first in (pictures[0], embedded[0]):
        with pytest.raises(UserError, match="rows with and without images") as caught:
            generation_batch(trainer, [first, text[1]])
        one_line(caught)
    for rows in (pictures, text, [embedded[0], pictures[1]]):
        generation_batch(trainer, rows)


def test_a_tied_head_cannot_be_cast(make_trainer, tiny_model):
    assert tiny_model.config.tie_word_embeddings
    with pytest.raises(UserError, match="cast_lm_head_to_fp32: this model's output layer is tied"):
        make_trainer(make_rows([1, 1]), cast_lm_head_to_fp32=True)


def test_a_model_split_over_devices_shares_no_prompts(make_trainer, caplog):
    trainer = make_trainer(make_rows([1, 1]))
    assert share_prompts(trainer) == (True, True)
    trainer.model.hf_device_map = {"visual": 0, "language_model": 0}
    assert share_prompts(trainer) == (True, True)
    trainer.model.hf_device_map = {"visual": 0, "language_model": 1}
    assert share_prompts(trainer) == (False, False)
    assert "the model is split over them" in caplog.text


def test_a_mixture_of_experts_shares_no_prompts(make_trainer, caplog):
    trainer = make_trainer(make_rows([1, 1]), perception_memory="sequential")
    trainer.aux_loss_enabled = True
    with pytest.raises(UserError, match="'sequential' needs shared prompts, but a mixture-of-experts") as caught:
        share_prompts(trainer)
    one_line(caught)
    trainer.args.perception_memory = "joint"
    assert share_prompts(trainer) == (False, False)
    assert "a mixture-of-experts model balances its experts over whole rows" in caplog.text


def test_fsdp2_rounds_no_outputs():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    for sharded, expected in ((False, torch.bfloat16), (True, None)):
        keep_float32_outputs(SimpleNamespace(is_fsdp2=sharded, state=SimpleNamespace(fsdp_plugin=plugin)))
        kept = plugin.mixed_precision_policy
        assert (kept.param_dtype, kept.reduce_dtype, kept.output_dtype) == (torch.bfloat16, torch.float32, expected)


def test_arguments_of_trls_class_are_refused(tiny_model, processor, tmp_path):
    with pytest.raises(UserError, match="args is a GRPOConfig: give a CPPOConfig"):
        build_trainer(tiny_model, tmp_path, make_rows([1]), CPPOTrainer, GRPOConfig, processing_class=processor)


class DarkensToFewerTokens(Qwen2_5_VLProcessor):
    """Halves images that are not bright, so that a view has other tokens than its image."""

    def __call__(self, images=None, **kwargs):
        def fit(image):
            return image if image.convert("L").getextrema()[1] > 200 else image.resize((32, 32))

        images = [[fit(image) for image in row] for row in images] if images else images
        return super().__call__(images=images, **kwargs)


def test_a_processor_that_counts_a_view_otherwise_is_refused(make_trainer, tiny):
    white = Image.new("RGB", (64, 64), "white")
    rows = [{"prompt": [{"role": "user", "content": "What?"}], "images": [white], "sample_id": "the white one"}]
    fickle = DarkensToFewerTokens.from_pretrained(tiny, padding_side="left")
    dark = {"preserving_views": ["color_jitter"], "view_brightness": [0.3, 0.3], "perception_gate": "none"}
    trainer = inject(make_trainer(rows * 2, processing_class=fickle, **dark))
    with pytest.raises(UserError, match="row the white one: the processor makes") as caught:
        generation_batch(trainer, rows)
    assert "number of image tokens that depends only on the image's size" in one_line(caught)


def test_an_image_that_cannot_be_read_is_named(make_trainer):
    rows = make_rows([1, 1])
    rows[1]["images"] = ["not an image"]
    trainer = inject(make_trainer(rows))
    with pytest.raises(UserError, match="image 'not an image' cannot be read") as caught:
        generation_batch(trainer, rows)
    one_line(caught)


def test_rewards_may_be_named(make_trainer):
    trainer = make_trainer(make_rows([1, 1]), reward_funcs=["accuracy", "format"], reward_weights=[0.9, 0.1])
    assert trainer.reward_func_names == ["accuracy_reward", "format_reward"]
    with pytest.raises(UserError, match=r"rewards: 'gone.py:f': there is no file gone.py"):
        make_trainer(make_rows([1, 1]), reward_funcs="gone.py:f")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reward_funcs": ["accuracy", "format"]}, "each reward weighs 1 (accuracy_reward, format_reward): give "),
        ({"reward_funcs": ["accuracy", "format"], "reward_weights": [1.0, 1.0]}, ""),
        ({"reward_funcs": "accuracy"}, ""),
        ({"reward_funcs": ["method"]}, ""),  # with the method's weights
    ],
)
def test_rewards_without_weights_are_reported_to_weigh_one(make_trainer, capsys, options, told):
    make_trainer(make_rows([1, 1]), **options)
    said = [line for line in capsys.readouterr().err.splitlines() if "weigh" in line]
    assert [line.partition("give ")[0] + "give " for line in said] == ([f"cppo: {told}"] if told else [])


def test_another_number_of_weights_says_what_to_change(make_trainer):
    with pytest.raises(UserError, match=r"1 weight \(0.5\) for 2 rewards .*: add 1 weight or") as caught:
        make_trainer(make_rows([1, 1]), reward_funcs=["accuracy", "format"], reward_weights=[0.5])
    one_line(caught)


BEGUN = {"role": "assistant", "content": "Let me see"}


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": "What?"}, BEGUN],
        [{"role": "system", "content": "Look."}, {"role": "user", "content": "What?"}, BEGUN],
        [{"role": "user", "content": "What?"}, BEGUN, {"role": "user", "content": "And?"}, BEGUN],
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "<think>"}]},
        ],
        [BEGUN],
    ],
)
def test_a_prompt_that_ends_with_the_assistant_is_refused(make_trainer, prompt):
    right, wrong = make_rows([1, 1])
    wrong = {**wrong, "prompt": prompt}
    with pytest.raises(UserError, match="ends with an assistant message"):
        make_trainer([wrong, right])
    with pytest.raises(UserError, match="ends with an assistant message"):
        canonical_row(wrong)


def test_a_plain_text_prompt_beside_images_is_refused(make_trainer):
    """In the first row before the model loads, in others when they are drawn; with text alone it trains as in TRL."""
    right, wrong, plain = make_rows([1, 1, 0])
    wrong = {**wrong, "prompt": "What is it?"}
    for check in (lambda: make_trainer([wrong, right]), lambda: canonical_row(wrong)):
        with pytest.raises(UserError, match=r"'What is it\?' is plain text, and its row has images") as caught:
            check()
        one_line(caught)
    assert canonical_row({**plain, "prompt": "What is it?"})["prompt"] == "What is it?"


def test_an_answered_question_before_the_last_is_no_mistake():
    (row,) = make_rows([1])
    prompt = [{"role": "user", "content": "Ready?"}, {"role": "assistant", "content": "Yes."}, *row["prompt"]]
    check_columns([{**row, "prompt": prompt}], True)
