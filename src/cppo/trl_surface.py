"""All uses of TRL beyond its public API, with probes that it still works as we need.

Other files import these parts from here. `cppo.upstream` lists the methods of TRL's trainer that ours overrides.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from trl.trainer.utils import RepeatSampler, split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from cppo.probing import expect

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = [
    "RepeatSampler",
    "split_pixel_values_by_grid",
    "split_tensor_dict",
    "unsplit_pixel_values_by_grid",
]

MicroBatch = dict[str, Any]
LATER_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Names of TRL 1.16's configuration, and those that transformers 5.24 has for them."""


class TRLTrainer(Protocol):
    """The attributes of `trl.GRPOTrainer` that these functions read and set."""

    args: Any
    state: Any
    num_iterations: int
    _step: int
    _buffered_inputs: list[MicroBatch] | None
    _metrics: dict[str, defaultdict[str, list[float]]]
    _logs: dict[str, Any]


def take_later_names(args: Any) -> None:
    """Pass on what a configuration says of gradient checkpointing by the names that transformers has for it since 5.24.

    TRL's defaults stand under the names of before, for which transformers warns.
    """
    for before, now in LATER_NAMES.items():
        if getattr(args, now, args) is None:  # an earlier transformers has no such name
            setattr(args, now, getattr(args, before))


@contextmanager
def without_trls_warnings() -> Iterator[None]:
    """Within this context transformers does not warn that TRL calls its models by the names of before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
        yield


def log_metric(trainer: TRLTrainer, name: str, value: float) -> None:
    """Make the trainer log the mean of the values since its last log, in training."""
    trainer._metrics["train"][name].append(value)


@contextmanager
def rollouts_apart(trainer: TRLTrainer, name: str) -> Iterator[None]:
    """Context: metrics of rollouts and their rewards get names after `name/`, and appear in no table."""
    metrics, table = trainer._metrics, trainer._logs
    trainer._metrics = {mode: defaultdict(list) for mode in metrics}
    trainer._logs = {column: defaultdict(list) if isinstance(values, dict) else [] for column, values in table.items()}
    try:
        yield
        for mode, own in trainer._metrics.items():
            for metric, values in own.items():
                if not metric.startswith("rewards/"):  # rewards do not describe these rollouts
                    metrics[mode][f"{name}/{metric}"] += values
    finally:
        trainer._metrics, trainer._logs = metrics, table


@contextmanager
def unlogged(trainer: TRLTrainer) -> Iterator[None]:
    """Context: the trainer's rollouts and rewards leave no metric, no logged column and no count."""
    own = {name: getattr(trainer, name) for name in ("_metrics", "_pending_extra_logs", "_pending_metrics")}
    tokens = trainer.state.num_input_tokens_seen
    vars(trainer).update({"_metrics": {mode: defaultdict(list) for mode in ("train", "eval")}})
    vars(trainer).update({name: defaultdict(list) for name in own if name != "_metrics"})
    try:
        yield
    finally:
        vars(trainer).update(own)
        trainer.state.num_input_tokens_seen = tokens


def replace_advantages(trainer: TRLTrainer, advantages: Sequence[float]) -> None:
    """Log these advantages of all processes' rollouts instead of the last recorded ones."""
    logged = trainer._logs["advantages"]
    for place, value in enumerate(reversed(advantages), start=1):
        if place <= len(logged):
            logged[-place] = value
    trainer._metrics["train"]["frac_reward_zero_std"][-1] = sum(value == 0 for value in advantages) / len(advantages)


def run_folder(trainer: "Trainer", trial: Any) -> str:
    """The folder of checkpoints; in a hyperparameter search, each `trial` has its own."""
    return trainer._get_output_dir(trial=trial)


# The buffer holds `steps_per_generation` micro-batches of rollouts, which train `num_iterations` times.


def micro_step(trainer: TRLTrainer) -> int:
    """Number of micro-batches that were trained on. In a resumed run TRL counts from 0 again."""
    return trainer._step


