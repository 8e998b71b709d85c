"""The trainings of the two-process tests: `rank_job.py MODEL FOLDER ROWS_A_PROCESS CASES`, alone or under torchrun.

One process trains every case in turn, because its start takes longer than a training. Keys of a case:
- `untied`: the model's output layer has its own weight;
- `sharded`: FSDP2 shards the weights, on CPUs, where there are several processes;
- `resumed`: it stops after the first step and continues from the checkpoint;
- `poisoned`: the last process's loss is NaN in the second step;
- `stopped`: the last process gets SIGTERM in the second step; the run continues from the checkpoint;
- `brief`: many tokens end an answer, so that processes finish theirs at different times;
- `greedy`: the policy writes the rollouts, each token the most likely one.
"""

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import rollout_stubs
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from rollout_stubs import build_trainer, inject, make_rows, step_logs
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from cppo import CPPOTrainer
from cppo.checkpoints import newest_whole
from cppo.errors import UserError
from cppo.runs.signals import StopOnSignal


class ShardedTrainer(CPPOTrainer):
    """Shards by FSDP2 on CPUs, where accelerate would choose plain data parallelism; `fsdp` are more options."""

    fsdp: ClassVar[dict] = {}

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.num_processes == 1:
            return
        options = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False, **self.fsdp}
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
        # New states copy the first one's kind, which the next trainer's arguments reset.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


class PoisonedTrainer(CPPOTrainer):
    """Has a NaN loss in the second step, in the last process only."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        last = self.accelerator.process_index == self.accelerator.num_processes - 1
        return loss * torch.nan if last and self.state.global_step == 1 else loss


class Signalling(TrainerCallback):
    """Sends SIGTERM to the last process in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train_until_not_finite(trainer, folder):
    """All processes end before the second step, with its cause."""
    processes = trainer.accelerator.num_processes
    where = f" of process {processes - 1}" if processes > 1 else ""
    with pytest.raises(UserError, match=rf"^step 2: .* the loss of micro-batch 1 of 1{where} is nan"):
        trainer.train()
    assert newest_whole(Path(folder), passed_over=pytest.fail).name == "checkpoint-1"


def train_until_signal(trainer):
    """All processes stop after the second step."""
    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    trainer.add_callback(Signalling())
    with stop.listening():
        trainer.train()
    assert stop.agreed == signal.SIGTERM
    assert trainer.state.global_step == 2


def untied_model(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def recorded(reward, found):
    """The reward function, which also records its rewards and their tokens in `found`."""

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
        kinds = ("untied", "sharded", "resumed", "poisoned", "stopped", "brief", "greedy")
        untied, sharded, resumed, poisoned, stopped, brief, greedy = (options.pop(kind, False) for kind in kinds)
        rewards = {}
        reward = getattr(rollout_stubs, options.pop("reward", "token_reward"))
        make = functools.partial(
            build_trainer,
            untied_model(folder_of_model) if untied else folder_of_model,
            f"{folder}/{name}",
            make_rows(([1, 1, 2, 1] if sharded else [1, 0, 2, 1]) * (2 if options.get("num_generations") == 1 else 1)),
            ShardedTrainer if sharded else PoisonedTrainer if poisoned else CPPOTrainer,
            processing_class=processor,
            per_device_train_batch_size=int(rows_a_process),
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            perception_weight=0.5,
            reward_funcs=recorded(reward, rewards),
            save_strategy="steps" if resumed or poisoned else "no",
            save_steps=1,
            **{"log_perception_grad_share": not sharded, "max_steps": 2, **({"top_k": 1} if greedy else {}), **options},
        )
        trainer = make() if greedy else inject(make(), same_each_time=True)
        if brief:
            trainer.generation_config.eos_token_id = trainer.eos_token_ids = list(range(90, 270))
        if poisoned:
            train_until_not_finite(trainer, f"{folder}/{name}")
        elif stopped:
            train_until_signal(trainer)
        else:
            trainer.train()
        if not greedy:  # which gives rows the same answer, for other rewards
            check_samples(trainer, rewards)
        if resumed or stopped:
            trainer = make() if greedy else inject(make(), same_each_time=True)
            trainer.train(resume_from_checkpoint=f"{folder}/{name}/checkpoint-{2 if stopped else 1}")
        logs = step_logs(trainer)
        weights = {weight: value.detach() for weight, value in trainer.model.named_parameters()}
        if sharded and trainer.accelerator.num_processes > 1:
            assert all(isinstance(value, DTensor) for value in weights.values())
            weights = {weight: value.full_tensor() for weight, value in weights.items()}
        results[name] = {"weights": weights, "logs": logs}
    if trainer.is_world_process_zero():
        torch.save(results, f"{folder}/results.pt")
    # A process that ends while another uses the group can make the other fail.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
