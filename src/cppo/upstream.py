"""All parts of transformers, TRL, accelerate and torch that CPPO uses beyond their public promises.

Each part is probed at the smallest scale when a trainer is built. Where one fails, the trainer uses a fallback and
reports the loss in one line (`CPPOTrainer.fallbacks`); without a fallback, the trainer is not built.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from inspect import unwrap
from types import CodeType

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from trl import GRPOTrainer

from cppo.errors import UserError
from cppo.policy.packed import probe_chunked_head
from cppo.policy.probes import probe_packed_attention, probe_shared_prefill, probe_tower_attention
from cppo.policy.varlen import probe_varlen_attention
from cppo.probing import Probe, expect, failure
from cppo.trl_surface import probe_colocated_prompts, probe_pixel_rows, probe_sampler_order, probe_trainer_state

OVERRIDES = {
    "create_accelerator_and_postprocess": "FSDP2 must not round log-probabilities to the precision of the weights",
    "_tokenize_prompts": "a text-only row must have [], not None; mixed rollouts see views; vLLM needs no expansion",
    "_generate": "generated tokens are kept for later calls about them",
    "_generate_single_turn": "each prompt and image is prefilled once per group, a few rows at a time; vLLM needs None",
    "_calculate_rewards": "gate and samples need the rewards, which TRL's output leaves out; huge ones are refused",
    "_generate_and_score_completions": "all images are converted once; views and gate stay with the rollouts",
    "_prepare_inputs": "whole groups are shuffled, so that they can share; TRL mixes up some rows of Idefics",
    "_prepare_input": "the pixels of a generation batch stay on the host",
    "_get_per_token_logps_and_entropies": "rows are scored packed; the loss gets the scores of the pass with the views",
    "_compute_loss": "adds the perception term to TRL's loss",
    "training_step": "starts and ends the step's counts; on request logs the perception term's share of the gradient",
    "_get_train_sampler": "a resumed run must see its epoch's order",
    "train": "resumes only from a complete checkpoint",
    "_save_checkpoint": "stores step counter and buffered rollouts, and last a manifest",
    "_load_optimizer_and_scheduler": "restores them; learning rate and intervals come from the options",
    "_get_grad_norm": "a step with a gradient that is not finite is not applied",
    "_run_epoch": "a resume at the last step would train one more step",
    "_load_rng_state": "one line names a damaged file",
    "_load_from_checkpoint": "transformers loads weights by their names in the file, which can differ from the model's",
    "_load_best_model": "the same",
    "create_model_card": "TRL's card describes a text model, without data, recipe or metrics",
    "save_model": "writes the card beside the weights; PEFT would write its own",
}
"""Every method of TRL's trainer that `CPPOTrainer` overrides, with the reason."""

STATE = ("_get_output_dir", "generation_kwargs", "_tag_names")
"""Attributes of TRL's trainer that `CPPOTrainer` reads or sets, so TRL's own code must use them."""


@dataclass(frozen=True)
class Part:
    """A part of another library without a promise of stability.

    Attributes:
        library: the package.
        what: the part, as the subject of a sentence.
        used_by: files under src/cppo.
        lost: what a run loses where the part fails; for a `needed` part, why there is no run.
        probe: raises unless the part works.
        private: names with a leading underscore that the files use.
        needed: there is no fallback.
    """

    library: str
    what: str
    used_by: tuple[str, ...]
    lost: str
    probe: Probe
    private: tuple[str, ...] = ()
    needed: bool = False

    def missing(self, *arguments: str) -> str | None:
        """The loss and its reason, in one line; None where the part works. `arguments` are the probe's."""
        reason = failure(self.probe, *arguments)
        return reason and f"{self.lost}: {self.what} ({self.library} {version(self.library)}) fails its check: {reason}"


def probe_trainer_hooks() -> None:
    """Raise unless the trainers of TRL and transformers use what `CPPOTrainer` overrides and sets."""
    used = set(_names_used())
    gone = [f"{name} ({reason})" for name, reason in OVERRIDES.items() if name not in used]
    gone += [name for name in STATE if name not in used]
    expect(not gone, f"the trainer no longer uses {', '.join(gone)}")


def probe_learning_rate() -> None:
    """Raise unless a running schedule accepts another learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule.base_lrs, schedule._last_lr = [6.0], [3.0]
    expect(schedule.get_last_lr() == [3.0], "the rate to be logged differs")
    optimizer.step()
    schedule.step()
    expect(optimizer.param_groups[0]["lr"] == 3.0, "the rate after a step differs")


def probe_fsdp_outputs() -> None:
    """Raise unless FSDP2 keeps the set precision of a forward pass's outputs."""
    rounding = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=rounding)
    policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    expect(policy.param_dtype == torch.bfloat16 and policy.output_dtype is None, "the precision cannot be set")


