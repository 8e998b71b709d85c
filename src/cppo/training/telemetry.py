"""What a step reports: where its time went, the term's share of the gradient, a few rollouts, rewards never earned."""

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
"""Generation with all that prepares it; rewards; waiting for views and processing them; forward passes over responses;
the rest: loss, backward pass, optimizer."""
Moment = float | torch.cuda.Event
"""Seconds, or a place in the order of what a GPU computes."""
Mark = tuple[Moment, str | None]
"""A moment, and the phase that begins then; None where the latest phase ends."""
MIB = 2**20
MAX_SAMPLES = 4
FIRST_STEPS = 3
"""Optimizer steps after which a reward that nothing ever earned is reported."""
KEPT = 64
"""Responses that are looked through."""
LOOKS_FOR = {"format_reward": (THINK, BOX), "accuracy_reward": (BOX,)}
"""The standard rewards by their functions' names, and what a response needs to earn them."""


def seconds_between(since: Any, until: Any) -> float:
    """Between two moments of one device, of which a GPU has reached the second."""
    seconds: float = until - since if isinstance(since, float) else since.elapsed_time(until) / 1000
    return seconds


def phase_seconds(marks: Sequence[Mark]) -> dict[str, float]:
    """The seconds of each of `PHASES` between the first mark and the last; each counts once, in the innermost phase.

    On a GPU this waits for the last mark, once.
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
    """Logs the seconds and the memory of each optimizer step, and begins its marks anew.

    Args:
        marks: of the step that is under way, none outside of one; the first begins "update".
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
    """The peaks of this process since it began, in MiB: resident memory, and PyTorch's allocations on a GPU."""
    found = {"memory/peak_rss_mib": _peak_rss_bytes() / MIB}
    if device.type == "cuda":
        found["memory/peak_cuda_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return found


def _peak_rss_bytes() -> int:
    # On Linux `ru_maxrss` begins with the memory of the process that started this one.
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
        """Add the gradient of a micro-batch's weighted perception term; its graph is kept for the backward pass."""
        grads = torch.autograd.grad(weighted_term, self._parameters, retain_graph=True, allow_unused=True)
        for total, grad in zip(self._grads, grads, strict=True):
            if grad is not None:
                total += grad

    def value(self, accelerator: Accelerator) -> float:
        """`|g_perception| / (|g_perception| + |g_rest|)`, a fraction; the rest is the whole gradient less this one.

        To be read after the step's last backward pass and before its clipping. NaN if both are zero.
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
    """A rollout that was trained on, as tensors on the trainer's device, [T] each with padding at the end.

    Attributes:
        step: the optimizer step, from 1.
        row: its row of the dataset.
        reward: a scalar.
        ids, mask: its tokens, and 1 for those that are no padding.
        found: dependency scores and selected tokens; empty where no view was scored.
    """

    step: int
    row: dict[str, Any]
    reward: Tensor
    ids: Tensor
    mask: Tensor
    found: Sequence[Tensor]

    def sample(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """What reports show of it."""
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
    """Remembers the rows of the generation batch, and the latest few rollouts that were trained on.

    These are decoded where they are read, so that no micro-batch waits for their values.
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
        """The rows of a generation batch, in order, as the rollouts see them, and a number for the prompt of each."""
        # A row without a prompt gets it from an environment, which changes it as it goes.
        self._rows = list(rows) if all("prompt" in row for row in rows) else []
        self._prompts = list(prompts)

    def keep(self, inputs: Mapping[str, Any], scored: Sequence[int], found: Sequence[Tensor], step: int) -> None:
        """Replace the latest samples by up to `MAX_SAMPLES` rollouts of a micro-batch.

        Different prompts come first. Rollouts scored under the views replace others of their step, of which no token is
        selected.

        Args:
            inputs: the micro-batch, with `rollout_place` in the generation batch and `rollout_reward`, [B]. One from a
                checkpoint of cppo 0.1.0 has no rewards, and nothing is kept.
            scored: places of the n rollouts that were scored under the views.
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
        """Places of the rollouts, the first one of each prompt first, then the second ones, and so on."""
        seen: Counter[int] = Counter()
        turns = []
        for rollout in rollouts:
            prompt = self._prompts[rollout]
            turns.append(seen[prompt])
            seen[prompt] += 1
        return sorted(range(len(rollouts)), key=turns.__getitem__)


class FormWatch(TrainerCallback):
    """Tells once, after `FIRST_STEPS` steps, why no response had the form that the standard rewards look for.

    Args:
        rewards: the names of the run's rewards.

    Attributes:
        form: of the model's chat template and tokenizer.
        warning: what was reported; None before, and where there was nothing to report.
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
        """What the run's rewards look for; nothing where none is a standard one."""
        return LOOKS_FOR[self._reward] if self._reward else ()

    def with_opening(self, rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """The rows with the column `prompt_opens` where the chat template opens the response: rewards may count it."""
        return [{**row, "prompt_opens": self.form.opened} for row in rows] if self.form.opened else rows

    def see(self, prompts: Sequence[Any], completions: Sequence[Any], rewards: Tensor, names: Sequence[str]) -> None:
        """Look at a batch. rewards: [B, R] of all processes, by the R names; prompts and completions are this one's."""
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
            self._earned = True  # wrong answers are no matter of form
            return
        causes = self.form.causes(self._prompts, self._responses, self.marks)
        what = str(self._reward).removesuffix("_reward")
        self.warning = f"{what} 0 % in the first {state.global_step} steps: {'; '.join(causes)}"
        tell(f"warning: {self.warning}")
