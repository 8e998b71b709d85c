"""CPPOConfig: TRL's GRPOConfig with the options of contrastive perception."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from trl import GRPOConfig

from cppo.methods import SHAPING_SINKS, get_method
from cppo.perception import EXACT_DIVERGENCES
from cppo.recipes import schema
from cppo.recipes.static_fields import Unset, method_option, option, plain_default, resolve
from cppo.recipes.values import check_value
from cppo.training.option_rules import check_combinations, view_sampler
from cppo.training.rollout_views import RolloutViews
from cppo.views import ViewSampler


def _of_trl(name: str) -> Any:
    """A field of TRL's, with its default and help, that a method may set."""
    declared = GRPOConfig.__dataclass_fields__[name]
    return field(default=Unset(plain_default(declared)), metadata=declared.metadata)


@dataclass
class _MethodsMaySet(GRPOConfig):
    loss_type: str = _of_trl("loss_type")
    epsilon: float = _of_trl("epsilon")
    epsilon_high: float | None = _of_trl("epsilon_high")
    delta: float | None = _of_trl("delta")
    entropy_coef: float = _of_trl("entropy_coef")
    beta: float = _of_trl("beta")


@dataclass
class CPPOConfig(_MethodsMaySet):
    """Configuration of `CPPOTrainer`.

    Inherited fields keep the defaults of `trl.GRPOConfig`; the fields below default to the published values
    (arXiv 2601.00501), except `perception_normalization` (published: "microbatch"). `method` sets options of its own;
    one that is given wins over it, whatever its value.

    Raises:
        UserError: a value is out of its range; the message names the field.
    """

    method: str = option(
        "cppo", "The method, whose options it sets: `cppo`, `grpo` (TRL's) or another that `cppo methods` lists."
    )
    perception_sink: Literal["contrast", "divergence", "advantage", "weights", "none"] = method_option(
        "contrast",
        "What the perception tokens go into: 'contrast' (published), softplus((w+ d+ - w- d-) / tau); 'divergence', "
        "w+ d+ - w- d-; 'advantage', which they alone keep, in rollouts weighted by their score (VPPO); 'weights': "
        "every token's advantage is weighted by its score (PGPO); 'none' trains on the RL loss alone.",
    )
    perception_weight: Annotated[float, "[0, inf)"] = method_option(
        0.01, "Weight lambda of the perception loss. 0 leaves it out, with the passes that nothing else needs."
    )
    perception_preserving_weight: Annotated[float, "[0, inf)"] = method_option(
        1.0, "Factor w+ of the divergence from I+; 0 skips its passes."
    )
    perception_removing_weight: Annotated[float, "[0, inf)"] = method_option(
        1.0, "Factor w- of the divergence from I-."
    )
    perception_removing_entropy_weight: Annotated[float, "[0, inf)"] = method_option(
        0.0,
        "Weight of a penalty on the entropy under I-, mean over all response tokens of the rollouts scored (PAPO); "
        "the counterpart under the image is TRL's entropy_coef with a negative value.",
    )
    perception_preserving_entropy_weight: Annotated[float, "[0, inf)"] = method_option(
        0.0, "Weight of the same penalty on the entropy under I+ (DVRP)."
    )
    entropy_estimator: Literal["exact", "sampled"] = method_option(
        "exact",
        "Entropy in the loss, that of `entropy_coef` and of the two weights above: 'exact' over the vocabulary, or "
        "'sampled', -log pi of the sampled token (PAPO, VPPO), whose gradient on-policy is zero on average. The logged "
        "`entropy` is the same.",
    )
    perception_temperature: Annotated[float, "(0, inf)"] = method_option(
        0.1, "Temperature tau of the contrast, in nats of divergence."
    )
    perception_top_fraction: Annotated[float, "(0, 1]"] = method_option(
        0.5,
        "Fraction of a rollout's tokens with a positive dependency score ('top_positive'), or of all its tokens "
        "('top'), that are selected.",
    )
    perception_top_rounding: Literal["floor", "ceil"] = method_option(
        "floor",
        "How that number of tokens is rounded: down, but to at least one (published), or up (VPPO, asynchronous CPPO).",
    )
    perception_selector: Literal["top_positive", "top", "random", "all"] = method_option(
        "top_positive",
        "Tokens selected in a rollout: the best-scored of those with a positive score (published), of all, random "
        "ones, as many as 'top_positive' selects, or all.",
    )
    perception_divergence: Literal["k1", "k3", "kl", "js", "nll"] = method_option(
        "k3",
        "Divergence of anchor and view: 'k3' on the sampled token (published) or 'k1' (asynchronous CPPO), exact 'kl' "
        "or 'js' over the vocabulary, or 'nll', the sampled token's negative log-probability under the view.",
    )
    perception_score: Literal["entropy_shift", "entropy_shift_absolute", "entropy", "k3", "kl", "js", "logp_shift"] = (
        method_option(
            "entropy_shift",
            "How a token's dependency on the image is scored: rise of its entropy under I-, relative to that entropy "
            "(published) or in nats ('entropy_shift_absolute'), its entropy under the image alone, 'k3' on the sampled "
            "token or exact 'kl' or 'js' of anchor and I-, or fall of the sampled token's log-probability "
            "('logp_shift').",
        )
    )
    perception_gate: Literal["advantage", "correct", "none"] = method_option(
        "advantage",
        "Rollouts that the perception loss learns from: those with a positive advantage (published), those that "
        "`perception_gate_reward` calls correct, or all.",
    )
    perception_gate_reward: str | None = method_option(
        None, "Name of the reward function that decides for perception_gate='correct' (value > 0)."
    )
    perception_weighting: Literal["equal", "advantage"] = method_option(
        "equal",
        "How much each gated-in rollout counts in the perception loss: all alike (published), or by its advantage "
        "(needs perception_gate='advantage' and perception_normalization='rollout').",
    )
    perception_advantage_floor: Annotated[float, "[0, 1]"] = method_option(
        0.9, "Sink 'advantage': the smallest weight of a rollout's advantage; 1 weights all alike."
    )
    perception_advantage_scope: Literal["batch", "minibatch"] = method_option(
        "batch",
        "Sink 'advantage': the rollouts whose scores are compared. 'batch': all of the generation batch; 'minibatch' "
        "(VPPO): the least and the largest score are those of a process's rollouts of an optimizer step, and the mean "
        "weight of a micro-batch is 1, which depends on how the batch is cut.",
    )
    perception_weight_threshold: Annotated[float, "(0, 1)"] = method_option(
        0.4, "Sink 'weights': log(1 + score), scaled to [0, 1] over a rollout's tokens, that has the weight 1."
    )
    perception_weight_slope: Annotated[float, "[0, inf)"] = method_option(
        2.0, "Sink 'weights': by how much the weight grows from there to the best score."
    )
    perception_rollouts_per_group: Annotated[int | None, "[1, inf)"] = method_option(
        None,
        "At most so many gated-in rollouts of a group are scored under the views, drawn by the seed and weighted so "
        "that the loss keeps its expectation: for long responses (needs perception_normalization='rollout'). Without "
        "it all are.",
    )
    perception_normalization: Literal["rollout", "token", "microbatch"] = method_option(
        "rollout",
        "'rollout': mean over a rollout's selected tokens, then over the gated-in ones of the step (of the generation "
        "batch, in equal parts, where it serves several steps); 'token': mean over the step's selected tokens (one "
        "more pass to detect them first); 'microbatch' (published): mean over a micro-batch's selected tokens, which "
        "depends on how the batch is cut.",
    )
    perception_view_policy: Literal["current", "rollout"] = method_option(
        "current",
        "The policy that the perception loss scores views with: 'current' (published), in every update, or 'rollout' "
        "(PAPO's code), once for each generation batch before its updates, which is without gradient "
        "(perception_view_gradients=false).",
    )
    perception_view_gradients: bool = method_option(
        True, "Whether the gradient also flows through the policy under the views (published)."
    )
    perception_anchor_gradients: bool = method_option(
        True,
        "Whether the gradient also flows through the policy under the image itself (published). Without, what the "
        "policy says under the image is a fixed target for the views, which RL alone moves.",
    )
    perception_memory: Literal["joint", "sequential"] = method_option(
        "joint",
        "'joint': one pass for the image and both views; 'sequential': a pass each, computed again for the backward "
        "pass, so that memory peaks near one pass (needs scorer='shared').",
    )
    scorer: Literal["shared", "kernel", "plain"] = method_option(
        "shared",
        "'shared': each prompt and image once per group, for policy and reference; 'kernel': a row for each rollout, "
        "as TRL does, and what 'shared' falls back to where a model cannot share; 'plain': a row each with whole "
        "logits, in float64 for a float64 model.",
    )
    require_sharing: bool = method_option(
        False,
        "Stop with an error where rollouts or updates would not share prompts and images over a group, instead of "
        "warning that they cost more (needs scorer='shared').",
    )
    freeze_vision_tower: bool = method_option(
        False,
        "Keep the vision tower's weights as they are; the projector into the language model (Qwen's merger too) and "
        "the language model are trained.",
    )
    rl_weight: Annotated[float, "[0, inf)"] = method_option(
        1.0, "Weight of the RL loss, KL to the reference included; 0 trains on the perception term alone."
    )
    log_perception_grad_share: bool = method_option(
        False,
        "Log |g_perception| / (|g_perception| + |g_rl|) each step, for one more backward pass and one more copy of the "
        "gradients.",
    )
    preserving_views: list[str] = method_option(
        ["color_jitter", "perspective", "rotation"],
        "Families of information-preserving views (I+): color_jitter, perspective, rotation, gaussian_blur, "
        "diffusion_noise, or file.py:function; one is drawn for each image.",
    )
    removing_views: list[str] = method_option(
        ["noise_rectangles", "crop"],
        "Families of information-removing views (I-): noise_rectangles, crop, black_patches, static, or "
        "file.py:function; one is drawn for each image.",
    )
    view_draws: Literal["epoch", "rollout", "once"] = method_option(
        "epoch",
        "When views are drawn anew: for each prompt and 'epoch', for each 'rollout' (VPPO), or 'once', so that a "
        "prompt has the same for the whole run (asynchronous CPPO).",
    )
    view_brightness: Annotated[list[float], "[0, inf)"] = method_option(
        [0.2, 1.3], "I+ colour jitter: range of the brightness factor."
    )
    view_contrast: Annotated[list[float], "[0, inf)"] = method_option(
        [0.2, 1.8], "I+ colour jitter: range of the contrast factor."
    )
    view_saturation: Annotated[list[float], "[0, inf)"] = method_option(
        [0.2, 1.8], "I+ colour jitter: range of the saturation factor."
    )
    view_perspective_distortion: Annotated[float, "[0, 0.6666)"] = method_option(
        0.2, "I+ perspective: how far corners move, as a fraction of half the side."
    )
    view_perspective_probability: Annotated[float, "[0, 1]"] = method_option(
        0.5, "I+ perspective: probability that it is applied."
    )
    view_rotation_degrees: Annotated[float, "[0, 180]"] = method_option(10.0, "I+ rotation: largest angle, in degrees.")
    view_diffusion_steps: Annotated[int, "[0, 1000]"] = method_option(
        200, "Diffusion noise: how far it goes, of 1,000 steps."
    )
    view_diffusion_decay: Annotated[list[float] | None, "[0, inf)"] = method_option(
        None,
        "Diffusion noise: [steepness, midpoint] of the sigmoid by which it fades out, the midpoint as a fraction of "
        "the run (NoisyRollout, DVRP); without it the noise stays.",
    )
    view_noise_rectangles: int = method_option(50, "I- noise: number of rectangles.")
    view_noise_side: Annotated[list[float], "(0, 1]"] = method_option(
        [0.05, 0.15], "I- noise: range of a rectangle's sides, as fractions of the image's."
    )
    view_crop_side: Annotated[list[float], "(0, 1]"] = method_option(
        [0.6, 0.7], "I- crop: range of the one fraction that the crop keeps of both sides."
    )
    view_patch_side: Annotated[int, "[1, inf)"] = method_option(14, "I- black patches: their side, in pixels.")
    view_patch_probability: Annotated[float, "[0, 1]"] = method_option(
        0.6, "I- black patches: probability that a patch is blacked."
    )
    rollout_views: list[str] = method_option([], "Families of views that rollouts are made from instead of the image.")
    rollout_view_mode: Literal["augment", "mix"] = method_option(
        "augment",
        "'augment': a share of the prompts shows the view in rollouts and update; 'mix': a share of each group's "
        "rollouts is made from it, and the update sees the image (NoisyRollout).",
    )
    rollout_view_fraction: Annotated[float, "[0, 1]"] = method_option(
        0.5, "The share of prompts ('augment') or of a group's rollouts ('mix') that see a view."
    )
    nonfinite: Literal["stop", "skip"] = method_option(
        "stop",
        "A step whose gradient is not finite is never taken. 'stop' ends the run there; 'skip' goes on with the next "
        "step.",
    )
    nonfinite_limit: Annotated[int, "[1, inf)"] = method_option(
        5, "Steps in a row that nonfinite='skip' skips before it ends the run."
    )
    per_device_generation_batch_size: Annotated[int | None, "[1, inf)"] = method_option(
        None,
        "Rollouts that a process generates at a time, for less memory; without it all of a generation batch, as TRL "
        "does. Not with vLLM, which needs none.",
    )
    view_threads: Annotated[int, "[1, inf)"] = method_option(
        2, "Threads that make the views while the rollouts are being generated."
    )

    def __post_init__(self) -> None:
        resolve(self, get_method(self.method).options)
        super().__post_init__()
        for name, declared in schema("train").own.items():
            setattr(self, name, check_value(declared, getattr(self, name), where=name))
        check_combinations(vars(self))

    @property
    def uses_perception(self) -> bool:
        """Whether rollouts are scored under perturbed views."""
        return self.perception_sink in SHAPING_SINKS or self.adds_perception_loss

    @property
    def adds_perception_loss(self) -> bool:
        """Whether a perception loss is added to the RL loss."""
        weights = (
            self.perception_weight,
            self.perception_preserving_entropy_weight,
            self.perception_removing_entropy_weight,
        )
        return self.perception_sink in ("contrast", "divergence") and any(weights)

    @property
    def separate_view_pass(self) -> bool:
        """Whether an update scores the views in a pass of their own, without gradient."""
        return self.perception_view_policy == "current" and not self.perception_view_gradients

    @property
    def scored_views(self) -> tuple[str, ...]:
        """The views that are scored: I- where a score selects tokens or it has a weight, then I+ where it has one."""
        if self.perception_sink in SHAPING_SINKS:
            return ("removing",)
        removing = self.perception_selector != "all" or self.perception_removing_weight
        weight = self.perception_weight
        views = {
            "removing": (weight and removing) or self.perception_removing_entropy_weight,
            "preserving": (weight and self.perception_preserving_weight) or self.perception_preserving_entropy_weight,
        }
        return tuple(view for view, looks in views.items() if looks)

    @property
    def needs_logits(self) -> bool:
        """Whether rows that are not shared must be scored with whole logits."""
        scores = [self.perception_score] if "removing" in self.scored_views else []
        exact = {self.perception_divergence, *scores} & set(EXACT_DIVERGENCES)
        return self.scorer == "plain" or bool(exact)

    def view_sampler(self) -> ViewSampler:
        """The sampler of views that these options describe."""
        return view_sampler(vars(self))

    def rollout_view_sampler(self) -> RolloutViews | None:
        """What draws the views that rollouts are made from; None where they are made from the images."""
        if not self.rollout_views:
            return None
        strengths = self.view_sampler().strengths
        return RolloutViews(self.seed, self.rollout_views, strengths, self.rollout_view_fraction)