SHARED_PREFILL = Part(
    library="transformers",
    what="the first call of `generate`, which fills one growing cache through the model's own `forward`",
    used_by=("policy/rollout.py",),
    lost="rollouts do not share their prompt, and a generation costs about num_generations times the prefill",
    probe=probe_shared_prefill,
)
PACKED_ATTENTION = Part(
    library="transformers",
    what="the call of a registered attention function with the model's own keyword arguments",
    used_by=("policy/packed.py",),
    lost="updates do not share prompts and images in a group, and cost about num_generations times as much",
    probe=probe_packed_attention,
    private=("_attn_implementation",),
)
CHUNKED_HEAD = Part(
    library="trl",
    what="`ChunkedLogProbFunction`",
    used_by=("trl_surface.py", "policy/packed.py"),
    lost="scores hold full logits of a chunk of tokens, which takes more memory",
    probe=probe_chunked_head,
)
VARLEN_ATTENTION = Part(
    library="torch",
    what="`varlen_attn`",
    used_by=("policy/varlen.py",),
    lost="attention over packed rows pads them, and computes several times as many scores",
    probe=probe_varlen_attention,
)
TOWER_ATTENTION = Part(
    library="transformers",
    what="the single call per layer of an attention named flash, with the ends of windows,",
    used_by=("policy/vision_tower.py",),
    lost="the vision tower makes one attention call per window",
    probe=probe_tower_attention,
    private=("_attn_implementation",),
)
SAMPLER_ORDER = Part(
    library="trl",
    what="`RepeatSampler`, which draws an epoch's order from its own generator",
    used_by=("trl_surface.py", "training/checkpoint.py"),
    lost="a run resumed after its first epoch repeats the first epoch's order",
    probe=probe_sampler_order,
)
LEARNING_RATE = Part(
    library="torch",
    what="`LambdaLR`, with rates set during the run",
    used_by=("training/durable.py",),
    lost="a learning rate given at a resume does not last, or is logged wrongly",
    probe=probe_learning_rate,
    private=("_last_lr",),
)
FSDP_OUTPUTS = Part(
    library="accelerate",
    what="the precision policy of FSDP2",
    used_by=("training/setup.py",),
    lost="FSDP2 rounds log-probabilities and entropies to the precision of the weights",
    probe=probe_fsdp_outputs,
)
TRAINER_HOOKS = Part(
    library="trl",
    what="GRPOTrainer",
    used_by=("training/trainer.py", "training/generation.py", "training/checkpoint.py", "training/durable.py"),
    lost="the trainer would leave out a part of the method",
    probe=probe_trainer_hooks,
    private=tuple(name for name in OVERRIDES if name.startswith("_")),
    needed=True,
)
TRAINER_STATE = Part(
    library="trl",
    what="the buffer of GRPOTrainer, or its metrics",
    used_by=("trl_surface.py",),
    lost="rollouts would be trained on in another order than planned",
    probe=probe_trainer_state,
    private=("_step", "_buffered_inputs", "_metrics", "_get_output_dir"),
    needed=True,
)
PIXEL_ROWS = Part(
    library="trl",
    what="`split_pixel_values_by_grid`, `unsplit_pixel_values_by_grid` or `split_tensor_dict`",
    used_by=("trl_surface.py", "policy/vision_inputs.py", "training/rollouts.py"),
    lost="rollouts would be trained with other rollouts' images",
    probe=probe_pixel_rows,
    needed=True,
)
COLOCATED_PROMPTS = Part(
    library="trl",
    what="`VLLMGeneration.generate`",
    used_by=("trl_surface.py", "training/colocated.py"),
    lost="vLLM on the training GPUs would expand the images of a prompt twice",
    probe=probe_colocated_prompts,
)
PARTS = (
    SHARED_PREFILL,
    PACKED_ATTENTION,
    CHUNKED_HEAD,
    VARLEN_ATTENTION,
    TOWER_ATTENTION,
    SAMPLER_ORDER,
    LEARNING_RATE,
    FSDP_OUTPUTS,
    TRAINER_HOOKS,
    TRAINER_STATE,
    PIXEL_ROWS,
    COLOCATED_PROMPTS,
)


def check_needed_parts() -> None:
    """Raise UserError where a part without a fallback fails."""
    for part in PARTS:
        if part.needed and (line := part.missing()) is not None:
            raise UserError(f"{line}; install the versions that docs/reference/versions.md names")


def _names_used() -> Iterator[str]:
    """Names used by methods of TRL's trainer and its parents, without a method's call of its own name in `super()`."""
    for parent in GRPOTrainer.__mro__:
        for name, member in vars(parent).items():
            function = member.fget if isinstance(member, property) else member
            code = getattr(unwrap(function) if callable(function) else None, "__code__", None)
            if code is not None:
                yield from (used for used in _names_in(code) if used != name)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
