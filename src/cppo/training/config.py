"""CPPOConfig: TRL's GRPOConfig with CPPO's own options."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig

from cppo.errors import UserError, tell
from cppo.fields import Unset, plain_default, resolve
from cppo.hooks import check_options
from cppo.methods import get_method
from cppo.options import Batch, CPPOOptions, check_rows
from cppo.options.ascent import ascends
from cppo.options.views import input_views
from cppo.perception import (
    EXACT_DIVERGENCES,
    SHAPINGS,
    SIMILARITIES,
    adds_perception_loss,
    needed,
    scored_views,
)
from cppo.policy.ascent import PixelSteps
from cppo.training.view_maker import RolloutViews
from cppo.trl_surface import take_later_names
from cppo.views import ViewSampler, view_sampler


def _of_trl(name: str) -> Any:
    """One of TRL's fields, with its default and help; a method may set it."""
    declared = GRPOConfig.__dataclass_fields__[name]
    return field(default=Unset(plain_default(declared)), metadata=declared.metadata)


def cpu_precision_line(config: Mapping[str, Any]) -> str:
    """What to print if `float32_on_cpu`: the precision of the weights decides that of most arithmetic."""
    loaded = str((config.get("model_init_kwargs") or {}).get("dtype") or "float32").removeprefix("torch.")
    if loaded == "float32":
        return "training runs on the CPU, in float32; use_cpu: true and bf16: true would use bfloat16"
    return (
        f"training runs on the CPU, with weights of dtype {loaded}, as model_init_kwargs says; "
        "--model_init_kwargs '{dtype: float32}' computes in float32, which is faster on most CPUs"
    )


def float32_on_cpu(config: Mapping[str, Any]) -> bool:
    """Whether training runs on the CPU and nothing chooses its precision; TRL's default of bfloat16 fails there."""
    on_cpu = config.get("use_cpu") or not torch.accelerator.is_available()
    return bool(on_cpu) and config.get("bf16") is None and not config.get("fp16")


@dataclass
class CPPOConfig(CPPOOptions, GRPOConfig):
    """Configuration of `CPPOTrainer`.

    Inherited fields keep the defaults of `trl.GRPOConfig`. CPPO's own default to the published values (arXiv
    2601.00501), except `perception_normalization` (published: "microbatch"). `method` sets several options; a value
    that you give wins over the method's. In a finished configuration every value counts as given.

    Raises:
        UserError: a value is out of its range; the message names the field.
    """

    loss_type: str = _of_trl("loss_type")
    epsilon: float = _of_trl("epsilon")
    epsilon_high: float | None = _of_trl("epsilon_high")
    delta: float | None = _of_trl("delta")
    entropy_coef: float = _of_trl("entropy_coef")
    beta: float = _of_trl("beta")
    num_generations: int | None = _of_trl("num_generations")

    def __post_init__(self) -> None:
        resolve(self, get_method(self.method).options)
        single = self.num_generations == 1
        if single:  # TRL refuses groups of one, but reads their size only in its trainer
            self.num_generations, self.num_generations_eval = _accepted_group(self), self.num_generations_eval or 1
        if float32_on_cpu(vars(self)):
            self.bf16 = False
            tell(cpu_precision_line(vars(self)))
        take_later_names(self)
        super().__post_init__()
        if single:
            self.num_generations = 1
        check_options(self)
        self.view_sampler()

    @property
    def device(self) -> torch.device:
        """The process's device. The CPU has no index: transformers 5.17 cannot resume several processes on "cpu:0"."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def uses_perception(self) -> bool:
        """Whether rollouts are scored under perturbed views."""
        return self.perception_sink in SHAPINGS or self.adds_perception_loss

    @property
    def contrast_temperature(self) -> float | None:
        """The temperature of the contrast; None where the perception term is another, or none."""
        contrasts = self.adds_perception_loss and self.perception_sink == "contrast"
        return self.perception_temperature if contrasts else None

    @property
    def adds_perception_loss(self) -> bool:
        """Whether a perception loss is added to the RL loss."""
        return adds_perception_loss(self)

    @property
    def separate_view_pass(self) -> bool:
        """Whether an update scores the views in a separate pass without gradient."""
        return self.perception_view_policy == "current" and not self.perception_view_gradients

    @property
    def scored_views(self) -> tuple[str, ...]:
        """The views to score: those that a used score compares, and those with a weight."""
        return scored_views(self)

    @property
    def looks_at_images(self) -> bool:
        """Whether the score needs images: it compares views, or response tokens with image tokens."""
        return bool(self.scored_views or needed(self) & SIMILARITIES)

    @property
    def needs_logits(self) -> bool:
        """Whether rows that are not shared need full logits, from the plain scorer."""
        taken = {"logits", "hidden_states", "nucleus_entropies", *SIMILARITIES, *EXACT_DIVERGENCES}
        return self.scorer == "plain" or bool(taken & {self.perception_divergence, *needed(self)})

    @property
    def input_views(self) -> dict[str, str]:
        """The scored views inside the model: kind -> name."""
        return {kind: name for kind, name in input_views(vars(self)).items() if kind in self.scored_views}

    def view_sampler(self) -> ViewSampler:
        """The sampler of views that these options describe."""
        return view_sampler(vars(self))

    @property
    def pixel_steps(self) -> PixelSteps | None:
        """The gradient steps on the images of rollouts; None without them."""
        if not ascends(vars(self)):
            return None
        return PixelSteps(
            self.view_ascent_steps, self.view_ascent_step, self.view_ascent_bound, self.view_ascent_direction
        )

    def rollout_view_sampler(self) -> RolloutViews | None:
        """Draws the views that rollouts are made from; None where they are made from the images."""
        if not self.rollout_views:
            return None
        strengths = self.view_sampler().strengths
        return RolloutViews(self.seed, self.rollout_views, strengths, self.rollout_view_fraction)


def _accepted_group(args: GRPOConfig) -> int:
    """A group size of at least 2 that TRL accepts for its batches. Raises UserError for a batch of a single rollout."""
    steps = args.steps_per_generation or args.gradient_accumulation_steps
    sizes = (args.generation_batch_size or 1, args.per_device_train_batch_size, steps)
    if max(sizes) < 2:
        raise UserError(
            "num_generations = 1: the rollouts of a generation batch are compared with each other: give "
            "per_device_train_batch_size or steps_per_generation of at least 2"
        )
    return next(size for size in sizes if size >= 2)


def check_enough(name: str, rows: int, args: GRPOConfig, *, by_rollouts: bool = False) -> None:
    """Raise UserError where a dataset has fewer rows than a generation batch has prompts.

    by_rollouts: whether `generation_batch_size` was given; a finished configuration always has it.
    """
    group, device, steps = args.num_generations or 1, args.per_device_train_batch_size, args.steps_per_generation or 1
    processes = (args.generation_batch_size or 0) // (device * steps)
    check_rows(name, rows, Batch(group, device, steps, processes, by_rollouts))
