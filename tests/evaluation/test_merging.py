"""An adapter on embeddings that are tied to the output layer: the merged model answers as the trained one did."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cppo.cli.main import main
from cppo.data import chat_messages, load_records
from cppo.errors import UserError
from cppo.evaluation import load_model, load_processor, prompt_inputs
from cppo.runs.adapters import name_base
from cppo.training.setup import check_setup

ADAPTERS = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "output layer": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "weight-decomposed": {"target_modules": ["embed_tokens"], "use_dora": True},
    "a copy of the embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "a copy of the output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [40, 41, 42]}},
}


@pytest.fixture(scope="module")
def inputs(small_model):
    (record,) = load_records("tasks:digits", split="test", limit=1)
    return prompt_inputs(load_processor(small_model), [chat_messages(record.prompt)], [record.images])


def adapter(base, folder, **options):
    """A folder with an adapter whose weights are far from 0."""
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig(r=2, **options))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    name_base(model, base)
    model.save_pretrained(folder)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    return str(folder)


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_and_exported_it_is_the_trained_model(small_model, inputs, tmp_path, name):
    folder = adapter(small_model, tmp_path / "adapter", **ADAPTERS[name])
    base = AutoModelForImageTextToText.from_pretrained(small_model)
    before = logits(base, inputs)
    expected = logits(PeftModel.from_pretrained(base, folder), inputs)
    assert (expected - before).abs().max() > 0.1
    assert (logits(load_model(folder, device="cpu")[0], inputs) - expected).abs().max() < 1e-4
    out = tmp_path / "plain"
    assert main(["export", "--model", folder, "--out", str(out)]) == 0
    exported = AutoModelForImageTextToText.from_pretrained(out)
    assert (logits(exported, inputs) - expected).abs().max() < 1e-4
    again = tmp_path / "again"
    exported.save_pretrained(again)
    assert (logits(AutoModelForImageTextToText.from_pretrained(again), inputs) - expected).abs().max() < 1e-4


def test_other_adapters_leave_the_layers_tied(small_model, tmp_path):
    folder = adapter(small_model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    out = tmp_path / "plain"
    assert main(["export", "--model", folder, "--out", str(out)]) == 0
    assert not [name for name in load_file(out / "model.safetensors") if "lm_head" in name]
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("target", "refused"), [("embed_tokens", True), ("lm_head", True), ("q_proj", False)])
def test_vllm_cannot_take_an_adapter_of_shared_weights(small_model, target, refused):
    base = AutoModelForImageTextToText.from_pretrained(small_model)
    base.config.vision_config.rope_parameters["rope_theta"] = 10_000.0  # vLLM knows no other
    trainer = SimpleNamespace(
        model=get_peft_model(base, LoraConfig(target_modules=[target])),
        use_vllm=True,
        processing_class=SimpleNamespace(padding_side="left"),
        args=SimpleNamespace(
            vllm_mode="server",
            per_device_generation_batch_size=None,
            perception_gate="none",
            perception_gate_reward=None,
        ),
        reward_func_names=[],
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
    )
    if refused:
        with pytest.raises(UserError, match="leave embed_tokens and lm_head out"):
            check_setup(trainer)
    else:
        check_setup(trainer)
