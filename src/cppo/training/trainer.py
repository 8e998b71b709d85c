"""CPPOTrainer: TRL's GRPOTrainer plus a contrastive perception loss (arXiv 2601.00501), or another method.

A step differs from GRPO's in four points:
1. The images of a row become upright RGB once; I+ and I- of each are made while the rollouts are generated.
2. The gate selects the rollouts of the perception term. The processor then takes their prompts' views.
3. One forward pass scores all rollouts, and the gated-in ones also under I- and I+. Groups share prompts and images.
4. Tokens with a high score, which depend on the image, are selected; their contrast is added to the RL loss.

`method` sets the options for views, score, selection, gate and sink (`cppo.methods`).

Everything else is TRL's. `cppo.upstream` lists the methods overridden here, with reasons.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cppo.assets import resolve_model
from cppo.errors import UserError
from cppo.options import follow_schedules, with_schedules
from cppo.perception import (
    SHAPINGS,
    ResponseScores,
    ViewScores,
    adds_perception_loss,
    loss_entropies,
    needed,
    perception_loss,
    scored_views,
)
from cppo.policy import takes_images_a_row, unwrapped
from cppo.policy.loading import whole_weights
from cppo.policy.vision_inputs import prompt_vision, trimmed, without_empty_images
from cppo.rewards import check_weights, guarded_rewards, named_rewards, reward_names, trainer_rewards
from cppo.rewards.asking import with_policy
from cppo.rewards.form import ChatForm
from cppo.training.answer_rollouts import AnswerTrainer, check_trained_answers
from cppo.training.before_updates import detect_tokens, join_scores, scores_of_views, shaped_advantages
from cppo.training.colocated import ColocatedPrompts
from cppo.training.config import CPPOConfig
from cppo.training.early_signs import EarlySigns, FormWatch
from cppo.training.fit import fit_model
from cppo.training.micro_batch import Rollouts, ScoredMicroBatch, ViewRequest
from cppo.training.rollouts import GenerationBatch, shuffled_micro_batches
from cppo.training.scoring import Scorer, score_under_views
from cppo.training.setup import (
    check_castable_head,
    check_columns,
    check_setup,
    check_views_have_images,
    keep_float32_outputs,
    keep_no_cast_weights,
    tell_equal_weights,
    try_parts,
    warn_of_other_rewards,
)
from cppo.training.telemetry import GradientShare, PerceptionMeans, RolloutSamples, StepCosts
from cppo.training.view_maker import ViewMaker
from cppo.trl_surface import generates_next, log_metric, next_micro_batches, set_buffer


class CPPOTrainer(AnswerTrainer):
    """Drop-in for `trl.GRPOTrainer` that adds the contrastive perception loss; same constructor.

    Args:
        model, reward_funcs, args, train_dataset, ...: as for `trl.GRPOTrainer`; `args` is a `CPPOConfig`. The model may
            also be "micro", and a reward a name or path of `cppo train --rewards`, such as "accuracy". A row's views
            depend on its `sample_id` (or `id`), seed and epoch; a row without an id gets one from its prompt and
            images.

    Attributes:
        last_samples: a few rollouts of the last logged step, for reports; without a perception term no token is marked.
        kernels: the attention kernel of each part of the run, in one line.
        fallbacks: slower or coarser ways than CPPO's best, with their reasons, one line each.

    Raises:
        UserError: `perception_gate_reward` names no reward function, or an option contradicts this model, an
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
        check_views_have_images(args, tools, rollout_func, environment_factory)
        reward_funcs, weights = trainer_rewards(reward_funcs, args.method)
        rewards = guarded_rewards(named_rewards(reward_funcs))
        check_weights(reward_names(rewards), args.reward_weights)
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

        # Rewards
        if args.reward_weights is None and weights is not None:
            self.reward_weights = torch.tensor(weights, dtype=torch.float32)
        elif args.reward_weights is None:
            tell_equal_weights(self.reward_func_names)
        makes_own = bool(tools) or rollout_func is not None or environment_factory is not None
        check_trained_answers(args.trained_answers, self.reward_func_names, self.reward_funcs, makes_own)
        self.reward_funcs = [
            with_policy(reward, name, self.ask_policy)
            for reward, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        warn_of_other_rewards(args.method, self.reward_func_names)
        self.asked, self._asks, self._answering, self._rewards = {}, 0, None, None

        # The model, and what it can share
        self.fallbacks: list[str] = []
        self._policy = unwrapped(self.model)
        try_parts(self)
        check_setup(self)
        self._placeholder_ids, self._shares_prompts, self._shares_rollouts, self.kernels = fit_model(self)
        # TRL's kernel cannot pass the number of images per row, which LLaVA-OneVision needs.
        self._counts_images = takes_images_a_row(self._policy.config)

        # Views and rollouts
        inside = {kind: partial(self._input_view, name) for kind, name in args.input_views.items()}
        self._views = ViewMaker(args.view_sampler(), args.view_threads, self._process_view, args.view_draws, inside)
        self._rollout_views = args.rollout_view_sampler()
        self._generating: GenerationBatch | None = None
        self._colocated = None
        if self.use_vllm and self.vllm_mode == "colocate":
            self._colocated = ColocatedPrompts(self.vllm_generation, self._unexpanded)

        # The current step
        self._scored: ScoredMicroBatch | None = None
        self._step_tokens: Tensor | None = None
        self._trained: tuple[dict[str, Any], Sequence[int], Sequence[Tensor]] | None = None

        # Reports
        self._perception_means = PerceptionMeans(self.accelerator.device)
        self._grad_share: GradientShare | None = None
        self._samples = RolloutSamples(self.processing_class.decode)
        self._costs = StepCosts(self.accelerator.device, partial(log_metric, self))
        self.form_watch = FormWatch(
            ChatForm.of(self.processing_class, **self.chat_template_kwargs), self.reward_func_names
        )
        early_signs = EarlySigns(args.contrast_temperature, lambda: self.form_watch.warning is not None)
        for callback in (self.form_watch, early_signs, self._costs):
            self.add_callback(callback)

    @property
    def nonfinite_limit(self) -> int:
        return self.args.nonfinite_limit if self.args.nonfinite == "skip" else 0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        keep_no_cast_weights(self.accelerator)
        keep_float32_outputs(self.accelerator)

    @property
    def shares_prompts(self) -> bool:
        """Whether updates compute each prompt and image once for the rollouts of a group."""
        return self._shares_prompts

    @property
    def last_samples(self) -> list[dict[str, Any]]:
        """Rollouts of the last logged step: prompt, images, tokens, selected tokens, scores, reward."""
        return self._samples.latest

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not (self.model.training and generates_next(self)):
            inputs = super()._prepare_inputs(generation_batch)
            if self.model.training and not self._samples.knows_rows and "rollout_step" in inputs:
                # Resumed in the middle of a generation batch: TRL's sampler repeats its rows.
                batch = self._rollouts(self._as_drawn(generation_batch), int(inputs["rollout_step"]))
                self._samples.begin(batch.rows, batch.firsts)
            return inputs
        with self._costs.phase("rollout"):
            rollouts = self._generate_and_score_completions(generation_batch)
            groups = rollouts["group_id"] if self._shares_prompts else range(len(rollouts["group_id"]))
            if self.args.trained_answers is not None:
                rollouts, groups = self._with_answers(rollouts, groups, self._options_now().trained_answers_weight)
        micro_batches = shuffled_micro_batches(rollouts, groups, self.args.steps_per_generation or 1)
        set_buffer(self, micro_batches)
        with self._costs.phase("scoring"):
            self._score_before_updates(micro_batches)
        return next_micro_batches(self)[0]

    # Scoring

    def _packs(self, inputs: dict[str, Any]) -> bool:
        """Whether a micro-batch is scored packed: only prompts have images, no tool added one."""
        if not self._shares_prompts or "prompt_images" not in inputs:
            return False
        return not (self.tools and bool(self._has_placeholder(inputs["completion_ids"]).any()))

    def _scorer(self) -> Scorer:
        plain = self.args.scorer == "plain" or self._counts_images
        return Scorer(
            self.args,
            self._policy,
            self.accelerator.autocast,
            None if plain else self._kernel_scores,
            self.aux_loss_enabled,
            self.accelerator.num_processes,
        )

    def _kernel_scores(self, model: Any, rollouts: Rollouts, entropies: bool, aux_loss: bool) -> ResponseScores:
        logps, found, loss = super()._get_per_token_logps_and_entropies(
            model,
            rollouts.input_ids,
            rollouts.attention_mask,
            rollouts.num_response_tokens,
            compute_entropy=entropies,
            compute_aux_loss=aux_loss,
            **rollouts.vision,
        )
        # TRL's head on a reference model gives no entropies.
        return ResponseScores(logps, found if entropies else torch.full_like(logps, math.nan), None, loss)

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
        if self._scored is not None:
            scores = self._scored.scores_of(input_ids, attention_mask)
        else:
            rollouts = self._rollouts_asked(input_ids, attention_mask, logits_to_keep, vision)
            parts = rollouts.chunks(batch_size or len(input_ids))
            score = self._scorer().score
            with self._costs.phase("scoring"):
                scores = join_scores([score(model, part, compute_entropy, compute_aux_loss) for part in parts])
        return scores.logps, loss_entropies(self.args, scores) if compute_entropy else None, scores.aux_loss

    def _rollouts_asked(self, input_ids: Tensor, mask: Tensor, length: int, vision: dict[str, Any]) -> Rollouts:
        """The rollouts for which TRL asks scores while it makes a generation batch."""
        vision = trimmed(without_empty_images(vision), input_ids.shape[1])
        if "pixel_values" not in vision and bool(self._has_placeholder(input_ids).any()):
            raise RuntimeError("TRL asks for scores of rows without their images")
        batch = self._generating
        brought = bool(self.tools) and bool(self._has_placeholder(input_ids[:, -length:]).any())
        if batch is None or not self._shares_prompts or brought:
            return Rollouts(input_ids, mask, length, vision)
        groups = batch.groups_of(input_ids, mask, length)
        made = {}
        for row, group in enumerate(groups):
            if group not in made:
                made[group] = prompt_vision(self._policy.config, vision, row, input_ids.shape[1])
        return Rollouts(input_ids, mask, length, group_ids=groups, images=[made[group] for group in groups])

    def _score_before_updates(self, micro_batches: list[dict[str, Any]]) -> None:
        """Compute what a new generation batch needs before its first update; for most methods nothing."""
        args = self.args
        if args.perception_sink in SHAPINGS:
            self._shape_advantages(micro_batches)
        elif args.adds_perception_loss and args.perception_view_policy == "rollout":
            for inputs in micro_batches:
                request, rollouts = self._request(inputs)
                request.keep_scores(inputs, scores_of_views(self._scorer(), self.model_wrapped, rollouts, request))

    def _request(self, inputs: dict[str, Any]) -> tuple[ViewRequest, Rollouts]:
        return ViewRequest.of(inputs, scored_views(self.args)), Rollouts.of(inputs, self._packs(inputs))

    def _shape_advantages(self, micro_batches: list[dict[str, Any]]) -> None:
        """Detect perception tokens in a new generation batch, and shape its advantages by the scores."""

        def detect(inputs: dict[str, Any]) -> tuple[list[int], ViewScores | None]:
            request, rollouts = self._request(inputs)
            return request.rollouts, detect_tokens(self._scorer(), self.model_wrapped, rollouts, request)

        steps = self.current_gradient_accumulation_steps
        logged = shaped_advantages(micro_batches, detect, self._options_now(), steps, self.accelerator)
        for name, value in logged.items():
            log_metric(self, name, value)

    def _options_now(self) -> Any:
        """The options, with the current values of scheduled ones."""
        return with_schedules(self.args, self._share_of_run) if self.args.schedules else self.args

    @property
    def _share_of_run(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        rollouts = Rollouts.of(inputs, self._packs(inputs))
        request: ViewRequest | None = None
        normalizer: Tensor | float = 1.0
        if "perception_views" in inputs and adds_perception_loss(self.args):
            request = ViewRequest.of(inputs, scored_views(self.args), needed(self.args))
            normalizer = self._normalizer(model, inputs)
        with self._costs.phase("scoring"):
            anchor, scores = score_under_views(self._scorer(), model, rollouts, request)
        self._scored = ScoredMicroBatch(rollouts, anchor)
        if self.baseline is not None and self.model.training:
            self.baseline.see(inputs, anchor.logps)
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._scored = None
        if not self.model.training:
            return loss
        options = self._options_now()
        loss = options.rl_weight * loss
        if request is not None and scores is not None:
            term, metrics = perception_loss(scores, options, normalizer, request.weights)
            if self._grad_share is not None:
                self._grad_share.add(term)
            self._perception_means.add(metrics)
            loss = loss + term
        rows, *detected = inputs.get("perception_detected", (() if request is None else request.rollouts,))
        if scores is not None:
            detected = [part for part in (scores.score, scores.token_mask) if part is not None]
        self._trained = inputs, rows, detected
        return loss

    def _normalizer(self, model: Any, inputs: dict[str, Any]) -> Tensor | float:
        """The divisor of a micro-batch's sum, such that micro-batches and ranks of a step add up to the step's mean."""
        steps = self.current_gradient_accumulation_steps
        if self.args.perception_normalization == "microbatch":
            return float(steps)
        # DDP averages the ranks' gradients, so each rank's sum counts num_processes times.
        ranks = self.accelerator.num_processes
        if self.args.perception_normalization == "rollout":
            # The count is the generation batch's; one optimizer step trains on this share of it.
            return inputs["perception_num_rollouts"] * (steps / self.args.steps_per_generation) / ranks
        if self._step_tokens is None:
            self._step_tokens = self._count_step_tokens(model, steps)
        return self._step_tokens / ranks

    def _count_step_tokens(self, model: Any, steps: int) -> Tensor:
        """Selected tokens of the `steps` micro-batches of the optimizer step that begins, over all ranks."""
        count = torch.zeros((), device=self.accelerator.device)
        for inputs in next_micro_batches(self, steps):
            request, rollouts = self._request(inputs)
            if self.args.perception_selector == "all":
                count += request.response_mask.sum()
                continue
            detected = detect_tokens(self._scorer(), model, rollouts, request)
            if detected is not None and detected.token_mask is not None:
                count += detected.token_mask.sum()
        return self.accelerator.reduce(count, "sum")

    # Metrics

    def _keep_samples(self) -> None:
        """Keep rollouts of the trained micro-batch, if its step is the first or will be logged."""
        trained, self._trained = self._trained, None
        step = self.state.global_step + 1
        if trained is not None and (step == 1 or step % max(self.state.logging_steps, 1) == 0):
            self._samples.keep(*trained, step)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._costs.begin()
        follow_schedules(self, self._share_of_run)
        if self.args.log_perception_grad_share and self._grad_share is None:
            self._grad_share = GradientShare(self.model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._keep_samples()
        if self.accelerator.sync_gradients:
            self._step_tokens = None
            if self.args.adds_perception_loss:
                for name, value in self._perception_means.take(self.accelerator).items():
                    log_metric(self, f"perception/{name}", value)
            if self._grad_share is not None:
                log_metric(self, "perception/grad_norm_share", self._grad_share.value(self.accelerator))
                self._grad_share = None
        return loss
