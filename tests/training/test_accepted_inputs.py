"""Inputs that TRL trains and CPPO must too (processors, images, adapters, heads), and inputs that neither can."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from packaging.version import Version
from peft import PrefixTuningConfig, PromptTuningConfig
from PIL import Image
from rollout_stubs import flat_weights, make_rows
from safetensors.torch import save_file
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM

from cppo.assets import adapter_base
from cppo.errors import UserError
from cppo.policy.loading import with_adapter
from cppo.policy.prompts import canonical_row
from cppo.training.config import CPPOConfig, check_enough
from cppo.training.rollouts import GenerationBatch
from cppo.training.setup import check_castable_head, check_columns


def trained(make_trainer, rows, **options):
    trainer = make_trainer(rows, max_steps=1, learning_rate=0.01, perception_gate="none", **options)
    trainer.train()
    return flat_weights(trainer.model)


def test_a_processor_that_pads_on_the_right_is_set_to_the_left(make_trainer, tiny):
    right = AutoProcessor.from_pretrained(tiny, padding_side="right")
    weights = trained(make_trainer, make_rows([1, 2]), processing_class=right, folder="right")
    assert torch.equal(weights, trained(make_trainer, make_rows([1, 2])))


def as_path(image, folder):
    file = folder / f"{image.width}-{np.asarray(image).sum()}.png"
    image.save(file)
    return str(file)


@pytest.mark.parametrize(
    "form",
    [
        as_path,
        lambda image, folder: Path(as_path(image, folder)),
        lambda image, folder: np.asarray(image),
        lambda image, folder: torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0),
    ],
)
def test_paths_arrays_and_tensors_are_images(tmp_path, form):
    rows = make_rows([1, 2])
    others = [{**row, "images": [form(image, tmp_path) for image in row["images"]]} for row in rows for _ in range(2)]
    found = GenerationBatch.of(others, 0, 2, alone=False).rows
    for row, other in zip([row for row in rows for _ in range(2)], found, strict=True):
        for image, same in zip(row["images"], other["images"], strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(same))
    assert found[0]["images"] is found[1]["images"]
    assert found[2]["images"] is not found[1]["images"]


def test_a_grey_array_is_an_image():
    grey = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    for pixels in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        row = canonical_row({**make_rows([1])[0], "images": [pixels]})
        assert np.array_equal(np.asarray(row["images"][0]), np.repeat(grey[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("gone.png", r"image 'gone.png' cannot be read"),
        (np.zeros((8, 8, 3)), r"array of float64 with shape \[8, 8, 3\]: give uint8"),
        (np.zeros((8, 8, 7), np.uint8), r"array of uint8 with shape \[8, 8, 7\]: give uint8"),
        (np.zeros(8, np.uint8), r"array of uint8 with shape \[8\]"),
        (torch.zeros(3, 8, 8), r"array of float32 with shape \[8, 8, 3\]"),
    ],
)
def test_what_is_no_image_is_one_line(image, words):
    with pytest.raises(UserError, match=words):
        canonical_row({**make_rows([1])[0], "images": [image]})


def test_a_dataset_with_splits_is_refused_by_name():
    rows = Dataset.from_list([{"prompt": "x"}])
    with pytest.raises(UserError, match=r"has the splits train, test: give one of them, such as .*data\['train'\]"):
        check_columns(DatasetDict(train=rows, test=rows), uses_perception=True)


# Adapters


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="`generate` itself fails with virtual tokens on Qwen2.5-VL: it expects as many positions as tokens",
)
def test_prompt_tuning_trains_without_sharing(make_trainer, tiny_model, caplog):
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make_trainer(make_rows([1, 1]), peft_config=adapter, max_steps=1, perception_gate="none")
    before = flat_weights(trainer.model).clone()
    trainer.train()
    assert "prompt-learning adapter adds its own tokens before each row" in caplog.text
    assert not torch.equal(flat_weights(trainer.model), before)
    assert torch.equal(flat_weights(trainer.model.get_base_model()), flat_weights(tiny_model))


def test_prefix_tuning_is_refused(make_trainer):
    with pytest.raises(UserError, match="TRL cannot train a prefix of a vision-language model"):
        make_trainer(make_rows([1, 1]), peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def adapter_of(folder, base, **more):
    folder.mkdir(parents=True)
    config = {"base_model_name_or_path": str(base), "peft_type": "LORA", "target_modules": ["q_proj"], **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_base_of_an_adapter_is_found_from_where_it_was_trained(tmp_path, monkeypatch):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "config.json").write_text("{}")
    adapter = adapter_of(tmp_path / "runs" / "a" / "checkpoint-2", "models/base")
    monkeypatch.chdir(tmp_path)
    assert adapter_base("runs/a/checkpoint-2") == "models/base"
    monkeypatch.chdir(tmp_path / "runs")
    assert Path(adapter_base("a/checkpoint-2")).samefile(tmp_path / "models" / "base")
    monkeypatch.chdir("/")
    assert Path(adapter_base(str(adapter))).samefile(tmp_path / "models" / "base")
    assert adapter_base(str(adapter_of(tmp_path / "b", "org/name"))) == "org/name"


def test_an_adapter_of_itself_or_of_another_is_refused(tmp_path):
    own = adapter_of(tmp_path / "own", tmp_path / "own")
    other = adapter_of(tmp_path / "other", own)
    dot = adapter_of(tmp_path / "dot", ".")
    for folder in (own, other):
        with pytest.raises(UserError, match="which is an adapter too"):
            adapter_base(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(dot)
        with pytest.raises(UserError, match="which is an adapter too"):
            adapter_base(".")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"base_model_name_or_path": [1]}'])
def test_a_damaged_adapter_configuration_is_one_line(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config.json (is not the configuration|names no model)"):
        adapter_base(str(tmp_path))


@pytest.mark.parametrize("kind", ["NO_SUCH", "lora", ""])
def test_an_unknown_kind_of_adapter_is_one_line(tmp_path, tiny_model, kind):
    adapter_of(tmp_path / "a", "x", peft_type=kind)
    save_file({"weight": torch.zeros(1)}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="PEFT does not know this kind of adapter"):
        with_adapter(copy.deepcopy(tiny_model), str(tmp_path / "a"))


# Heads and batches


def test_a_tied_head_is_cast_in_a_text_model_alone(tiny_model):
    small = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=1, tie_word_embeddings=True))
    args = CPPOConfig("x", use_cpu=True, bf16=False, cast_lm_head_to_fp32=True, method="grpo")
    check_castable_head(text, args)
    with pytest.raises(UserError, match="cannot cast in a vision-language model"):
        check_castable_head(tiny_model, args)


@pytest.mark.parametrize(
    ("rows", "device", "steps", "group", "remedy"),
    [
        (20, 5, 64, 5, {"steps_per_generation": 20}),
        (3, 8, 4, 4, {"steps_per_generation": 1}),
        (1, 8, 4, 4, {"per_device_train_batch_size": 4, "steps_per_generation": 1}),
        (2, 8, 1, 2, {"per_device_train_batch_size": 4}),
        (5, 6, 4, 4, {"steps_per_generation": 2}),
    ],
)
def test_the_remedy_for_few_rows_works(rows, device, steps, group, remedy):
    options = {"per_device_train_batch_size": device, "steps_per_generation": steps, "num_generations": group}
    args = CPPOConfig("x", use_cpu=True, bf16=False, **options)
    with pytest.raises(UserError, match=f"{rows} usable rows are fewer than") as caught:
        check_enough("mine", rows, args)
    for name, value in remedy.items():
        assert f"--{name} {value}" in str(caught.value)
    check_enough("mine", rows, CPPOConfig("x", use_cpu=True, bf16=False, **{**options, **remedy}))


def test_a_numpy_picture_trains_as_its_file_does(make_trainer, tmp_path):
    rows = make_rows([1, 1])
    arrays = [{**row, "images": [np.asarray(image) for image in row["images"]]} for row in rows]
    files = [{**row, "images": [as_path(image, tmp_path) for image in row["images"]]} for row in rows]
    assert isinstance(rows[0]["images"][0], Image.Image)
    weights = trained(make_trainer, rows)
    assert torch.equal(trained(make_trainer, arrays, folder="arrays"), weights)
    assert torch.equal(trained(make_trainer, files, folder="files"), weights)
