"""CPPOConfig: TRL's GRPOConfig with the options of contrastive perception."""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from cppo.errors import UserError
from cppo.fields import Unset, plain_default, resolve
from cppo.hooks import check_options
from cppo.methods import get_method
from cppo.options import Batch, CPPOOptions, check_rows
from cppo.options.ascent import ascends
from cppo.options.views import inside_views
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
from cppo.views import ViewSampler, view_sampler


def _of_trl(name: str) -> Any:
    """A field of TRL's, with its default and help, that a method may set."""
    declared = GRPOConfig.__dataclass_fields__[name]
    return field(default=Unset(plain_default(declared)), metadata=declared.metadata)


@dataclass
class CPPOConfig(CPPOOptions, GRPOConfig):
    """Configuration of `CPPOTrainer`.

    Inherited fields keep the defaults of `trl.GRPOConfig`; the fields below default to the published values
    (arXiv 2601.00501), except `perception_normalization` (published: "microbatch"). `method` sets options of its own;
    one that is given wins over it, whatever its value. In a configuration that is made, every value counts as given.

    Raises:
        UserError: a value is out of its range; the message names the field.
    """

    loss_type: str = _of_trl("loss_type")
    epsilon: float = _of_trl("epsilon")
    epsilon_high: float | None = _of_trl("epsilon_high")
    delta: float | None = _of_trl("delta")
    entropy_coef: float = _of_trl("entropy_coef")
    beta: float = _of_trl("beta")

    def __post_init__(self) -> None:
        resolve(self, get_method(self.method).options)
        single = self.num_generations == 1
        if single:  # TRL takes no groups of one, nor reads their size before its trainer does
            self.num_generations, self.num_generations_eval = _accepted_group(self), self.num_generations_eval or 1
        super().__post_init__()
        if single:
            self.num_generations = 1
        check_options(self)
        self.view_sampler()

    @property
    def uses_perception(self) -> bool:
        """Whether rollouts are scored under perturbed views."""
        return self.perception_sink in SHAPINGS or self.adds_perception_loss

    @property
    def adds_perception_loss(self) -> bool:
        """Whether a perception loss is added to the RL loss."""
        return adds_perception_loss(self)

    @property
    def separate_view_pass(self) -> bool:
        """Whether an update scores the views in a pass of their own, without gradient."""
        return self.perception_view_policy == "current" and not self.perception_view_gradients

    @property
    def scored_views(self) -> tuple[str, ...]:
        """The views that are scored: those that the score compares, where it is used, and those with a weight."""
        return scored_views(self)

    @property
    def looks_at_images(self) -> bool:
        """Whether rollouts without images have no score: it compares views, or response tokens with image tokens."""
        return bool(self.scored_views or needed(self) & SIMILARITIES)

    @property
    def needs_logits(self) -> bool:
        """Whether rows that are not shared must be scored with whole logits, by the plain scorer."""
        taken = {"logits", "hidden_states", "nucleus_entropies", *SIMILARITIES, *EXACT_DIVERGENCES}
        return self.scorer == "plain" or bool(taken & {self.perception_divergence, *needed(self)})

    @property
    def inside_views(self) -> dict[str, str]:
        """The names of the scored views that lie inside the model, by kind."""
        return {kind: name for kind, name in inside_views(vars(self)).items() if kind in self.scored_views}

    def view_sampler(self) -> ViewSampler:
        """The sampler of views that these options describe."""
        return view_sampler(vars(self))

    @property
    def pixel_steps(self) -> PixelSteps | None:
        """How the images of rollouts are moved by the policy's gradient; None where they are not."""
        if not ascends(vars(self)):
            return None
        return PixelSteps(
            self.view_ascent_steps, self.view_ascent_step, self.view_ascent_bound, self.view_ascent_direction
        )

    def rollout_view_sampler(self) -> RolloutViews | None:
        """What draws the views that rollouts are made from; None where they are made from the images."""
        if not self.rollout_views:
            return None
        strengths = self.view_sampler().strengths
        return RolloutViews(self.seed, self.rollout_views, strengths, self.rollout_view_fraction)


def _accepted_group(args: GRPOConfig) -> int:
    """A group size that TRL takes for its batches, of at least 2. Raises UserError for a batch of a single rollout."""
    steps = args.steps_per_generation or args.gradient_accumulation_steps
    sizes = (args.generation_batch_size or 1, args.per_device_train_batch_size, steps)
    if max(sizes) < 2:
        raise UserError(
            "num_generations = 1: rollouts of a generation batch are compared with each other: give "
            "per_device_train_batch_size or steps_per_generation of at least 2"
        )
    return next(size for size in sizes if size >= 2)


def check_enough(name: str, rows: int, args: GRPOConfig, *, by_rollouts: bool = False) -> None:
    """Raise UserError where the rows of a dataset are fewer than the prompts that are generated together.

    by_rollouts: whether `generation_batch_size` was given; in a configuration that is made it is always set.
    """
    group, device, steps = args.num_generations or 1, args.per_device_train_batch_size, args.steps_per_generation or 1
    processes = (args.generation_batch_size or 0) // (device * steps)
    check_rows(name, rows, Batch(group, device, steps, processes, by_rollouts))
