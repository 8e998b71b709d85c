"""The trainings of the two-process tests: `rank_job.py MODEL FOLDER ROWS_A_PROCESS CASES`, alone or under torchrun.

One process trains every case in turn: starting it takes longer than a training. A case's `untied` gives the model an
output layer of its own; its `sharded` shards the weights by FSDP2, on CPUs, where there are several processes; its
`resumed` stops after the first step and goes on from the checkpoint.
"""

import functools
import json
import sys

import pytest
import rollout_stubs
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from rollout_stubs import build_trainer, inject, make_rows, step_logs
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from cppo import CPPOTrainer


class ShardedTrainer(CPPOTrainer):
    """Shards by FSDP2 on CPUs, for which accelerate would choose plain data parallelism."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.num_processes == 1:
            return
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        # New states copy the first one's kind, which the next trainer's arguments set back.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def untied_model(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def recorded(reward, found):
    """The reward function, which also notes in `found` what it gave to which tokens."""

    @functools.wraps(reward)
    def record(completion_ids, **columns):
        rewards = reward(completion_ids, **columns)
        found.update(zip(map(tuple, completion_ids), rewards, strict=True))
        return rewards

    return record


def check_samples(trainer, rewards):
    """This process's samples are its own rollouts, each with its own reward."""
    decode = trainer.processing_class.decode
    by_text = {tuple(decode([token]) for token in ids): reward for ids, reward in rewards.items()}
    assert trainer.last_samples
    for sample in trainer.last_samples:
        assert sample["reward"] == pytest.approx(by_text[tuple(sample["completion_tokens"])])


def main() -> None:
    folder_of_model, folder, rows_a_process, cases = sys.argv[1:]
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(folder_of_model, padding_side="left")
    results = {}
    for name, options in json.loads(cases).items():
        untied, sharded, resumed = (options.pop(kind, False) for kind in ("untied", "sharded", "resumed"))
        rewards = {}
        reward = getattr(rollout_stubs, options.pop("reward", "token_reward"))
        make = functools.partial(
            build_trainer,
            untied_model(folder_of_model) if untied else folder_of_model,
            folder,
            make_rows([1, 1, 2, 1] if sharded else [1, 0, 2, 1]),
            ShardedTrainer if sharded else CPPOTrainer,
            processing_class=processor,
            per_device_train_batch_size=int(rows_a_process),
            max_steps=2,
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            perception_weight=0.5,
            reward_funcs=recorded(reward, rewards),
            save_strategy="steps" if resumed else "no",
            save_steps=1,
            **{"log_perception_grad_share": not sharded, **options},
        )
        trainer = inject(make(), same_each_time=True)
        trainer.train()
        check_samples(trainer, rewards)
        if resumed:
            trainer = inject(make(), same_each_time=True)
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
        logs = step_logs(trainer)
        weights = {weight: value.detach() for weight, value in trainer.model.named_parameters()}
        if sharded and trainer.accelerator.num_processes > 1:
            assert all(isinstance(value, DTensor) for value in weights.values())
            weights = {weight: value.full_tensor() for weight, value in weights.items()}
        results[name] = {"weights": weights, "logs": logs}
    if trainer.is_world_process_zero():
        torch.save(results, f"{folder}/results.pt")
    # A process that ends while another still uses the group can make that one fail.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
