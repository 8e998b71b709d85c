"""Trainers leave a frozen vision tower out of the backward pass, even after repeated switches of checkpointing."""

import torch
from peft import LoraConfig
from rollout_stubs import make_rows

from cppo.data import load_records
from cppo.options import RunOptions
from cppo.policy import unwrapped
from cppo.runs.sft import sft_trainer

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def blocks_with_a_graph(trainer):
    """For each pass through a block of the tower in training, whether its output takes part in the backward pass."""
    seen = []
    for block in unwrapped(trainer.model).get_encoder(modality="image").blocks:
        block.register_forward_hook(lambda *call: seen.append(call[-1].requires_grad))
    trainer.train()
    assert seen
    return sum(seen)


def test_an_adapter_of_the_language_model(make_trainer):
    options = {"perception_gate": "none", "max_steps": 2, "beta": 0.01}
    trainer = make_trainer(make_rows([1, 1]), peft_config=LORA, gradient_checkpointing=True, **options)
    assert blocks_with_a_graph(trainer) == 0


def test_a_tower_that_is_frozen(make_trainer):
    rows = make_rows([1, 1])
    assert blocks_with_a_graph(make_trainer(rows, folder="trained", gradient_checkpointing=True, max_steps=1)) > 0
    trainer = make_trainer(rows, freeze_vision_tower=True, gradient_checkpointing=True, max_steps=2)
    assert blocks_with_a_graph(trainer) == 0
    assert all(weight.grad is None for weight in trainer.model.model.visual.blocks.parameters())


def test_supervised_fine_tuning_of_an_adapter(small_model, tmp_path):
    options = RunOptions("tasks:shapes?n=2", use_peft=True, lora_r=2, model=str(small_model))
    sizes = {"per_device_train_batch_size": 2, "max_steps": 1, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    data = load_records("tasks:shapes?n=2")
    trainer = sft_trainer(str(small_model), data, str(tmp_path), sft_args=sizes, options=options)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    assert blocks_with_a_graph(trainer) == 0
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "lora_B" in name}
