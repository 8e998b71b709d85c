"""The first half of a step: rollouts with their group, their views and the gate.

1. The images of a row become upright RGB once; I+ and I- of each are made while the rollouts are generated.
2. The gate selects the rollouts of the perception term. The processor then takes their prompts' views.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cppo.messages import embedded_images, replace_images, without_images
from cppo.options.views import PIXEL_NOISE
from cppo.perception import SELECTORS, gate_rollouts, needs_of
from cppo.policy import only_special_tokens, shared_generation
from cppo.policy.ascent import PixelSteps, ascended
from cppo.policy.images_once import images_once
from cppo.policy.in_turn import generation_in_turn
from cppo.policy.inside import inside_view
from cppo.policy.prompts import Row, process_prompt, prompt_images, unexpanded_ids
from cppo.policy.similarity import is_image
from cppo.policy.vision_inputs import VISION_KEYS, VisionInputs, packable, prompt_vision, with_pixel_noise
from cppo.training.colocated import ColocatedPrompts
from cppo.training.drawing import DrawingTrainer
from cppo.training.early_signs import FormWatch
from cppo.training.micro_batch import response_mask
from cppo.training.rollouts import GenerationBatch, gated_rollouts, rollout_weights, token_draws
from cppo.training.setup import agree_on_images, check_reward_size, go_without
from cppo.training.telemetry import RolloutSamples
from cppo.training.view_maker import BatchViews, RolloutViews, ViewMaker, shown_image
from cppo.trl_surface import generation_batches, log_metric
from cppo.upstream import SHARED_PREFILL


class RolloutTrainer(DrawingTrainer):
    """The part of `CPPOTrainer` that makes rollouts; the trainer sets its attributes.

    Attributes:
        form_watch: reports why no response earned a reward in the first steps.
    """

    form_watch: FormWatch
    _policy: PreTrainedModel
    _shares_prompts: bool
    _shares_rollouts: bool
    _views: ViewMaker
    _rollout_views: RolloutViews | None
    _colocated: ColocatedPrompts | None
    _samples: RolloutSamples

    def _has_placeholder(self, completion_ids: Tensor) -> Tensor:
        """The responses with an image placeholder, which only a tool can insert; bool [B]."""
        placeholders = torch.tensor(self._placeholder_ids, dtype=completion_ids.dtype, device=completion_ids.device)
        return torch.isin(completion_ids, placeholders).any(dim=1)

    def _rollouts(self, inputs: Sequence[Row], step: int) -> GenerationBatch:
        """The rollouts of a generation batch that begins after `step` steps; in training augmented if requested."""
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        first = self.accelerator.process_index * len(inputs)
        batch = GenerationBatch.of(inputs, first, size, alone=self.environment_factories is not None)
        if training and self._rollout_views is not None and self.args.rollout_view_mode == "augment":
            batch.rows = self._rollout_views.augmented(batch, self._epoch, self._progress(step))
        return batch

    def _shown_rows(self, batch: GenerationBatch, step: int) -> list[Row]:
        """The rows; the images of some rollouts carry the view that these rollouts are made from."""
        drawn = self.args.rollout_view_mode == "mix" and self.args.pixel_steps is None
        if not self.model.training or self._rollout_views is None or not drawn:
            return batch.rows
        return self._rollout_views.mixed(batch, self.num_generations, self._epoch, self._progress(step))

    def _progress(self, step: int) -> float:
        """The share of the run that is done after training on the generation batch that began after `step` steps."""
        batches = (self.args.steps_per_generation or 1) * self.num_iterations
        steps = batches / self.args.gradient_accumulation_steps
        return min((step + steps) / max(self.state.max_steps, 1), 1.0)

    def _process_view(self, prompt: Any, change: Callable[[VisionInputs], VisionInputs] | None = None) -> Any:
        """The processor's inputs for a prompt, as the scorers need them; `change` acts on the image inputs."""
        made = process_prompt(self.processing_class, prompt, self.tools or None, self.chat_template_kwargs)
        if change is not None:
            made = replace(made, vision=change(made.vision))
        if not self._shares_prompts:
            return made
        return replace(made, vision=packable(self._policy.config, made.vision))

    def _unexpanded(self, prompt: Any) -> list[int]:
        """The token ids of a prompt with one placeholder per image."""
        options = {**self.chat_template_kwargs, "chat_template": self.chat_template}
        return unexpanded_ids(self.processing_class, prompt, self.tools or None, options)

    def _input_view(self, name: str, prompt: Any, tokens: list[int], rng: np.random.Generator) -> VisionInputs:
        """The view of that name, made of the model's inputs for a prompt with images and these tokens."""
        if name == PIXEL_NOISE:
            noise = partial(with_pixel_noise, deviation=self.args.view_pixel_noise, rng=rng)
            return self._process_view(prompt, noise).vision
        text = self._unexpanded(without_images(prompt)) if name == "image_removed" else ()
        return inside_view(name, tokens, is_image(self._policy, torch.tensor(tokens)), text)

    def _tokenize_prompts(self, prompts: list) -> tuple[Any, Any, Any]:
        own = [embedded_images(prompt) for prompt in prompts]
        shown = [
            replace_images(prompt, [shown_image(image) for image in images])
            for prompt, images in zip(prompts, own, strict=True)
        ]
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(shown)
        if self._colocated is not None:
            self._colocated.begin(prompt_ids, shown)
        # Of the original prompts, not as rollouts see them: the update uses the originals.
        return prompt_ids, None if images is None else own, multimodal_fields

    def _generate(self, prompts: list) -> Any:
        generated = super()._generate(prompts)
        if self._generating is not None:
            prompt_ids, response_ids, *_ = generated
            self._generating.generated(prompt_ids, response_ids)
        return generated

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self._made is not None:
            return self._made.responses, self._made.logps
        if images is not None:
            images = [[shown_image(image) for image in row] if row else row for row in images]
        if self.use_vllm and images is not None:
            # vLLM's batches mark a row without images by None.
            images = [row or None for row in images]
        with ExitStack() as changes:
            changes.enter_context(only_special_tokens(self._policy))
            # vLLM and continuous batching call neither `generate` nor the model's forward.
            if not (self.use_vllm or self.use_transformers_continuous_batching):
                changes.enter_context(self._generating_together())
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        """Keep the pixels of a generation batch on the host; those that a pass needs come from there.

        TRL moves them to the device for all rollouts at once, to generate and again to score.
        """
        on_host = self._generating is not None and self._shares_prompts and not self.tools
        if on_host and isinstance(data, Mapping):
            return {key: value if key == "pixel_values" else self._prepare_input(value) for key, value in data.items()}
        return super()._prepare_input(data)

    @contextmanager
    def _generating_together(self) -> Iterator[None]:
        """Context: each group's prompt is prefilled once; a line reports a batch without sharing."""
        size = self.args.per_device_generation_batch_size
        groups = self._groups_shown() if self._shares_rollouts else None
        batch, steps = self._generating, self.args.pixel_steps
        together = shared_generation(self._policy, groups, self.generation_config, size)
        if batch is not None and steps is not None and self.model.training and self._rollout_views is not None:
            sees = [self._rollout_views.sees_view(number, self.num_generations) for number in batch.numbers]
            moved, shares = partial(self._ascended, steps), self._shares_rollouts
            together = generation_in_turn(
                self._policy, batch.group_ids, sees, moved, self.generation_config, size, shares
            )
        with together as prefills:
            yield
        if groups is not None and not prefills and size != 1:
            self._shares_rollouts = False
            go_without(self, f"{SHARED_PREFILL.lost}: this call of `generate` cannot share", sharing=True)

    def _ascended(
        self, steps: PixelSteps, ids: Tensor, mask: Tensor, length: int, vision: VisionInputs
    ) -> VisionInputs:
        """The images of a group's other rollouts, changed by its clean rollouts [n, P + T]."""
        args, shares = self.args, self._shares_prompts
        with self._costs.phase("views"), self.accelerator.autocast():
            return ascended(
                self._policy, ids, mask, length, vision, steps, args.view_ascent_band, args.temperature, shares
            )

    def _groups_shown(self) -> list[int] | None:
        """The groups of the current rollouts; those made from a view have groups of their own."""
        batch, views = self._generating, self._rollout_views
        if batch is None or views is None or self.args.rollout_view_mode != "mix" or not self.model.training:
            return None if batch is None else batch.group_ids
        sees = [views.sees_view(number, self.num_generations) for number in batch.numbers]
        number = {key: place for place, key in enumerate(zip(batch.group_ids, sees, strict=True))}
        return [number[key] for key in zip(batch.group_ids, sees, strict=True)]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        inputs = self.form_watch.with_opening(inputs)
        self._asks = 0
        if self._made is not None:
            rewards = self._made.rewards
        else:
            with self._costs.phase("reward"):
                rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        check_reward_size(rewards, self.reward_weights.tolist(), self.reward_func_names)
        self.form_watch.see(prompts, completions, rewards, self.reward_func_names)
        if self._generating is not None:
            self._generating.rewarded(completion_ids_list, rewards)
        return rewards

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        step, training, views = self.state.global_step, self.model.training, None
        if training and self.args.dynamic_sampling_rounds > 1:
            inputs = self._redrawn(inputs)
        batch = self._rollouts(inputs, step)
        agree_on_images(self, batch.rows)
        rows = self._shown_rows(batch, step)
        if training and self.args.uses_perception:
            with self._costs.phase("views"):
                views = self._views.begin(batch, self._epoch, self._progress(step), self.args.scored_views)
        self._generating = batch
        try:
            with images_once(self.processing_class):
                output = super()._generate_and_score_completions(rows)
        finally:
            self._generating, made, self._made = None, self._made, None
        self._put_images_together(output, batch)
        if not training:
            return output
        rewards = batch.rewards
        assert rewards is not None
        summed = self._summed(rewards)
        self._samples.begin(batch.rows, batch.firsts)
        output["rollout_place"], output["rollout_reward"] = list(range(len(batch.rows))), summed[batch.mine]
        output["rollout_step"] = torch.tensor(step)
        if self._stages is not None:
            log_metric(self, "data_stage", self._stages.stage(generation_batches(self)) + 1)
        if made is not None:
            output["rollout_row"] = made.rows
        if self.baseline is not None:
            output["advantages"] = self._baseline_advantages(batch, summed)
        if views is not None:
            self._add_perception(output, batch, views, rewards, summed)
        return output

    def _add_perception(
        self, output: dict[str, Any], batch: GenerationBatch, views: BatchViews, rewards: Tensor, summed: Tensor
    ) -> None:
        """Add what the perception term needs: each rollout's weight, the views of gated-in rollouts, random draws."""
        gate = self._gate(output, batch, rewards, summed)
        all_gates = self.accelerator.gather(gate)
        batch_number = generation_batches(self)
        limit = self.args.perception_rollouts_per_group
        weights = rollout_weights(all_gates, self.num_generations, limit, self.args.seed, batch_number)[batch.mine]
        if self.args.perception_weighting == "advantage":
            weights = weights * output["advantages"]
        with self._costs.phase("views"):
            output["perception_views"] = views.inputs((weights > 0).tolist(), batch.prompts, self.args.scored_views)
        output["view_key"] = list(views.keys)
        output["perception_weights"] = weights
        if "draws" in needs_of(SELECTORS[self.args.perception_selector]):
            shape, rank = output["completion_ids"].shape, self.accelerator.process_index
            output["perception_draws"] = token_draws(shape, self.args.seed, batch_number, rank).to(weights.device)
        output["perception_num_rollouts"] = all_gates.sum()
        log_metric(self, "perception/gated_fraction", all_gates.float().mean().item())

    def _put_images_together(self, output: dict[str, Any], batch: GenerationBatch) -> None:
        """Give rollouts their group ids and, where prompts are shared, the inputs of packing on the host.

        These are one copy of each group's images, the prompts' tokens and the lengths of the responses.
        """
        if self.tools:  # a tool may add images to some rollouts
            for index in self._has_placeholder(output["completion_ids"]).nonzero().flatten().tolist():
                batch.leave(index)
        output["group_id"] = list(batch.group_ids)
        if not self._shares_prompts:
            return
        output["prompt_tokens"] = list(batch.prompts)
        output["response_length"] = output["completion_mask"].sum(dim=1).tolist()
        length = output["prompt_ids"].shape[1] + output["completion_ids"].shape[1]
        vision, made = {key: output.get(key) for key in VISION_KEYS}, {}
        for first in dict.fromkeys(batch.firsts):
            images = prompt_vision(self._policy.config, vision, first, length)
            # Copies, to free the images of a group's other rollouts; on the host, like the views.
            made[first] = {name: value.to("cpu", copy=True) for name, value in images.items()}
        output["prompt_images"] = [made[first] for first in batch.firsts]
        if not self.tools:
            for key in VISION_KEYS:
                output.pop(key, None)

    def _gate(self, output: dict[str, Any], batch: GenerationBatch, rewards: Tensor, summed: Tensor) -> Tensor:
        """The gated-in rollouts of this process, bool [B]."""
        compared = self._compared(rewards, summed)
        correctness = None
        if self.args.perception_gate == "correct":
            correctness = rewards[batch.mine, self.reward_func_names.index(str(self.args.perception_gate_reward))]
        if self.baseline is not None:
            gate = gate_rollouts(self.args.perception_gate, output["advantages"], correctness)
        else:
            gate = gated_rollouts(
                self.args.perception_gate, output["advantages"], compared, self.num_generations, batch.mine, correctness
            )
        looks = self.args.looks_at_images
        has_images = torch.tensor([not looks or bool(prompt_images(row)) for row in batch.rows], device=gate.device)
        # Views are made from the prompt's images and would not fit a response with a tool's images.
        own_images_only = ~self._has_placeholder(output["completion_ids"])
        return gate & has_images & own_images_only & response_mask(output).any(dim=1)
