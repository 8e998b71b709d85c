"""A recipe's batches in verl's units: prompts on all GPUs, one generation batch per step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cppo.errors import UserError
from cppo.verl.counterparts import ACTOR, ROLLOUT

ROWS_OF_A_GROUP = 3
"""A rollout and its two views, which stay in one micro-batch."""
DEFAULT_PROMPT_TOKENS = 2048
MODES = ("sync", "colocate_async", "separate_async")
"""verl's trainers; we have a counterpart of each."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a run.

    Attributes:
        recipe_gpus: the processes that the recipe's batch sizes assume; verl's batches count prompts on all GPUs.
        rollout_nodes: additional nodes that only generate, for the mode `separate_async`.
        mode: verl's `trainer.v1.trainer_mode`, one of `MODES`.
    """

    recipe_gpus: int = 8
    nodes: int = 1
    gpus_per_node: int = 8
    rollout_nodes: int = 1
    mode: str = "sync"


class Values(dict[str, Any]):
    """The options of a run. It records which were read, and collects differences of verl."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()
        self.instead: dict[str, str] = {}

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


def batches(values: Values, cluster: Cluster) -> dict[str, Any]:
    """verl counts prompts on all GPUs; its step is a generation batch."""
    for name in ("num_generations", "max_completion_length"):
        if values[name] is None:
            raise UserError(f"{name}: verl needs a number")
    together, step = rollouts_of_a_batch(values, cluster)
    group, gpus = values["num_generations"], cluster.nodes * cluster.gpus_per_node
    for name, rollouts in (("steps_per_generation", together), ("gradient_accumulation_steps", step)):
        if rollouts % group:
            raise UserError(
                f"{name} gives batches of {rollouts} rollouts, which do not split into whole groups of {group}"
            )
    if step % together == 0 and step > together:
        values.instead["steps_per_generation"] = f"the {step} rollouts of an optimizer step are generated together"
        together = step
    if together % step:
        raise UserError(
            f"steps_per_generation: {together} rollouts of a generation batch are not a multiple of the {step} of an "
            "optimizer step, which verl requires: give a multiple of gradient_accumulation_steps"
        )
    if step % gpus:
        raise UserError(
            f"--nodes {cluster.nodes} --gpus_per_node {cluster.gpus_per_node}: {gpus} GPUs cannot share the "
            f"{step} rollouts of an optimizer step equally"
        )
    budget = ROWS_OF_A_GROUP * (
        (values["max_prompt_tokens"] or DEFAULT_PROMPT_TOKENS) + values["max_completion_length"]
    )
    found = {
        "data.train_batch_size": together // group,
        f"{ACTOR}.ppo_mini_batch_size": step // group,
        f"{ACTOR}.use_dynamic_bsz": True,
        f"{ACTOR}.ppo_max_token_len_per_gpu": budget,
        "trainer.nnodes": cluster.nodes,
        "trainer.n_gpus_per_node": cluster.gpus_per_node,
        "trainer.v1.trainer_mode": cluster.mode,
    }
    if cluster.mode == "separate_async":
        found["trainer.v1.separate_async.parameter_sync_step"] = together // step
        found[f"{ROLLOUT}.nnodes"] = cluster.rollout_nodes
        found[f"{ROLLOUT}.checkpoint_engine.backend"] = "nccl"
    return found


def rollouts_of_a_batch(values: Values, cluster: Cluster) -> tuple[int, int]:
    """Rollouts on all GPUs: of a generation batch, and of an optimizer step."""
    micro, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    steps = values["steps_per_generation"] or accumulation
    together = values["generation_batch_size"] or cluster.recipe_gpus * micro * steps
    return together, cluster.recipe_gpus * micro * accumulation


def updates_of_a_batch(values: Values, cluster: Cluster) -> int:
    """Optimizer steps that train on the same rollouts."""
    together, step = rollouts_of_a_batch(values, cluster)
    return max(1, together // step) * values["num_iterations"]


def batches_of(values: Values, cluster: Cluster, name: str) -> int:
    """Convert an option from optimizer steps to verl's unit, generation batches."""
    updates, steps = updates_of_a_batch(values, cluster), values[name]
    if 0 < steps < 1:
        values.instead[name] = "verl accepts no fraction of a run: 1 generation batch"
        return 1
    batches = max(1, math.ceil(steps / updates))
    if batches * updates != steps:
        values.instead[name] = f"verl counts generation batches of {updates} steps: {batches}"
    return batches
