"""`torchrun engine_job.py CASES OUT`: verl's training worker on the CPU takes a step on the injected rollouts, by case.

CASES holds the fields of a `Case` by name; OUT gets the result of each. One start serves all cases, because loading
verl takes longer than a step. `engine.run` starts it, in the environment that it needs.
"""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cpu_bed import micro, varlen  # noqa: F401  (the model as it is elsewhere; attention over packed rows)
from injected import EPOCH, SEED, TEMPERATURE, Group, read
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.utils.losses import ppo_loss

from cppo.assets import MICRO_DIR
from cppo.errors import UserError
from cppo.verl.options import options_from
from cppo.verl.worker import CPPOTrainingWorker

STEPS_PER_EPOCH = 5
FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


@dataclass
class Case:
    """One step.

    Attributes:
        options: of the method; None for verl's own loss alone.
        dynamic: whether a token limit, `tokens`, sizes micro-batches; else they have `micro` groups.
        packed: rows without padding.
        parallel: processes that share a row (Ulysses).
        mini_batches: optimizer steps of the update.
        precision: of the engine's computation.
        engine, actor, model: other fields of verl's configurations.
    """

    options: dict[str, Any] | None = field(default_factory=dict)
    dynamic: bool = True
    tokens: int = 400
    micro: int = 2
    packed: bool = False
    parallel: int = 1
    mini_batches: int = 1
    precision: str = "fp32"
    engine: dict[str, Any] = field(default_factory=dict)
    actor: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def rows_of(groups: list[Group], processor: Any) -> list[dict[str, Any]]:
    """The rollouts as from verl's agent loop to the workers, one per row."""
    rows = []
    for place, group in enumerate(groups):
        parts = [{"type": "image", "image": image} for image in group.images]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": group.text}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        made = processor(text=[text], images=group.images or None, return_tensors="pt")
        assert made["input_ids"][0].tolist() == group.prompt.tolist(), "verl's processor makes the trainer's prompt"
        images = {name: made[name] for name in ("pixel_values", "image_grid_thw") if name in made}
        for number, response in enumerate(group.responses):
            ids = torch.cat([group.prompt, response])
            kinds = (ids == processor.tokenizer.convert_tokens_to_ids(processor.image_token)).long()
            rope, _ = processor.get_rope_index(
                input_ids=ids[None],
                attention_mask=torch.ones_like(ids)[None],
                image_grid_thw=images.get("image_grid_thw"),
                mm_token_type_ids=kinds[None],
            )
            reward = torch.zeros(len(response))
            reward[-1] = group.rewards[number]
            rows.append(
                {
                    "uid": f"uid-{place}",
                    "session_id": number,
                    "global_steps": EPOCH * STEPS_PER_EPOCH + 1,
                    "extra_info": {"sample_id": group.sample_id},
                    "extra_fields": {"reward_extra_info": {"injected": group.rewards[number]}},
                    "raw_prompt": messages,
                    "multi_modal_inputs": images,
                    "input_ids": ids,
                    "prompts": group.prompt,
                    "responses": response,
                    "position_ids": torch.cat([torch.arange(len(ids))[None], rope[:, 0]]),
                    "response_mask": torch.ones_like(response),
                    "loss_mask": torch.ones_like(response),
                    "old_log_probs": group.old_logps[number],
                    "advantages": torch.full((len(response),), group.advantages[number]),
                    "rm_scores": reward,
                }
            )
    return rows


def worker_of(case: Case) -> CPPOTrainingWorker:
    """verl's worker with the embedded model, and the method's loss."""
    model = HFModelConfig(
        path=str(MICRO_DIR),
        use_remove_padding=case.packed,
        override_config={"attn_implementation": "sdpa"},
        enable_gradient_checkpointing=False,
        **case.model,
    )
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={**FLOAT32, "param_dtype": case.precision},
        use_torch_compile=False,
        ulysses_sequence_parallel_size=case.parallel,
        use_dynamic_bsz=case.dynamic,
        max_token_len_per_gpu=case.tokens,
        micro_batch_size_per_gpu=case.micro,
        infer_max_token_len_per_gpu=case.tokens,
        infer_micro_batch_size_per_gpu=case.micro,
        **{"entropy_from_logits_with_chunking": True, **case.engine},
    )
    optimizer = FSDPOptimizerConfig(lr=1e-3, total_training_steps=10, clip_grad=1e9)
    worker = CPPOTrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    size = 16 // case.mini_batches
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_mini_batch_size=size,
        ppo_micro_batch_size_per_gpu=case.micro,
        use_dynamic_bsz=case.dynamic,
        optim=optimizer,
        **case.actor,
    )
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    if case.options is not None:
        worker.use_method(options_from({"seed": SEED, **case.options}), steps_per_epoch=STEPS_PER_EPOCH)
    return worker


def step(case: Case, groups: list[Group]) -> dict[str, Any]:
    """The result of one update."""
    rank, world = dist.get_rank() // case.parallel, dist.get_world_size() // case.parallel
    worker = worker_of(case)
    selected: dict[str, list[int]] = {}

    def watch(data: TensorDict, scores: Any) -> None:
        """Keep the perception tokens of each gated-in rollout, by prompt and number."""
        places = (data["cppo_role"] == 0).nonzero().squeeze(1).tolist()
        for place, mask in zip(places, scores.token_mask, strict=True):
            chosen = mask.nonzero().squeeze(1).tolist()
            selected[f"{data['uid'][place]}/{data['session_id'][place]}"] = chosen

    if case.options is not None and worker.loss_fn is not None:
        worker.loss_fn.watch = watch
    rows = rows_of(groups, worker.model_config.processor)
    data = tu.list_of_dict_to_tensordict(rows[rank::world])
    size = len(rows) // case.mini_batches
    tu.assign_non_tensor(
        data, mini_batch_size=size, global_batch_size=size, temperature=TEMPERATURE, calculate_entropy=True
    )
    output = worker.train_mini_batch(data)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, selected)
    found = {name: value for part in parts for name, value in part.items()}
    if output is None:
        return {}
    metrics = {name: _number(value) for name, value in tu.get(output, "metrics").items()}
    return {"metrics": metrics, "selected": found}


def _number(value: Any) -> Any:
    values = [
        one.aggregate() if hasattr(one, "aggregate") else one for one in (value if isinstance(value, list) else [value])
    ]
    return [float(one) for one in values]


def main(cases: str, out: str) -> None:
    """Run all cases; a mistake's message replaces a case's numbers."""
    dist.init_process_group("gloo")
    groups, _ = read()
    results: dict[str, Any] = {}
    for name, fields in json.loads(Path(cases).read_text()).items():
        torch.manual_seed(0)
        try:
            results[name] = step(Case(**fields), groups)
        except UserError as error:
            results[name] = {"refused": str(error)}
        dist.barrier()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
