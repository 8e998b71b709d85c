"""Every model family with its real processor: rollouts, CPPO steps, save, reload, resume, adapters, a frozen tower."""

import pytest
import torch
from peft import LoraConfig
from rollout_stubs import build_trainer, inject, make_rows, step_logs
from tiny_families import FAMILIES, build_family, with_first_token
from transformers import AutoModelForImageTextToText, AutoProcessor

from cppo.cli.main import main
from cppo.evaluation import generate_responses, prompt_inputs
from cppo.options import RunOptions
from cppo.runs.adapters import language_model_layers, lora_config

UNSHARED = {"gemma3"}
PROJECTORS = ("merger", "multi_modal_projector", "connector", "image_newline")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWERS = ("visual.", "vision_tower.", "vision_model.")


@pytest.fixture(autouse=True, scope="session")
def _number_words():
    """SmolVLM's processor needs a package that spells numbers, only for videos."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
        yield


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """Name and folder of each family's model."""
    return request.param, build_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def train(tmp_path):
    """Train a family on one row per number of images; returns the trainer and its logs."""

    def run(folder, out="out", counts=(1, 2, 0), resume=None, drawn=False, **options):
        trainer = build_trainer(
            AutoModelForImageTextToText.from_pretrained(folder),
            tmp_path / out,
            make_rows(counts),
            processing_class=AutoProcessor.from_pretrained(folder, padding_side="left"),
            **{"max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 2 * len(counts), **options},
        )
        if drawn:
            inject(trainer, same_each_time=True)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, step_logs(trainer)

    return run


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_tower(name):
    return any(part in name for part in TOWERS) and not any(part in name for part in PROJECTORS)


def test_train_save_reload_resume(family, train, tmp_path):
    """A text-only row and one with two images among the prompts; the resumed run ends in the same bits."""
    name, folder = family
    before = weights_of(AutoModelForImageTextToText.from_pretrained(folder))
    options = {"save_strategy": "steps", "save_steps": 1, "perception_gate": "none", "beta": 0.01}
    trainer, logs = train(folder, **options)
    assert trainer._shares_prompts is (name not in UNSHARED)
    assert len(logs) == 2
    assert all(log["perception/cpl"] > 0 and log["perception/d_removing"] > 0 for log in logs)
    assert all(log["perception/gated_fraction"] == pytest.approx(2 / 3) for log in logs)
    trained = weights_of(trainer.model)
    moved = {key for key in before if not torch.equal(before[key], trained[key])}
    assert any(is_tower(key) for key in moved)
    assert any("embed_tokens" in key for key in moved)

    trainer.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, trained[key]) for key, weight in reloaded.named_parameters())
    processor = AutoProcessor.from_pretrained(tmp_path / "saved", padding_side="left")
    assert type(processor) is type(trainer.processing_class)
    rows = make_rows([1, 2, 0])
    prompts, images = [row["prompt"] for row in rows], [row["images"] for row in rows]
    ours, saved = (prompt_inputs(made, prompts, images) for made in (trainer.processing_class, processor))
    assert torch.equal(ours["input_ids"], saved["input_ids"])
    assert torch.equal(ours["pixel_values"], saved["pixel_values"])
    assert len(generate_responses(reloaded, processor, prompts, images, max_new_tokens=3)) == 3

    resumed, _ = train(folder, "resumed", resume=str(tmp_path / "out" / "checkpoint-1"), **options)
    assert all(torch.equal(weight, trained[key]) for key, weight in resumed.model.named_parameters())


def test_every_scorer_gives_the_same_loss(family, train):
    """`kernel` is TRL's path; for LLaVA-OneVision, where it cannot pass the numbers of images, the plain one."""
    options = {"drawn": True, "max_steps": 1, "perception_gate": "none", "perception_weight": 0.5}
    figures = ("loss", "grad_norm", "perception/cpl", "perception/d_removing", "perception/d_preserving")
    shared, kernel, plain = (
        [train(family[1], scorer=scorer, **options)[1][0][figure] for figure in figures]
        for scorer in ("shared", "kernel", "plain")
    )
    assert shared == pytest.approx(plain, rel=1e-3, abs=1e-6)
    assert kernel == pytest.approx(plain, rel=1e-3, abs=1e-6)


def test_a_first_token_of_template_and_tokenizer(tmp_path):
    """TRL makes Gemma 3's token types from text that has it twice; they still match the image's tokens."""
    folder = build_family("gemma3", tmp_path / "model")
    processor = with_first_token(AutoProcessor.from_pretrained(folder, padding_side="left"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    seen = []
    options = {"max_steps": 1, "perception_gate": "none", "beta": 0.01}
    trainer = inject(build_trainer(model, tmp_path, make_rows([1, 2]), processing_class=processor, **options))
    for scored in (trainer.model, trainer.ref_model):
        scored.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    trainer.train()
    assert len(seen) >= 2
    for given in seen:
        assert torch.equal(given["token_type_ids"] == 1, given["input_ids"] == model.config.image_token_id)
        assert given["token_type_ids"].any()


def test_a_frozen_vision_tower(family, train):
    _, folder = family
    before = weights_of(AutoModelForImageTextToText.from_pretrained(folder))
    trainer, _ = train(folder, counts=(1, 1), freeze_vision_tower=True, max_steps=1, perception_gate="none")
    after = weights_of(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(is_tower(name) for name in before)
    assert not any(is_tower(name) for name in moved)
    assert any(part in name for name in moved for part in PROJECTORS)
    assert any("embed_tokens" in name for name in moved)


def test_an_adapter_trains_resumes_and_merges(family, train, tmp_path):
    """On the language model's linear layers; the output of `cppo export` answers like model and adapter."""
    _, folder = family
    options = {"save_strategy": "steps", "save_steps": 1, "perception_gate": "none", "learning_rate": 0.01}
    asked = RunOptions("unused", model=folder, use_peft=True, lora_r=2)
    trainer, logs = train(folder, counts=(1, 2), peft_config=lora_config(asked), **options)
    assert all(log["perception/cpl"] > 0 for log in logs)
    adapted = weights_of(trainer.model)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name and not is_tower(name) for name in trainable)
    assert {name.split(".lora_")[0].split(".")[-1] for name in trainable} == set(LINEAR)
    again = {"peft_config": lora_config(asked), "resume": str(tmp_path / "out" / "checkpoint-1"), **options}
    resumed, _ = train(folder, "resumed", counts=(1, 2), **again)
    assert all(torch.equal(weight, adapted[name]) for name, weight in resumed.model.named_parameters())

    trainer.save_model(str(tmp_path / "adapter"))
    assert main(["export", "--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "plain")]) == 0
    rows = make_rows([1, 2])
    images = [row["images"] for row in rows]
    inputs = prompt_inputs(trainer.processing_class, [row["prompt"] for row in rows], images)
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**inputs).logits
        found = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("gradients", [True, False])
def test_adapters_share_prompts_as_whole_models_do(family, train, gradients):
    """Adapters that already change the model; tests/policy compares every family's scores with them."""
    _, folder = family
    lora = LoraConfig(r=2, target_modules=language_model_layers(folder), init_lora_weights=False)
    options = {"drawn": True, "max_steps": 1, "perception_gate": "none", "perception_weight": 0.5, "beta": 0.01}
    options |= {"perception_view_gradients": gradients, "peft_config": lora}
    figures = ("loss", "grad_norm", "perception/cpl", "kl")
    shared, plain = (
        [train(folder, scorer=scorer, **options)[1][0][figure] for figure in figures] for scorer in ("shared", "plain")
    )
    assert shared == pytest.approx(plain, rel=1e-3, abs=1e-6)
