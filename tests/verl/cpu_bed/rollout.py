"""A rollout backend for the CPU: a Ray actor that answers verl's requests with a transformers model, many at a time.

`actor_rollout_ref.rollout.name=cpu` with `actor_rollout_ref.model.external_lib=cpu_bed.rollout`. Every request has
random numbers of its own, from the seed, the weights' version, its prompt and how many such requests came before: the
rollouts of a prompt are the same in every run, whatever order they come in.
"""

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from cpu_bed import micro  # noqa: F401  (in the trainer's processes too, which import this module)

GATHER_SECONDS = 0.1
"""How long requests are waited for that can be answered together."""


@dataclass
class Request:
    """A prompt's tokens with their images, how many tokens may follow, and where the answer goes."""

    prompt: list[int]
    images: list[Any]
    limit: int
    temperature: float
    generator: torch.Generator
    answer: asyncio.Future


class GumbelNoise(LogitsProcessor):
    """Makes the largest score a sample of the softmax, each row by its own generator.

    The tokens that are `banned`, the model's marks for images, are never drawn.
    """

    def __init__(self, requests: list[Request], banned: list[int]) -> None:
        self.requests, self.banned = requests, banned

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.banned] = -torch.inf
        for row, request in zip(scores, self.requests, strict=True):
            if request.temperature > 0:
                uniform = torch.rand(row.shape, generator=request.generator).clamp(min=1e-20)
                row.div_(request.temperature).sub_((-uniform.log()).log())
        return scores


class RolloutServer:
    """Answers requests until it is told to pause; then it returns what has been generated so far."""

    def __init__(self, path: str, response_length: int, seed: int) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="sdpa").eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.response_length, self.seed, self.version = response_length, seed, 0
        self.seen: Counter[str] = Counter()
        self.waiting: list[Request] = []
        self.open, self.rejects = asyncio.Event(), False
        self.open.set()
        self.model_in_use = asyncio.Lock()
        self.serving: asyncio.Task | None = None

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], image_data: Any = None, **_: Any
    ) -> TokenOutput:
        if self.rejects:
            return self._nothing()
        self.serving = self.serving or asyncio.create_task(self._serve())
        what = json.dumps([self.seed, self.version, list(prompt_ids)])
        self.seen[what] += 1
        digest = hashlib.sha256(f"{what} {self.seen[what]}".encode()).digest()
        request = Request(
            prompt=list(prompt_ids),
            images=list(image_data or []),
            limit=sampling_params.get("max_tokens", self.response_length),
            temperature=sampling_params.get("temperature", 1.0),
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:8])),
            answer=asyncio.get_running_loop().create_future(),
        )
        self.waiting.append(request)
        return await request.answer

    async def _serve(self) -> None:
        while True:
            await asyncio.sleep(GATHER_SECONDS)
            await self.open.wait()
            async with self.model_in_use:
                batch, self.waiting = self.waiting, []
                if not batch:
                    continue
                try:
                    outputs = await asyncio.to_thread(self._answer, batch)
                except Exception as error:
                    for request in batch:
                        request.answer.set_exception(error)
                else:
                    for request, output in zip(batch, outputs, strict=True):
                        request.answer.set_result(output)

    @torch.inference_mode()
    def _answer(self, batch: list[Request]) -> list[TokenOutput]:
        config, longest = self.model.config, max(len(request.prompt) for request in batch)
        pad, end = self.processor.tokenizer.pad_token_id, self.processor.tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (longest - len(request.prompt)) + request.prompt for request in batch])
        mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
        inputs: dict[str, Any] = {}
        images = [image for request in batch for image in request.images]
        if images:
            inputs = dict(self.processor.image_processor(images=images, return_tensors="pt"))
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
        marks = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
        generated = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **inputs,
            do_sample=False,
            max_new_tokens=max(request.limit for request in batch),
            logits_processor=[GumbelNoise(batch, marks)],
            stopping_criteria=[lambda tokens, _: torch.full((len(tokens),), not self.open.is_set())],
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(generated.logits, dim=1)
        return [
            self._output(request, row[longest:].tolist(), own, end)
            for request, row, own in zip(batch, generated.sequences, logits, strict=True)
        ]

    def _output(self, request: Request, tokens: list[int], logits: torch.Tensor, end: int) -> TokenOutput:
        tokens = tokens[: request.limit]
        is_whole = end in tokens
        if is_whole:
            tokens = tokens[: tokens.index(end) + 1]
        logps = (logits[: len(tokens)] / (request.temperature or 1.0)).log_softmax(-1)
        chosen = logps.gather(-1, torch.tensor(tokens)[:, None])[:, 0] if tokens else torch.zeros(0)
        return TokenOutput(
            token_ids=tokens,
            log_probs=chosen.tolist(),
            stop_reason="completed" if is_whole or len(tokens) == request.limit else "aborted",
            extra_fields={"global_steps": self.version},
        )

    async def load(self, weights: dict[str, torch.Tensor], version: int | None) -> None:
        async with self.model_in_use:
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
            tied = set(self.model.all_tied_weights_keys)
            assert not unexpected
            assert set(missing) <= tied, missing
            self.version = self.version if version is None else version

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        self.open.clear()
        self.rejects = reject_request
        async with self.model_in_use:
            if self.rejects:
                waiting, self.waiting = self.waiting, []
                for request in waiting:
                    request.answer.set_result(self._nothing())

    def _nothing(self) -> TokenOutput:
        return TokenOutput(
            token_ids=[], log_probs=[], stop_reason="aborted", extra_fields={"global_steps": self.version}
        )

    async def resume_generation(self) -> None:
        self.rejects = False
        self.open.set()

    async def wake_up(self) -> None: ...
    async def sleep(self) -> None: ...
    async def clear_kv_cache(self) -> None: ...
    async def release_kv_cache(self) -> None: ...
    async def resume_kv_cache(self) -> None: ...


def server_name(replica_rank: int) -> str:
    return f"rollout_server_{replica_rank}"


class CPUReplica(RolloutReplica):
    """One server."""

    async def launch_servers(self) -> None:
        name = server_name(self.replica_rank)
        server = (
            ray.remote(num_cpus=0)(RolloutServer)
            .options(name=name, max_concurrency=self.max_concurrency)
            .remote(self.model_config.path, self.config.response_length, self.config.seed)
        )
        self.servers, self._server_handle, self._server_address = [server], server, name


class CPURollout(BaseRollout):
    """Brings new weights to the server that shares this process's device, or to that of `replica_rank`."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int | None = None) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank is None else replica_rank
        self.is_leader_rank = True

    async def resume(self, tags: list[str]) -> None: ...
    async def release(self) -> None: ...

    async def update_weights(
        self, weights: Iterator | AsyncIterator, global_steps: int | None = None, **_: Any
    ) -> None:
        tensors = {name: tensor.detach().clone() async for name, tensor in ensure_async_iterator(weights)}
        await ray.get_actor(server_name(self.replica_rank)).load.remote(tensors, global_steps)


RolloutReplicaRegistry.register("cpu", lambda: CPUReplica)
base._ROLLOUT_REGISTRY["cpu", "async"] = f"{__name__}.CPURollout"
