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
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cppo.assets import resolve_model
from cppo.errors import UserError
from cppo.methods import SHAPING_SINKS
from cppo.perception import (
    METRICS,
    ResponseScores,
    ViewScores,
    adds_perception_loss,
    loss_entropies,
    perception_loss,
    scored_views,
    shape_advantages,
)
from cppo.policy import only_special_tokens, shared_generation, takes_images_a_row, unwrapped, vision_tower_parameters
from cppo.policy.loading import whole_weights
from cppo.policy.prompts import Row, embedded_images, process_prompt, prompt_images, replace_images
from cppo.policy.vision_inputs import packable, prompt_vision, trimmed, without_empty_images
from cppo.rewards import guarded_rewards, named_rewards
from cppo.rewards.form import ChatForm
from cppo.training.checkpoint import ResumableGRPOTrainer
from cppo.training.config import CPPOConfig
from cppo.training.rollouts import (
    GenerationBatch,
    ViewMaker,
    gated_rollouts,
    rollout_weights,
    shown_image,
    shuffled_micro_batches,
    token_draws,
)
from cppo.training.scoring import (
    VISION_KEYS,
    Rollouts,
    ScoredMicroBatch,
    Scorer,
    ViewRequest,
    detect_tokens,
    join_scores,
    response_mask,
    score_under_views,
    scores_of_views,
)
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
from cppo.training.telemetry import FormWatch, GradientShare, Mark, RolloutSamples, StepCosts
from cppo.training.upstream import SHARED_PREFILL
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
        self._policy = unwrapped(self.model)
        self._views = ViewMaker(args.view_sampler(), args.view_threads, self._process_view, args.view_draws)
        self._rollout_views = args.rollout_view_sampler()
        self._generating: GenerationBatch | None = None
        self._scored: ScoredMicroBatch | None = None
        self._step_tokens: Tensor | None = None
        self._perception_sums = {name: torch.zeros(2, device=self.accelerator.device) for name in METRICS}
        self._grad_share: GradientShare | None = None
        self._samples = RolloutSamples(self.processing_class.decode)
        self._trained: tuple[dict[str, Any], Sequence[int], ViewScores | None] | None = None
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

    def _rollouts(self, inputs: Sequence[Row], step: int) -> GenerationBatch:
        """The rollouts of a generation batch that begins after `step` steps; in training augmented on request."""
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        first = self.accelerator.process_index * len(inputs)
        batch = GenerationBatch.of(inputs, first, size, alone=self.environment_factories is not None)
        if training and self._rollout_views is not None and self.args.rollout_view_mode == "augment":
            batch.rows = self._rollout_views.augmented(batch, self._epoch, self._progress(step))
        return batch

    @property
    def _epoch(self) -> int:
        return math.floor(self.state.epoch or 0)

    def _progress(self, step: int) -> float:
        """The share of the run that is done once the generation batch that began after `step` steps is trained on."""
        steps = self.args.steps_per_generation * self.num_iterations / self.args.gradient_accumulation_steps
        return min((step + steps) / max(self.state.max_steps, 1), 1.0)

    def _process_view(self, prompt: Any) -> Any:
        """What the processor makes of a prompt, as the scorers take it."""
        made = process_prompt(self.processing_class, prompt, self.tools or None, self.chat_template_kwargs)
        if not self._shares_prompts:
            return made
        return replace(made, vision=packable(self._policy.config, made.vision))

    def _tokenize_prompts(self, prompts: list) -> tuple[Any, Any, Any]:
        own = [embedded_images(prompt) for prompt in prompts]
        shown = [
            replace_images(prompt, [shown_image(image) for image in images])
            for prompt, images in zip(prompts, own, strict=True)
        ]
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(shown)
        # Of the prompts as they are, not as rollouts see them: the update takes them from here.
        return prompt_ids, None if images is None else own, multimodal_fields

    def _generate(self, prompts: list) -> Any:
        generated = super()._generate(prompts)
        if self._generating is not None:
            prompt_ids, response_ids, *_ = generated
            self._generating.generated(prompt_ids, response_ids, self.accelerator.process_index * len(prompt_ids))
        return generated

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if images is not None:
            images = [[shown_image(image) for image in row] if row else row for row in images]
        if self.use_vllm and images is not None:
            # vLLM's batches know a row without images by None.
            images = [row or None for row in images]
        with ExitStack() as changes:
            changes.enter_context(only_special_tokens(self._policy))
            # vLLM and continuous batching call neither `generate` nor the model's forward.
            if not (self.use_vllm or self.use_transformers_continuous_batching):
                changes.enter_context(self._generating_together())
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)

    @contextmanager
    def _generating_together(self) -> Iterator[None]:
        """Within this context, each group's prompt is prefilled once; it is told where none was."""
        size = self.args.per_device_generation_batch_size
        groups = self._groups_shown() if self._shares_rollouts else None
        with shared_generation(self._policy, groups, self.generation_config, size) as prefills:
            yield
        if groups is not None and not prefills and size != 1:
            self._shares_rollouts = False
            go_without(self, f"{SHARED_PREFILL.lost}: `generate` was asked for what cannot be shared", sharing=True)

    def _groups_shown(self) -> list[int] | None:
        """The groups of the rollouts being made; those made from a view have groups of their own."""
        batch, views = self._generating, self._rollout_views
        if batch is None or views is None or self.args.rollout_view_mode != "mix" or not self.model.training:
            return batch and batch.group_ids
        sees = [views.sees_view(number, self.num_generations) for number in batch.numbers]
        number = {key: place for place, key in enumerate(zip(batch.group_ids, sees, strict=True))}
        return [number[key] for key in zip(batch.group_ids, sees, strict=True)]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        inputs = self.form_watch.with_opening(inputs)
        with self._phase("reward"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        check_reward_size(rewards, self.reward_weights.tolist(), self.reward_func_names)
        self.form_watch.see(prompts, completions, rewards, self.reward_func_names)
        if self._generating is not None:
            self._generating.rewarded(completion_ids_list, rewards)
        return rewards

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        step = self.state.global_step
        batch = self._rollouts(inputs, step)
        agree_on_images(self, batch.rows)
        training, views, rows = self.model.training, None, batch.rows
        if training and self._rollout_views is not None and self.args.rollout_view_mode == "mix":
            rows = self._rollout_views.mixed(batch, self.num_generations, self._epoch, self._progress(step))
        if training and self.args.uses_perception:
            with self._phase("views"):
                views = self._views.begin(batch, self._epoch, self._progress(step))
        self._generating = batch
        try:
            output = super()._generate_and_score_completions(rows)
        finally:
            self._generating = None
        self._put_images_together(output, batch)
        if not training:
            return output
        rewards = batch.rewards
        assert rewards is not None
        first = self.accelerator.process_index * len(batch.rows)
        mine = slice(first, first + len(batch.rows))
        summed = (rewards * self.reward_weights.to(rewards)).nansum(dim=1)
        summed = summed.masked_fill(rewards.isnan().all(dim=1), math.nan)
        self._samples.begin(batch.rows, batch.firsts)
        output["rollout_place"], output["rollout_reward"] = list(range(len(batch.rows))), summed[mine]
        output["rollout_step"] = torch.tensor(step)
        if views is None:
            return output

        gate = self._gate(output, batch, rewards, summed, mine)
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        all_gates = self.accelerator.gather(gate)
        batch_number = generation_batches(self)
        limit = self.args.perception_rollouts_per_group
        weights = rollout_weights(all_gates, self.num_generations, limit, self.args.seed, batch_number)[mine]
        if self.args.perception_weighting == "advantage":
            weights = weights * output["advantages"]
        with self._phase("views"):
            output["perception_views"] = views.inputs((weights > 0).tolist(), prompts, self.args.scored_views)
        output["view_key"] = list(views.keys)
        output["perception_weights"] = weights
        if self.args.perception_selector == "random":
            shape, rank = output["completion_ids"].shape, self.accelerator.process_index
            output["perception_draws"] = token_draws(shape, self.args.seed, batch_number, rank).to(weights.device)
        output["perception_num_rollouts"] = all_gates.sum()
        log_metric(self, "perception/gated_fraction", all_gates.float().mean().item())
        return output

    def _put_images_together(self, output: dict[str, Any], batch: GenerationBatch) -> None:
        """Give rollouts their group ids and, where prompts are shared, a group one copy of its images."""
        output["group_id"] = list(batch.group_ids)
        if not self._shares_prompts:
            return
        length = output["prompt_ids"].shape[1] + output["completion_ids"].shape[1]
        vision, made = {key: output.get(key) for key in VISION_KEYS}, {}
        for first in dict.fromkeys(batch.firsts):
            images = prompt_vision(self._policy.config, vision, first, length)
            # Copies, so that the images of a group's other rollouts go.
            made[first] = {name: value.clone() for name, value in images.items()}
        output["prompt_images"] = [made[first] for first in batch.firsts]
        if not self.tools:  # which may bring images of their own to some rollouts
            for key in VISION_KEYS:
                output.pop(key, None)

    def _gate(
        self, output: dict[str, Any], batch: GenerationBatch, rewards: Tensor, summed: Tensor, mine: slice
    ) -> Tensor:
        """Which of this process's rollouts are gated in, bool [B]."""
        # TRL normalizes the sum of the rewards, or each of them; one of weight 0 only looks on.
        weighted = rewards[:, self.reward_weights.to(rewards.device) != 0]
        compared = summed[:, None] if self.multi_objective_aggregation == "sum_then_normalize" else weighted
        correctness = None
        if self.args.perception_gate == "correct":
            correctness = rewards[mine, self.reward_func_names.index(self.args.perception_gate_reward)]
        gate = gated_rollouts(
            self.args.perception_gate, output["advantages"], compared, self.num_generations, mine, correctness
        )
        has_images = torch.tensor([bool(prompt_images(row)) for row in batch.rows], device=gate.device)
        # Views are made of the prompt's images, and would not fit a response with images of a tool.
        own_images_only = ~self._has_placeholder(output["completion_ids"])
        return gate & has_images & own_images_only & response_mask(output).any(dim=1)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not (self.model.training and generates_next(self)):
            inputs = super()._prepare_inputs(generation_batch)
            if self.model.training and not self._samples.knows_rows and "rollout_step" in inputs:
                # Resumed in the middle of a generation batch, whose rows TRL's sampler brings again.
                batch = self._rollouts(generation_batch, int(inputs["rollout_step"]))
                self._samples.begin(batch.rows, batch.firsts)
            return inputs
        with self._phase("rollout"):
            batch = self._generate_and_score_completions(generation_batch)
        count = self.args.steps_per_generation
        groups = batch["group_id"] if self._shares_prompts else range(len(batch["group_id"]))
        micro_batches = shuffled_micro_batches(batch, groups, count)
        set_buffer(self, micro_batches)
        with self._phase("scoring"):
            self._score_before_updates(micro_batches)
        return next_micro_batches(self)[0]

    # Scoring

    def _packs(self, inputs: dict[str, Any]) -> bool:
        """Whether a micro-batch is scored packed: its images lie in the prompts alone, no tool brought one."""
        if not self._shares_prompts or "prompt_images" not in inputs:
            return False
        return not (self.tools and bool(self._has_placeholder(inputs["completion_ids"]).any()))

    def _scorer(self) -> Scorer:
        # TRL's kernel cannot be told the number of images in each row, which LLaVA-OneVision needs.
        plain = self.args.scorer == "plain" or takes_images_a_row(self._policy.config)
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
        # TRL's head on a reference model knows no entropies.
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
            score = self._scorer().rows
            with self._phase("scoring"):
                scores = join_scores([score(model, part, compute_entropy, compute_aux_loss) for part in parts])
        return scores.logps, loss_entropies(self.args, scores) if compute_entropy else None, scores.aux_loss

    def _rollouts_asked(self, input_ids: Tensor, mask: Tensor, length: int, vision: dict[str, Any]) -> Rollouts:
        """The rollouts whose scores TRL asks for while it makes a generation batch."""
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
        """What is to be known of a new generation batch before its first update; for most methods nothing."""
        args = self.args
        if args.perception_sink in SHAPING_SINKS:
            self._shape_advantages(micro_batches)
        elif args.adds_perception_loss and args.perception_view_policy == "rollout":
            for inputs in micro_batches:
                request, rollouts = self._request(inputs)
                request.keep_scores(inputs, scores_of_views(self._scorer(), self.model_wrapped, rollouts, request))

    def _request(self, inputs: dict[str, Any]) -> tuple[ViewRequest, Rollouts]:
        return ViewRequest.of(inputs, scored_views(self.args)), Rollouts.of(inputs, self._packs(inputs))

    def _shape_advantages(self, micro_batches: list[dict[str, Any]]) -> None:
        """Detect in a new generation batch, and shape its advantages by the scores."""
        found: list[tuple[list[int], ViewScores | None]] = []
        counts = torch.zeros(4, device=self.accelerator.device)
        for inputs in micro_batches:
            request, rollouts = self._request(inputs)
            detected = detect_tokens(self._scorer(), self.model_wrapped, rollouts, request)
            found.append((request.rows, detected))
            if detected is not None:
                inputs["perception_detected"] = (request.rows, detected.score, detected.token_mask)
                counts[:2] += torch.stack([detected.token_mask.sum(), detected.response_mask.bool().sum()])
            del inputs["perception_views"]  # the loss has no use for them
        shaped, dependency = shape_advantages(
            [inputs["advantages"] for inputs in micro_batches],
            found,
            micro_batches[0]["completion_ids"].shape[1],
            self.args,
            self.current_gradient_accumulation_steps,
            self.accelerator.gather,
            self.accelerator.process_index,
        )
        for inputs, advantages in zip(micro_batches, shaped, strict=True):
            inputs["advantages"] = advantages
        counts[2:] = torch.stack([dependency.nansum(), (~dependency.isnan()).sum()])
        selected, tokens, total, rollouts = self.accelerator.reduce(counts, "sum").tolist()
        log_metric(self, "perception/selected_fraction", selected / tokens if tokens else math.nan)
        log_metric(self, "perception/dependency", total / rollouts if rollouts else math.nan)

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        rollouts, request, normalizer = Rollouts.of(inputs, self._packs(inputs)), None, None
        if "perception_views" in inputs and adds_perception_loss(self.args):
            request = ViewRequest.of(inputs, scored_views(self.args))
            normalizer = self._normalizer(model, inputs)
        with self._phase("scoring"):
            anchor, scores = score_under_views(self._scorer(), model, rollouts, request)
        self._scored = ScoredMicroBatch(rollouts, anchor)
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._scored = None
        if not self.model.training:
            return loss
        loss = self.args.rl_weight * loss
        if scores is not None:
            term, metrics = perception_loss(scores, self.args, normalizer, request.weights)
            if self._grad_share is not None:
                self._grad_share.add(term)
            for name, (total, count) in metrics.items():
                self._perception_sums[name] += torch.stack([total.float(), count.float()])
            loss = loss + term
        self._trained = inputs, request.rows if scores is not None else (), scores
        return loss

    def _normalizer(self, model: Any, inputs: dict[str, Any]) -> Tensor | float:
        """What divides a micro-batch's sum, so that the micro-batches and ranks of a step add up to the step's mean."""
        steps = self.current_gradient_accumulation_steps
        if self.args.perception_normalization == "microbatch":
            return float(steps)
        # DDP averages the ranks' gradients, so each rank's sum counts num_processes times.
        ranks = self.accelerator.num_processes
        if self.args.perception_normalization == "rollout":
            # The rollouts counted are the generation batch's; one optimizer step trains on this share of them.
            return inputs["perception_num_rollouts"] * (steps / self.args.steps_per_generation) / ranks
        if self._step_tokens is None:
            self._step_tokens = self._count_step_tokens(model, steps)
        return self._step_tokens / ranks

    def _count_step_tokens(self, model: Any, steps: int) -> Tensor:
        """Selected tokens of the `steps` micro-batches of the optimizer step that begins now, over all ranks."""
        count = torch.zeros((), device=self.accelerator.device)
        for inputs in next_micro_batches(self, steps):
            request, rollouts = self._request(inputs)
            if self.args.perception_selector == "all":
                count += request.response_mask.sum()
                continue
            detected = detect_tokens(self._scorer(), model, rollouts, request)
            if detected is not None:
                count += detected.token_mask.sum()
        return self.accelerator.reduce(count, "sum")

    # Metrics

    def _log_perception(self) -> None:
        """Log the means over the tokens of the optimizer step's micro-batches, of all ranks."""
        sums = self.accelerator.reduce(torch.stack(list(self._perception_sums.values())), "sum").tolist()
        for (name, own), (total, count) in zip(self._perception_sums.items(), sums, strict=True):
            log_metric(self, f"perception/{name}", total / count if count else math.nan)
            own.zero_()

    def _keep_samples(self) -> None:
        """Keep rollouts of the micro-batch that was trained on, if its step is the first or will be logged."""
        trained, self._trained = self._trained, None
        step = self.state.global_step + 1
        if trained is None or not (step == 1 or step % max(self.state.logging_steps, 1) == 0):
            return
        inputs, rows, scores = trained
        detected = None if scores is None else (scores.score, scores.token_mask)
        if "perception_detected" in inputs:
            rows, *detected = inputs["perception_detected"]
        self._samples.keep(inputs, rows, detected, step)

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
