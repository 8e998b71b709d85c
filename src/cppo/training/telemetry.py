"""Reports of a step: time per phase, the perception term's means and gradient share, sampled rollouts."""

import math
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cppo.perception import METRICS, Metrics

PHASES = ("rollout", "reward", "views", "scoring", "update")
"""Generation and its preparation; rewards; waiting for views and processing them; forward passes over responses; the
rest: loss, backward pass, optimizer.
"""
Moment = float | torch.cuda.Event
"""Seconds, or an event in a GPU's stream."""
Mark = tuple[Moment, str | None]
"""A moment and the phase that begins there; None where the latest phase ends."""
MIB = 2**20
MAX_SAMPLES = 4


def seconds_between(since: Any, until: Any) -> float:
    """Seconds between two moments of one device; a GPU must have reached the second."""
    seconds: float = until - since if isinstance(since, float) else since.elapsed_time(until) / 1000
    return seconds


def phase_seconds(marks: Sequence[Mark]) -> dict[str, float]:
    """The seconds of each of `PHASES` between the first mark and the last; nested time counts in the innermost phase.

    On a GPU this waits once for the last mark.
    """
    seconds = dict.fromkeys(PHASES, 0.0)
    running: list[str] = []
    if marks and not isinstance(last := marks[-1][0], float):
        last.synchronize()
    for (since, phase), (until, _) in pairwise(marks):
        if phase is None:
            running.pop()
        else:
            running.append(phase)
        seconds[running[-1]] += seconds_between(since, until)
    return seconds


