"""verl's workers with CPPO: views are made ahead, rollouts are gated, and mini-batches get their views' rows.

`CPPOActorRolloutRefWorker` replaces verl's worker class and needs nothing else from a trainer. It reads the method's
options from `rollout.custom.cppo`, and the steps per epoch from `rollout.custom.cppo_steps_per_epoch`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.padding import response_from_nested

from cppo.errors import UserError
from cppo.perception import METRICS, SELECTORS, needs_of
from cppo.verl.gate import Candidates, equal_groups, rollout_weights
from cppo.verl.loss import COUNT, DRAWS, NORMALIZER, SUM, WEIGHT, CPPOLoss, view_entropies, view_logps
from cppo.verl.options import VerlOptions, options_from
from cppo.verl.rows import ANCHOR, LONE, ROLE, count_groups, lay_out, lengths, plain, rows_of, with_views
from cppo.verl.views import ENTRIES, Pixels, Prompt, PromptViews

SCORED = {"log_probs": view_logps, "entropy": view_entropies}
"""Outputs of verl's engine for a row -> the entries that keep them for a view."""
PRECISE = ("fp32", "float32")

Value = TypeVar("Value")


def check_engine(engine: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise UserError unless verl's engine computes entropies exactly enough to detect perception tokens.

    Args:
        engine: verl's configuration of the engine, such as `actor.fsdp_config`.
        model: its configuration of the model.
    """
    precise = (engine.get("mixed_precision", None) or {}).get("param_dtype", None) in PRECISE
    if not engine.get("entropy_from_logits_with_chunking", True):
        raise UserError(
            "verl rounds entropies to bfloat16, by up to 0.14 nats: set "
            "actor_rollout_ref.actor.entropy_from_logits_with_chunking=true"
        )
    if not precise and not model.get("use_remove_padding", False):
        raise UserError(
            "without packed rows verl rounds entropies to bfloat16: set actor_rollout_ref.model.use_remove_padding=true"
        )
    if model.get("use_fused_kernels", False):
        raise UserError("verl's fused kernels round entropies: set actor_rollout_ref.model.use_fused_kernels=false")


class CPPOTrainingWorker(TrainingWorker):
    """verl's training worker; with a `CPPOLoss` its mini-batches get views."""

    loss_fn: Any
    _views: PromptViews | None = None

    def use_method(
        self, options: VerlOptions, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> None:
        """Add the perception loss of a method to the current loss.

        Args:
            steps_per_epoch, total_steps: as for `PromptViews`.

        Raises:
            UserError: the model or the engine is not supported.
        """
        if not options.kinds:
            return
        check_engine(self.engine_config, self.model_config)
        self._views = PromptViews(options, self.model_config.processor, steps_per_epoch, total_steps)
        self.set_loss_fn(CPPOLoss(self.loss_fn, options))

    @property
    def _loss(self) -> CPPOLoss | None:
        return self.loss_fn if isinstance(self.loss_fn, CPPOLoss) else None

    def infer_batch(self, data: TensorDict) -> TensorDict:
        """verl's method; first it starts views of the batch's prompts for the next update."""
        if self._views is not None:
            for prompt in _prompts(data):
                if prompt.shows_its_images:
                    self._views.begin(prompt)
        return super().infer_batch(data)

    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """verl's update, after gating its rollouts."""
        if self._loss is None or self._views is None:
            return super().train_mini_batch(data)
        tu.maybe_fix_3d_position_ids(data)
        fraction = self._gate(data, self._loss.options)
        if self._loss.options.scores_before_updates:
            self._score_views(data, self._loss.options)
        try:
            output = super().train_mini_batch(data)
        finally:
            self._views.forget()
        if output is not None:
            tu.get(output, "metrics")["perception/gated_fraction"] = fraction
        return output

    def train_batch(self, data: TensorDict) -> TensorDict:
        """verl's optimizer step, on the mini-batch and its views' rows."""
        if self._loss is None or WEIGHT not in data:
            return super().train_batch(data)
        output = super().train_batch(self._with_views(data, self._loss.options))
        if output is not None:
            _take_means(tu.get(output, "metrics"))
        return output

    def _gate(self, data: TensorDict, options: VerlOptions) -> float:
        """Weight the update's rollouts and start the views of those that pass. Returns all ranks' passing fraction."""
        assert self._views is not None
        prompts = _prompts(data)
        own = Candidates.of(data, [prompt.shows_its_images for prompt in prompts], options)
        self._check_budget(max(self._everyones(max(lengths(data)))), _group_size(options))
        everyones = [pair for rank in self._everyones(list(zip(own.uids, own.rewards, strict=True))) for pair in rank]
        weights = rollout_weights(own, equal_groups(everyones), options)
        for weight, prompt in zip(weights.tolist(), prompts, strict=True):
            if weight > 0:
                self._views.begin(prompt)
        data[WEIGHT] = weights
        if "draws" in needs_of(SELECTORS[options.perception_selector]):
            key = (options.seed, max(prompt.step for prompt in prompts), self.engine.get_data_parallel_rank())
            data[DRAWS] = _draws(data["response_mask"], key)
        gated = sum(self._everyones(int((weights > 0).sum())))
        tu.assign_non_tensor(data, **{NORMALIZER: gated * self._share_of_update(data)})
        return gated / len(everyones)

    def _share_of_update(self, data: TensorDict) -> float:
        """The share of an update's rollouts in one optimizer step."""
        count = tu.get(data, "num_mini_batch")
        if count is None:
            count = len(data) * self.engine.get_data_parallel_size() / tu.get(data, "mini_batch_size")
        return 1.0 / count

    def _check_budget(self, longest: int, size: int) -> None:
        if not self.engine_config.use_dynamic_bsz:
            return
        parallel = self.engine_config.get("ulysses_sequence_parallel_size", None) or 1
        budget, needed = self.engine_config.max_token_len_per_gpu, -(-longest * size // parallel)
        if needed > budget:
            raise UserError(
                f"a rollout and its views are {size} rows, of up to {longest} tokens each: set "
                f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu to at least {needed} (now {budget})"
            )

    def _views_of(self, data: TensorDict) -> dict[int, dict[str, Pixels]]:
        """The pixel inputs of each gated-in rollout under the views."""
        assert self._views is not None
        weights = data[WEIGHT].tolist()
        return {row: self._views.of(prompt) for row, prompt in enumerate(_prompts(data)) if weights[row] > 0}

    def _with_views(self, data: TensorDict, options: VerlOptions) -> TensorDict:
        """A mini-batch in the loss's layout; every rank has as many groups, and so runs as many passes."""
        gate = (data[WEIGHT] > 0).tolist()
        if options.perception_normalization == "token":
            tokens = sum(
                int(row.sum()) for row, passes in zip(data["response_mask"].unbind(), gate, strict=True) if passes
            )
            tu.assign_non_tensor(data, **{NORMALIZER: sum(self._everyones(tokens))})
        tu.assign_non_tensor(data, calculate_entropy=True)
        if options.scores_before_updates:
            data[ROLE] = torch.where(data[WEIGHT] > 0, ANCHOR, LONE)
            return data
        size = _group_size(options)
        groups = max(self._everyones(count_groups(gate, size)))
        if not self.engine_config.use_dynamic_bsz:
            groups += -groups % self.engine_config.micro_batch_size_per_gpu
        layout = lay_out(gate, size, groups, _shortest(data))
        laid = with_views(data, layout, options.kinds, self._views_of(data))
        counts = [tokens for rank in self._everyones(lengths(laid)) for tokens in rank]
        tu.assign_non_tensor(laid, global_token_num=NonTensorData(counts))
        return laid

    def _score_views(self, data: TensorDict, options: VerlOptions) -> None:
        """Score the gated-in rollouts under each view with the current policy, and keep the scores in the batch."""
        views = self._views_of(data)
        rows = list(views)
        most = max(self._everyones(len(rows)))
        if not self.engine_config.use_dynamic_bsz:
            most += -most % self.engine_config.infer_micro_batch_size_per_gpu
        for kind in options.kinds:
            scores = {name: [torch.zeros(len(mask)) for mask in data["response_mask"].unbind()] for name in SCORED}
            if most:
                found = self._infer(data, rows + [_shortest(data)] * (most - len(rows)), views, kind)
                for name, values in found.items():
                    for row, own in zip(rows, values, strict=False):
                        scores[name][row] = own.float().cpu()
            for name, entry in SCORED.items():
                data[entry(kind)] = tu.nested_tensor_from_tensor_list(scores[name])

    def _infer(
        self, data: TensorDict, rows: Sequence[int], views: Mapping[int, Mapping[str, Pixels]], kind: str
    ) -> dict[str, list[Tensor]]:
        """Log-probabilities and entropies of the response tokens of these rows under one view."""
        part = tu.index_select_tensor_dict(data, list(rows))
        inputs = [plain(value) for value in part["multi_modal_inputs"]]
        seen = [{**own, **views[row][kind]} if row in views else own for row, own in zip(rows, inputs, strict=True)]
        tu.assign_non_tensor_stack(part, "multi_modal_inputs", seen)
        tu.assign_non_tensor(
            part,
            calculate_entropy=True,
            use_remove_padding=self.model_config.get("use_remove_padding", False),
            use_dynamic_bsz=self.engine_config.use_dynamic_bsz,
            max_token_len_per_gpu=self.engine_config.infer_max_token_len_per_gpu,
            micro_batch_size_per_gpu=self.engine_config.infer_micro_batch_size_per_gpu,
            use_fused_kernels=False,
        )
        with self.engine.eval_mode():
            output = self.engine.infer_batch(part)["model_output"]
        mask = part["response_mask"]
        return {
            name: list(response_from_nested(output[name], mask.to(output[name].device)).unbind()) for name in SCORED
        }

    def _everyones(self, value: Value) -> list[Value]:
        """The value of each data-parallel rank, in order."""
        group = self.engine.get_data_parallel_group()
        values: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, value, group)
        return values


class CPPOActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's worker with the perception loss of the configured method."""

    actor_worker_cls = CPPOTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """verl's models, and the method."""
        super().init_model()
        if isinstance(self.actor, CPPOTrainingWorker):
            custom = self.config.rollout.get("custom", None) or {}
            given = custom.get("cppo", None) or {}
            options = options_from(OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given)
            total = self.config.actor.optim.get("total_training_steps", None)
            self.actor.use_method(options, custom.get("cppo_steps_per_epoch", None), total)


def _group_size(options: VerlOptions) -> int:
    """Rows of a gated-in rollout in an update."""
    return 1 if options.scores_before_updates else 1 + len(options.kinds)


def _prompts(data: TensorDict) -> list[Prompt]:
    return [Prompt.of(row) for row in rows_of(data, ENTRIES)]


def _shortest(data: TensorDict) -> int:
    found = lengths(data)
    return found.index(min(found))


def _draws(mask: Tensor, key: Sequence[int]) -> Tensor:
    """Uniform random numbers for each token of a response mask, jagged [B, T]."""
    seed = np.random.SeedSequence(list(key)).generate_state(1, np.uint64).item()
    generator = torch.Generator().manual_seed(seed)
    return tu.nested_tensor_from_tensor_list([torch.rand(len(row), generator=generator) for row in mask.unbind()])


def _take_means(metrics: dict[str, Any]) -> None:
    """Replace the sums and counts of all micro-batches and ranks by means; nothing where the count is 0."""
    for name in METRICS:
        total, count = (Metric.aggregate_dp(metrics.pop(f"perception/{name}{end}")) for end in (SUM, COUNT))
        if count:
            metrics[f"perception/{name}"] = float(total / count)