def generation_batches(trainer: TRLTrainer) -> int:
    """Number of generation batches that are fully trained on."""
    return trainer._step // (trainer.args.steps_per_generation * trainer.num_iterations)


def generates_next(trainer: TRLTrainer) -> bool:
    """Whether the next micro-batch begins with new rollouts, because the buffer is used up or empty."""
    used_up = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) == 0
    return used_up or trainer._buffered_inputs is None


def next_micro_batches(trainer: TRLTrainer, count: int = 1) -> list[MicroBatch]:
    """The buffer's next micro-batches."""
    assert trainer._buffered_inputs is not None
    steps = trainer.args.steps_per_generation
    return [trainer._buffered_inputs[(trainer._step + offset) % steps] for offset in range(count)]


def unfinished_rollouts(trainer: TRLTrainer) -> list[MicroBatch] | None:
    """The buffer, if part of it is still to be trained on."""
    return None if generates_next(trainer) else trainer._buffered_inputs


def set_buffer(trainer: TRLTrainer, micro_batches: list[MicroBatch] | None, step: int | None = None) -> None:
    """Train on these micro-batches next; in a resume, continue after `step` micro-batches."""
    trainer._buffered_inputs = micro_batches
    trainer._step = trainer._step if step is None else step


def probe_trainer_state() -> None:
    """Raise unless TRL's trainer makes, keeps and uses rollouts, and logs metrics, as above."""
    from trl import GRPOTrainer

    theirs: Any = GRPOTrainer
    parent: Any = GRPOTrainer.__bases__[0]
    logged: dict[str, float | None] = {}

    class Above(parent):
        """Replaces transformers' trainer."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
            return self.compute_loss(model, self._prepare_inputs(inputs))

        def log(self, logs: dict[str, float | None], start_time: float | None = None) -> None:
            logged.update(logs)

    class Small(theirs, Above):
        def __init__(self) -> None:
            self.model, self.state = SimpleNamespace(training=True), SimpleNamespace(global_step=0)
            self.args = SimpleNamespace(steps_per_generation=2, report_to=[])
            self.accelerator = SimpleNamespace(is_main_process=False)
            self.num_iterations, self.current_gradient_accumulation_steps = 2, 1
            self._step, self._buffered_inputs, self._current_train_step_time = 0, None, 0.0
            self._metrics: dict[str, Any] = {"train": defaultdict(list)}
            self.made = 0

        def _generate_and_score_completions(self, inputs: Any) -> MicroBatch:
            self.made += 1
            return {"prompt_ids": inputs}

        def _compute_loss(self, model: Any, inputs: MicroBatch) -> float:
            expect(
                inputs is next_micro_batches(self)[0], "another micro-batch than the buffer's next one is trained on"
            )
            return inputs["prompt_ids"].sum().item()

    small = Small()
    for step in range(5):
        made, due = small.made, generates_next(small)
        expect(due == (unfinished_rollouts(small) is None) == (step in (0, 4)), "the buffer is used up at another time")
        small.training_step(None, torch.ones(4), None)
        expect(small.made - made == due, "rollouts are made at another time")
        expect(micro_step(small) == step + 1, "micro-batches are counted differently")
    set_buffer(small, [{"prompt_ids": torch.tensor(place)} for place in range(2)], step=3)
    expect(small.training_step(None, torch.ones(4), None) == 1, "a restored buffer is not used")
    log_metric(small, "own", 0.25)
    small.log({})
    expect(logged.get("own") == 0.25, "a metric is not logged")


# Rows of a batch, and their images


def probe_pixel_rows() -> None:
    """Raise unless TRL splits the images of a batch into rows and joins them again, for images in patches (Qwen)."""
    batch: MicroBatch = {
        "prompt_ids": torch.arange(8).reshape(4, 2),
        "pixel_values": torch.arange(24.0).reshape(12, 2),
        "image_grid_thw": torch.tensor([[1, 1, 2], [1, 1, 4], [1, 1, 1], [1, 1, 5]]),
        "num_images": [1, 0, 2, 1],
    }
    rows: MicroBatch = split_pixel_values_by_grid(dict(batch))
    lengths = [len(pixels) for pixels in rows["pixel_values"]]
    expect(lengths == [2, 0, 5, 5], f"rows of 2, 0, 5 and 5 patches were split into rows of {lengths}")
    parts: list[Any] = split_tensor_dict(rows, 2)
    halves: list[MicroBatch] = [unsplit_pixel_values_by_grid(part) for part in parts]
    for name in ("prompt_ids", "pixel_values", "image_grid_thw"):
        joined = torch.cat([half[name] for half in halves])
        expect(torch.equal(joined, batch[name]), f"{name} differ after a split into rows and a join")


# vLLM on the training GPUs


def vllm_takes(
    generation: Any,
    prompt_of: Callable[[list[int]], list[int]],
    check: Callable[[list[int], Sequence[int]], None],
) -> None:
    """Give colocated vLLM `prompt_of(ids)` for each prompt's `ids`.

    generation: the trainer's `VLLMGeneration`. check: gets the prompt's ids and vLLM's ids of it.
    """
    theirs = generation.generate

    def generate(prompts: Sequence[list[int]], **asked: Any) -> tuple[Any, ...]:
        made, *answers = theirs(prompts=[prompt_of(ids) for ids in prompts], **asked)
        for ids, own in zip(prompts, made, strict=True):
            check(ids, own)
        return made, *answers

    generation.generate = generate


def probe_colocated_prompts() -> None:
    """Raise unless TRL passes colocated vLLM unchanged prompts and images, and returns vLLM's prompts."""
    from trl.generation.vllm_generation import VLLMGeneration

    def generate(prompts: Sequence[MicroBatch], **_: Any) -> list[Any]:
        outputs = [SimpleNamespace(token_ids=[7], logprobs=None)]
        return [SimpleNamespace(prompt_token_ids=list(one.items()), outputs=outputs) for one in prompts]

    generation: Any = VLLMGeneration.__new__(VLLMGeneration)
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "logprobs": 0}
    vars(generation).update(
        options,
        mode="colocate",
        llm=SimpleNamespace(generate=generate),
        model=torch.nn.Module(),
        accelerator=None,
        max_completion_length=1,
        generation_kwargs={},
        structured_outputs_regex=None,
        tensor_parallel_size=1,
        enable_sleep_mode=False,
    )
    made, answers, *_ = generation.generate(
        prompts=[[1, 2], [3]], images=[["first", "second"], None], num_generations=1
    )
    image_row = [("prompt_token_ids", [1, 2]), ("multi_modal_data", {"image": ["first", "second"]})]
    expect(made == [image_row, [("prompt_token_ids", [3])]], "vLLM gets other prompts")
    expect(answers == [[7], [7]], "vLLM's answers are returned differently")


# The order of the data


def pass_over(sampler: RepeatSampler, epochs: int) -> None:
    """Give the next pass of a new sampler the order that follows `passes` passes.

    TRL's sampler draws one permutation per pass from its own generator; a resumed run would begin with the first.
    """
    for _ in range(epochs if sampler.shuffle else 0):
        torch.randperm(sampler.num_samples, generator=sampler.generator)


def probe_sampler_order() -> None:
    """Raise unless a sampler resumed in its second epoch gives the order of an uninterrupted one."""
    whole, resumed = (RepeatSampler(range(6), mini_repeat_count=2, batch_size=2, seed=5) for _ in range(2))
    epochs = [list(whole) for _ in range(2)]
    pass_over(resumed, 1)
    expect(list(resumed) == epochs[1] != epochs[0], "the order of a second epoch is not the expected one")


# The head


@cache
def chunked_logprob_function() -> Any:
    """TRL's autograd function for log-probabilities and entropies without full logits.

    It takes positional arguments. `cppo.policy.packed` calls it, and probes it.
    """
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction
