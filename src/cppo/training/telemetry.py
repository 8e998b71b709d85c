"""Reports of a step: time per phase, the perception term's gradient share, sampled rollouts, unearned rewards."""

import math
import re
import resource
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cppo.errors import tell
from cppo.rewards.extract import completion_text
from cppo.rewards.form import BOX, THINK, ChatForm

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
FIRST_STEPS = 3
"""Optimizer steps before a report of a reward that nothing earned."""
KEPT = 64
"""Number of responses that are searched."""
LOOKS_FOR = {"format_reward": (THINK, BOX), "accuracy_reward": (BOX,)}
"""The standard rewards by their functions' names, and the form that each needs in a response."""


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
    """Logs the seconds and the memory of each optimizer step, and starts new marks.

    Args:
        marks: of the current step, empty outside a step; the first begins "update".
        mark: appends one to them.
        device: whose memory is reported.
        log: takes a metric's name and value.
    """

    def __init__(
        self,
        marks: list[Mark],
        mark: Callable[[str | None], None],
        device: torch.device,
        log: Callable[[str, float], None],
    ) -> None:
        self._marks, self._mark, self._device, self._log = marks, mark, device, log

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark(None)
        costs = {f"time/{phase}": seconds for phase, seconds in phase_seconds(self._marks).items()}
        self._marks.clear()
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


class FormWatch(TrainerCallback):
    """Reports once, after `FIRST_STEPS` steps, why no response had the form that the standard rewards need.

    Args:
        rewards: the names of the run's rewards.

    Attributes:
        form: of the model's chat template and tokenizer.
        warning: the report; None before, and without anything to report.
    """

    def __init__(self, form: ChatForm, rewards: Sequence[str]) -> None:
        self.form = form
        self.warning: str | None = None
        self._reward = next((name for name in LOOKS_FOR if name in rewards), None)
        self._earned = self._reward is None
        self._prompts: list[Any] = []
        self._responses: list[str] = []

    @property
    def marks(self) -> tuple[str, ...]:
        """The forms that the run's standard rewards need; empty without standard rewards."""
        return LOOKS_FOR[self._reward] if self._reward else ()

    def with_opening(self, rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """The rows with the column `prompt_opens` where the chat template opens the response; rewards may use it."""
        return [{**row, "prompt_opens": self.form.opened} for row in rows] if self.form.opened else rows

    def see(self, prompts: Sequence[Any], completions: Sequence[Any], rewards: Tensor, names: Sequence[str]) -> None:
        """Take a batch. rewards: [B, R] of all processes, by the R names; prompts and completions: of this process."""
        if self._earned or self.warning is not None:
            return
        self._earned = bool((rewards[:, list(names).index(str(self._reward))] > 0).any())
        room = KEPT - len(self._responses)
        self._prompts += prompts[:room]
        self._responses += map(completion_text, completions[:room])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._earned or self.warning is not None or state.global_step < min(FIRST_STEPS, state.max_steps):
            return
        boxed = any("\\boxed{" in response for response in self._responses)
        if self._reward == "accuracy_reward" and boxed:
            self._earned = True  # wrong answers have another cause than form
            return
        causes = self.form.causes(self._prompts, self._responses, self.marks)
        what = str(self._reward).removesuffix("_reward")
        steps = f"{state.global_step} step{'s' * (state.global_step > 1)}"
        self.warning = f"{what} 0 % in the first {steps}: {'; '.join(causes)}"
        tell(f"warning: {self.warning}")
