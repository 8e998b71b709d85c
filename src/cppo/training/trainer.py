"""CPPOTrainer: TRL's GRPOTrainer plus a contrastive perception loss (arXiv 2601.00501), or a method of its family.

How a step differs from GRPO's:
1. the images of a row become upright RGB once, and the views I+ and I- of each are made while rollouts are generated;
2. a gate keeps the rollouts worth learning perception from, and their prompts' views go through the same processor;
3. one forward pass scores all rollouts and, of the gated-in ones, also I- and I+, each prompt and image once per group;
4. tokens whose score says that they depend on the image are selected, and their contrast is added to the RL loss.

Which views, score, selection, gate and sink: the options that `method` sets (`cppo.methods`).

Everything else is TRL's. The methods overridden here, and why, are listed in `cppo.training.upstream`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cppo.assets import resolve_model
from cppo.errors import UserError
from cppo.policy import (
    ResponseScores,
    only_special_tokens,
    shared_prefill,
    sliced_generation,
    unwrapped,
    vision_tower_parameters,
)
from cppo.policy.loading import whole_weights
from cppo.policy.vision_inputs import trimmed, without_empty_images
from cppo.rewards import guarded_rewards, named_rewards
from cppo.rewards.form import ChatForm
from cppo.training.checkpoint import ResumableGRPOTrainer
from cppo.training.config import CPPOConfig
from cppo.training.detection import score_before_updates, step_normalizer
from cppo.training.gate import gated_rollouts, rollout_weights, token_draws
from cppo.training.group_shuffle import shuffled_micro_batches
from cppo.training.perception_term import METRICS, Detection, ViewScores, loss_entropies, perception_term
from cppo.training.rollout_views import rollout_rows
from cppo.training.row_scorer import row_scorer
from cppo.training.setup import (
    agree_on_images,
    ban_vision_placeholders,
    check_castable_head,
    check_columns,
    check_head,
    check_reward_size,
    check_setup,
    go_without,
    keep_float32_outputs,
    share_prompts,
    try_parts,
)
from cppo.training.shared_views import score_shared
from cppo.training.telemetry import FormWatch, GradientShare, Mark, RolloutSamples, StepCosts
from cppo.training.upstream import SHARED_PREFILL
from cppo.training.view_inputs import Row, ViewMaker, embedded_images, replace_images, run_progress
from cppo.training.view_scoring import ViewRequest, idle_pass, model_inputs, scores_in_chunks
from cppo.trl_surface import generates_next, generation_batches, log_metric, next_micro_batches, set_buffer


class CPPOTrainer(ResumableGRPOTrainer):
    """Drop-in for `trl.GRPOTrainer` that adds the contrastive perception loss; same constructor.

    Args:
        model, reward_funcs, args, train_dataset, ...: as for `trl.GRPOTrainer`; `args` is a `CPPOConfig`. The model may
            also be "micro", and a reward a name or path that `cppo train --rewards` takes, such as "accuracy". A row
            may bring a `sample_id` (or `id`), from which, with seed and epoch, its views are drawn; without one an id
            is made from its prompt and images.

    Attributes:
        last_samples: a few rollouts of the last logged step, for reports; a method without a perception term marks no
            token in them.
        fallbacks: what is done in a slower or coarser way than CPPO can, and why, one line each.

    Raises:
        UserError: `perception_gate_reward` names no reward function, or an option does not fit this model, an
            environment, DeepSpeed or FSDP.
    """

    _tag_names = ["trl", "cppo"]  # noqa: RUF012 (as in TRL)

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: CPPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = CPPOConfig(f"{name.split('/')[-1]}-CPPO")
        if not isinstance(args, CPPOConfig):
            raise UserError(f"args is a {type(args).__name__}: give a CPPOConfig (it takes the same fields)")
        if environment_factory is not None and (args.uses_perception or args.rollout_views):
            raise UserError(
                "environment_factory: views are made of the images in the dataset's rows, but an environment brings "
                "its own; set method = 'grpo'"
            )
        if args.rollout_views and args.rollout_view_mode == "mix" and (rollout_func is not None or tools):
            raise UserError(
                f"rollout_view_mode = 'mix' makes the rollouts itself, but {'tools' if tools else 'rollout_func'} "
                "makes some from the images in the rows: choose 'augment', or another method"
            )
        rewards = guarded_rewards(named_rewards(reward_funcs))
        if environment_factory is None:
            check_columns(train_dataset, args.uses_perception, rewards)
        model = resolve_model(model) if isinstance(model, str) else model
        check_castable_head(model, args)
        with whole_weights():
            super().__init__(
                model,
                rewards,
                args,
                train_dataset,
                eval_dataset,
                processing_class,
                reward_processing_classes,
                callbacks,
                optimizers,
                quantization_config,
                peft_config,
                tools,
                rollout_func,
                environment_factory,
            )
        self.fallbacks: list[str] = []
        try_parts(self)
        check_setup(self)
        if args.freeze_vision_tower:
            for parameter in vision_tower_parameters(unwrapped(self.model)):
                parameter.requires_grad_(False)
        self._placeholder_ids = ban_vision_placeholders(self)
        self._shares_prompts, self._shares_rollouts = share_prompts(self)
        check_head(self, self._shares_prompts)
        self._views = ViewMaker(
            args.view_sampler(),
            args.view_threads,
            self.processing_class,
            self.tools,
            self.chat_template_kwargs,
            args.view_draws,
            self.num_generations,
        )
        self._rollout_views = args.rollout_view_sampler()
        self._rollout_images: list[list[Any]] | None = None
        self._anchor_scores: ResponseScores | None = None
        self._rewards: Tensor | None = None
        self._step_tokens: Tensor | None = None
        self._perception_sums = torch.zeros(len(METRICS), 2, device=self.accelerator.device)
        self._grad_share: GradientShare | None = None
        self._samples = RolloutSamples(self.processing_class.decode)
        self._trained: tuple[dict[str, Any], Sequence[int], Detection | None] | None = None
        form = ChatForm.of(self.processing_class, **self.chat_template_kwargs)
        self.form_watch = FormWatch(form, self.reward_func_names)
        self.add_callback(self.form_watch)
        self._marks: list[Mark] = []
        self.add_callback(StepCosts(self._marks, self._mark, self.accelerator.device, partial(log_metric, self)))

    @property
    def nonfinite_limit(self) -> int:
        return self.args.nonfinite_limit if self.args.nonfinite == "skip" else 0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        keep_float32_outputs(self.accelerator)

    @property
    def last_samples(self) -> list[dict[str, Any]]:
        """Rollouts of the last logged step: prompt, images, tokens, which of them were selected, scores, reward."""
        return self._samples.latest

    def _has_placeholder(self, completion_ids: Tensor) -> Tensor:
        """Which responses contain an image placeholder, which only a tool can insert; bool [B]."""
        placeholders = torch.tensor(self._placeholder_ids, dtype=completion_ids.dtype, device=completion_ids.device)
        return torch.isin(completion_ids, placeholders).any(dim=1)

    # Rollouts, gate and views

    def _tokenize_prompts(self, prompts: list) -> tuple[Any, Any, Any]:
        shown = prompts
        if self._rollout_images is not None:
            shown = [replace_images(prompt, own) for prompt, own in zip(prompts, self._rollout_images, strict=True)]
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(shown)
        if images is not None:
            # Of the prompts as they are, not as rollouts see them: the update takes them from here.
            images = [embedded_images(prompt) for prompt in prompts]
        return prompt_ids, images, multimodal_fields

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self._rollout_images is not None:
            images, self._rollout_images = self._rollout_images, None
        if self.use_vllm and images is not None:
            # vLLM's batches know a row without images by None.
            images = [row_images or None for row_images in images]
        with ExitStack() as changes:
            model = unwrapped(self.model)
            changes.enter_context(only_special_tokens(model))
            # vLLM and continuous batching call neither `generate` nor the model's forward.
            if not (self.use_vllm or self.use_transformers_continuous_batching):
                if self._shares_rollouts:
                    changes.enter_context(self._prefilled_once(model))
                changes.enter_context(sliced_generation(model, self.args.per_device_generation_batch_size))
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)

    @contextmanager
    def _prefilled_once(self, model: Any) -> Iterator[None]:
        """Within this context, equal prompts are prefilled once; it is told where none was."""
        with shared_prefill(model, self.generation_config) as prefills:
            yield
        if not prefills and self.args.per_device_generation_batch_size != 1:
            self._shares_rollouts = False
            go_without(self, f"{SHARED_PREFILL.lost}: `generate` was asked for what cannot be shared", sharing=True)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        inputs = self.form_watch.with_opening(inputs)
        with self._phase("reward"):
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        check_reward_size(self._rewards, self.reward_weights.tolist(), self.reward_func_names)
        self.form_watch.see(prompts, completions, self._rewards, self.reward_func_names)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        step = self.state.global_step
        rows = rollout_rows(self, inputs, step)
        agree_on_images(self, rows)
        if not self.model.training:
            return super()._generate_and_score_completions(rows)
        epoch, first = math.floor(self.state.epoch or 0), self.accelerator.process_index * len(rows)
        progress = run_progress(self, step)
        if self._rollout_views is not None and self.args.rollout_view_mode == "mix":
            self._rollout_images = self._rollout_views.mixed(rows, first, self.num_generations, epoch, progress)
        views = None
        if self.args.uses_perception:
            with self._phase("views"):
                views = self._views.begin(rows, epoch, progress, first)
        output = super()._generate_and_score_completions(rows)
        mine = slice(first, first + len(rows))
        rewards = (self._rewards * self.reward_weights.to(self._rewards)).nansum(dim=1)
        rewards = rewards.masked_fill(self._rewards.isnan().all(dim=1), math.nan)
        self._samples.begin(rows)
        output["rollout_place"], output["rollout_reward"] = list(range(len(rows))), rewards[mine]
        output["rollout_step"] = torch.tensor(step)
        if views is None:
            return output

        gate = gated_rollouts(self, output, rows, rewards, mine)
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        all_gates = self.accelerator.gather(gate)
        batch_number = generation_batches(self)
        weights = rollout_weights(self.args, all_gates, self.num_generations, batch_number)[mine]
        if self.args.perception_weighting == "advantage":
            weights = weights * output["advantages"]
        with self._phase("views"):
            output["perception_views"] = views.inputs((weights > 0).tolist(), prompts, self.args.scored_views)
        output["perception_weights"] = weights
        if self.args.perception_selector == "random":
            draws = token_draws(self.args, output["completion_ids"].shape, batch_number, self.accelerator.process_index)
            output["perception_draws"] = draws.to(weights.device)
        output["perception_num_rollouts"] = all_gates.sum()
        log_metric(self, "perception/gated_fraction", all_gates.float().mean().item())
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not (self.model.training and generates_next(self)):
            inputs = super()._prepare_inputs(generation_batch)
            if self.model.training and not self._samples.knows_rows and "rollout_step" in inputs:
                # Resumed in the middle of a generation batch, whose rows TRL's sampler brings again.
                self._samples.begin(rollout_rows(self, generation_batch, int(inputs["rollout_step"])))
            return inputs
        with self._phase("rollout"):
            batch = self._generate_and_score_completions(generation_batch)
        count = self.args.steps_per_generation
        group_size = self.num_generations if self._shares_prompts else 1
        first = self.accelerator.process_index * len(batch["prompt_ids"])
        micro_batches = shuffled_micro_batches(batch, group_size, count, first)
        set_buffer(self, micro_batches)
        with self._phase("scoring"):
            score_before_updates(self, micro_batches)
        return next_micro_batches(self)[0]

    # Loss

    def _kernel_scores(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return super()._get_per_token_logps_and_entropies(*args, **options)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **vision: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scores = self._anchor_scores
        if scores is None:
            vision = trimmed(without_empty_images(vision), input_ids.shape[1])
            score = row_scorer(
                self,
                model,
                logits_to_keep,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                shares=self._can_share(input_ids[:, -logits_to_keep:]),
            )
            with self._phase("scoring"):
                scores = scores_in_chunks(score, input_ids, attention_mask, vision, batch_size or input_ids.shape[0])
        return scores.logps, loss_entropies(self.args, scores) if compute_entropy else None, scores.aux_loss

    def _can_share(self, completion_ids: Tensor) -> bool:
        """Whether rows can be packed, which then have their images in the prompts alone: no tool brought one."""
        return self._shares_prompts and not (self.tools and bool(self._has_placeholder(completion_ids).any()))

    def _score_views(
        self, model: Any, request: ViewRequest, inputs: dict[str, Any]
    ) -> tuple[ResponseScores, ViewScores | None]:
        """Scores of a micro-batch, and of the requested rows under their views, in one forward pass."""
        rows = model_inputs(inputs)
        if self._can_share(inputs["completion_ids"]):
            with self.accelerator.autocast():
                return score_shared(model, self.args, request, *rows)
        length = inputs["completion_ids"].shape[1]
        score = row_scorer(self, model, length, compute_aux_loss=self.aux_loss_enabled)
        scores = request.score(score, *rows, self.args.perception_view_gradients)
        if self.args.separate_view_pass and not request.rows and self.accelerator.num_processes > 1:
            idle_pass(score, *rows)
        return scores

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        rl_weight = self.args.rl_weight if self.model.training else 1.0
        if "perception_views" not in inputs or not self.args.adds_perception_loss:
            if self.model.training:
                rows, *detected = inputs.get("perception_detected", [()])
                self._trained = inputs, rows, Detection(*detected) if detected else None
            return rl_weight * super()._compute_loss(model, inputs)
        normalizer = step_normalizer(self, model, inputs)
        request = ViewRequest.of(inputs, self.args.scored_views)
        with self._phase("scoring"):
            self._anchor_scores, scores = self._score_views(model, request, inputs)
        try:
            loss = rl_weight * super()._compute_loss(model, inputs)
        finally:
            self._anchor_scores = None
        self._trained = inputs, request.rows, None
        if scores is None:
            return loss
        term = perception_term(self.args, scores, normalizer, request.weights)
        if self._grad_share is not None:
            self._grad_share.add(term.loss)
        self._perception_sums += term.statistics
        self._trained = inputs, request.rows, term.detection
        return loss + term.loss

    # Metrics

    def _log_perception(self) -> None:
        """Log the means over the tokens of the optimizer step's micro-batches, of all ranks."""
        sums = self.accelerator.reduce(self._perception_sums, "sum").tolist()
        for name, (total, count) in zip(METRICS, sums, strict=True):
            log_metric(self, f"perception/{name}", total / count if count else math.nan)
        self._perception_sums.zero_()

    def _keep_samples(self) -> None:
        """Keep rollouts of the micro-batch that was trained on, if its step is the first or will be logged."""
        trained, self._trained = self._trained, None
        step = self.state.global_step + 1
        if trained is not None and (step == 1 or step % max(self.state.logging_steps, 1) == 0):
            self._samples.keep(*trained, step)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """What runs inside counts as this phase of the step that is under way, if one is."""
        if not self._marks:
            yield
            return
        self._mark(name)
        try:
            yield
        finally:
            self._mark(None)

    def _mark(self, phase: str | None) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        self._marks.append((time.perf_counter(), phase))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        if not self._marks:
            self._mark("update")
        if self.args.log_perception_grad_share and self._grad_share is None:
            self._grad_share = GradientShare(self.model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._keep_samples()
        if self.accelerator.sync_gradients:
            self._step_tokens = None
            if self.args.adds_perception_loss:
                self._log_perception()
            if self._grad_share is not None:
                log_metric(self, "perception/grad_norm_share", self._grad_share.value(self.accelerator))
                self._grad_share = None
        return loss