class StepCosts(TrainerCallback):
    """Measures the phases of each optimizer step, and logs their seconds and the memory at its end.

    Args:
        device: on which phases are timed, and whose memory is reported.
        log: takes a metric's name and value.

    Attributes:
        marks: of the current step; empty outside a step.
    """

    def __init__(self, device: torch.device, log: Callable[[str, float], None]) -> None:
        self.marks: list[Mark] = []
        self._device, self._log = device, log

    def begin(self) -> None:
        """A micro-batch begins, and with the first one the step."""
        if not self.marks:
            self._mark("update")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context: its time counts as this phase of the current step, if there is one."""
        if not self.marks:
            yield
            return
        self._mark(name)
        try:
            yield
        finally:
            self._mark(None)

    def _mark(self, phase: str | None) -> None:
        """The phase begins now; on a GPU when the queued work is done, without waiting for it."""
        moment: Moment = time.perf_counter()
        if self._device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self._device))
        self.marks.append((moment, phase))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark(None)
        costs = {f"time/{phase}": seconds for phase, seconds in phase_seconds(self.marks).items()}
        self.marks.clear()
        for name, value in (costs | peak_memory_mib(self._device)).items():
            self._log(name, value)


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """The peaks of this process since its start, in MiB: resident memory, and PyTorch's allocations on a GPU."""
    found = {"memory/peak_rss_mib": _peak_rss_bytes() / MIB}
    if device.type == "cuda":
        found["memory/peak_cuda_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return found


def _peak_rss_bytes() -> int:
    # On Linux `ru_maxrss` starts at the memory of the parent process.
    status = Path("/proc/self/status")
    own = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    if own is not None:
        return int(own[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PerceptionMeans:
    """Means of the perception loss's `METRICS` over the micro-batches of one optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(METRICS), 2, device=device)

    def add(self, metrics: Metrics) -> None:
        """Add the sums and counts of a micro-batch."""
        for own, name in zip(self._sums, METRICS, strict=True):
            if name in metrics:
                total, count = metrics[name]
                own += torch.stack([total.float(), count.float()])

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes, NaN without a count; the next step starts at 0."""
        sums = accelerator.reduce(self._sums, "sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        return {name: total / count if count else math.nan for name, (total, count) in zip(METRICS, sums, strict=True)}


class GradientShare:
    """Collects the perception term's gradient over the micro-batches of one optimizer step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._grads = [torch.zeros_like(parameter) for parameter in self._parameters]

    def add(self, weighted_term: Tensor) -> None:
        """Add the gradient of a micro-batch's weighted perception term; keeps its graph for the backward pass."""
        grads = torch.autograd.grad(weighted_term, self._parameters, retain_graph=True, allow_unused=True)
        for total, grad in zip(self._grads, grads, strict=True):
            if grad is not None:
                total += grad

    def value(self, accelerator: Accelerator) -> float:
        """`|g_perception| / (|g_perception| + |g_rest|)`, a fraction; g_rest is the full gradient without g_perception.

        Call it after the step's last backward pass and before clipping. NaN if both are zero.
        """
        scaler = getattr(accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        perception, rest = [], []
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            if accelerator.distributed_type != DistributedType.NO:
                grad = accelerator.reduce(grad, "mean")
            whole = torch.zeros_like(grad) if parameter.grad is None else parameter.grad / scale
            perception.append(grad.float().norm())
            rest.append((whole - grad).float().norm())
        norm = torch.stack(perception).norm().item()
        total = norm + torch.stack(rest).norm().item()
        return norm / total if total else math.nan


@dataclass(frozen=True)
class KeptRollout:
    """A trained rollout, as tensors on the trainer's device, [T] each with padding at the end.

    Attributes:
        step: the optimizer step, from 1.
        row: its row of the dataset.
        reward: a scalar.
        ids, mask: its tokens, and 1 for those that are not padding.
        found: dependency scores and selected tokens; empty where no view was scored.
    """

    step: int
    row: dict[str, Any]
    reward: Tensor
    ids: Tensor
    mask: Tensor
    found: Sequence[Tensor]

    def sample(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """The sample for reports."""
        length = int(self.mask.sum())
        return {
            "step": self.step,
            "prompt": self.row["prompt"],
            "images": self.row.get("images") or [],
            "answer": self.row.get("answer"),
            "reward": self.reward.item(),
            "completion_tokens": [decode([token]) for token in self.ids[:length].tolist()],
            "perception": self.found[1][:length].tolist() if self.found else [False] * length,
            "score": self.found[0][:length].tolist() if self.found else [0.0] * length,
        }


class RolloutSamples:
    """Keeps the rows of the generation batch, and the latest few rollouts that were trained on.

    Rollouts are decoded only when read, so that no micro-batch waits for their values.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._kept: list[KeptRollout] = []
        self._rows: list[dict[str, Any]] = []
        self._prompts: list[int] = []

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The latest samples."""
        return [rollout.sample(self._decode) for rollout in self._kept]

    @property
    def knows_rows(self) -> bool:
        """False until `begin`, also after a resume in the middle of a generation batch."""
        return bool(self._rows)

    def begin(self, rows: Sequence[dict[str, Any]], prompts: Sequence[int]) -> None:
        """Take a generation batch's rows, in order, as the rollouts see them, and a number for each row's prompt."""
        # An environment gives a row without a prompt its prompt, and changes it during the rollout.
        self._rows = list(rows) if all("prompt" in row for row in rows) else []
        self._prompts = list(prompts)

    def keep(self, inputs: Mapping[str, Any], scored: Sequence[int], found: Sequence[Tensor], step: int) -> None:
        """Replace the latest samples by up to `MAX_SAMPLES` rollouts of a micro-batch.

        Different prompts come first. Rollouts scored under the views replace those of their step without selected
        tokens.

        Args:
            inputs: the micro-batch, with `rollout_place` in the generation batch and `rollout_reward`, [B]. A
                checkpoint of cppo 0.1.0 has no rewards; then nothing is kept.
            scored: indices of the n rollouts that were scored under the views.
            found: their dependency scores and selected tokens, [n, T] each; empty if there are none.
            step: the optimizer step, from 1.
        """
        if not self._rows or "rollout_reward" not in inputs:
            return
        if not found and self._kept and self._kept[0].step == step:
            return
        self._kept = []
        own = [place for place, rollout in enumerate(inputs["rollout_place"]) if rollout is not None]
        places = own if not found else scored
        for index in self._one_a_prompt([inputs["rollout_place"][place] for place in places])[:MAX_SAMPLES]:
            place = places[index]
            row = self._rows[inputs["rollout_place"][place]]
            reward, ids, mask = (
                inputs[name][place] for name in ("rollout_reward", "completion_ids", "completion_mask")
            )
            scores = [values[index].detach() for values in found]
            self._kept.append(KeptRollout(step, row, reward, ids, mask, scores))

    def _one_a_prompt(self, rollouts: Sequence[int]) -> list[int]:
        """Indices of the rollouts: the first of each prompt, then the second of each, and so on."""
        seen: Counter[int] = Counter()
        turns = []
        for rollout in rollouts:
            prompt = self._prompts[rollout]
            turns.append(seen[prompt])
            seen[prompt] += 1
        return sorted(range(len(rollouts)), key=turns.__getitem__)
