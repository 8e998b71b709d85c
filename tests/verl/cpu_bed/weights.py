"""How weights travel from the trainer to rollouts on other devices, on one machine: through a mailbox, a Ray actor.

`actor_rollout_ref.rollout.checkpoint_engine.backend=mailbox` with this module as its `custom_backend_module`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from cpu_bed import rollout  # noqa: F401  (the processes beside such rollouts import no other module of ours)

Weights = dict[str, torch.Tensor]


@ray.remote(num_cpus=0)
class Mailbox:
    """Keeps the weights of a sync until each of its readers has them."""

    def __init__(self) -> None:
        self.weights: asyncio.Queue[Weights] = asyncio.Queue()

    async def put(self, weights: Weights, readers: int) -> None:
        for _ in range(readers):
            await self.weights.put(weights)

    async def take(self) -> Weights:
        return await self.weights.get()


@CheckpointEngineRegistry.register("mailbox")
class MailboxEngine(CheckpointEngine):
    """The sender is the first process of the trainer; the others only take part in gathering the weights."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master, self.readers = is_master, 0

    def prepare(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        readers = [rollout_world_size]
        return {"readers": readers * actor_wg_world_size}, {"readers": readers * rollout_world_size}

    def init_process_group(self, readers: int) -> None:
        self.readers = readers
        self.mailbox = Mailbox.options(name="mailbox", get_if_exists=True, lifetime="detached").remote()

    def finalize(self) -> None:
        pass

    async def send_weights(self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        gathered = {name: tensor.detach().clone() for name, tensor in weights}
        if self.is_master:
            await self.mailbox.put.remote(gathered, self.readers)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        for item in (await self.mailbox.take.remote()).items():
            yield item
