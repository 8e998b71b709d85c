"""Generation in two turns: rollouts of the clean images, then rollouts of views made from the first ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel

from cppo.errors import UserError
from cppo.policy.families import family_of
from cppo.policy.rollout import method_replaced, shared_generation
from cppo.policy.vision_inputs import (
    PER_TOKEN_KEYS,
    VisionInputs,
    concatenate_rows,
    counted_images,
    has_images,
    model_images,
    slice_rows,
)

Moved = Callable[[Tensor, Tensor, int, VisionInputs], VisionInputs]
"""(clean rollouts of a group [n, P + T], their mask, T, image inputs of the prompt) -> image inputs of the view."""


@contextmanager
def generation_in_turn(
    model: PreTrainedModel,
    groups: Sequence[int],
    sees_view: Sequence[bool],
    moved: Moved,
    generation_config: GenerationConfig,
    rows_at_a_time: int | None,
    shares: bool,
) -> Iterator[list[int]]:
    """Context: `model.generate` answers rows that see a view after all others, because those answers make the view.

    Args:
        model: a transformers vision-language model without wrappers.
        groups: the group of each row that `generate` will get; groups are whole.
        sees_view: whether each row sees its group's view.
        moved: makes the view of a group with images.
        generation_config, rows_at_a_time: as for `shared_generation`, which runs both generations.
        shares: whether they share prompts.

    Yields:
        What both `shared_generation` yield, in order.

    Raises:
        UserError: it is not clear which images belong to which row.
    """
    original: Any = model.generate
    prefills: list[int] = []

    def answered(inputs: Mapping[str, Any], rows: Sequence[int], vision: Sequence[VisionInputs]) -> Tensor:
        known = [groups[row] for row in rows] if shares else None
        with (
            method_replaced(model, "generate", original),
            shared_generation(model, known, generation_config, rows_at_a_time) as found,
        ):
            run: Any = model.generate
            answers: Tensor = run(**_rows(model.config, inputs, rows, vision))
        prefills.extend(found)
        return answers

    def generate(**inputs: Any) -> Tensor:
        images = counted_images(model.config, inputs)
        if images is None:
            raise UserError("rollout_views = ['entropy_ascent']: the images cannot be assigned to rows")
        vision = [slice_rows(images, row, row + 1) for row in range(len(groups))]
        first, second = ([row for row, sees in enumerate(sees_view) if sees is seen] for seen in (False, True))
        clean = {group: [place for place, row in enumerate(first) if groups[row] == group] for group in groups}
        answers = answered(inputs, first, vision)
        length = answers.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"][first], _generated(answers[:, -length:], inputs)], dim=1)
        views = {}
        for group in dict.fromkeys(groups[row] for row in second):
            own = vision[first[clean[group][0]]]
            if has_images(model.config, own):
                own = moved(answers[clean[group]], mask[clean[group]], length, own)
            views[group] = own
        for row in second:
            vision[row] = views[groups[row]]
        others = answered(inputs, second, vision) if second else answers[:0]
        longest = max(answers.shape[1], others.shape[1])
        padding = inputs["generation_config"].pad_token_id
        parts = [pad(part, (0, longest - part.shape[1]), value=padding) for part in (answers, others)]
        return torch.cat(parts)[torch.tensor([*first, *second]).argsort().to(answers.device)]

    with method_replaced(model, "generate", generate):
        yield prefills


def _rows(
    config: Any, inputs: Mapping[str, Any], rows: Sequence[int], vision: Sequence[VisionInputs]
) -> dict[str, Any]:
    """The arguments of `generate` for these rows, with each row's image inputs."""
    shown = [vision[row] for row in rows]
    if not any(has_images(config, own) for own in shown):
        shown = [{key: value for key, value in own.items() if key in PER_TOKEN_KEYS} for own in shown]
    else:
        fullest = max(shown, key=len)
        shown = [own for own in shown if own.keys() == fullest.keys()] if len({*map(len, shown)}) > 1 else shown
    tokens = {key: torch.cat([vision[row][key] for row in rows]) for key in PER_TOKEN_KEYS if key in vision[rows[0]]}
    device = inputs["input_ids"].device
    images = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in model_images(config, concatenate_rows(shown)).items()
    }
    left_out = {*family_of(config).image_inputs, *PER_TOKEN_KEYS}
    kept = {key: value for key, value in inputs.items() if key not in left_out}
    places = torch.tensor(list(rows), device=device)
    by_row = {key: kept[key][places] for key in ("input_ids", "attention_mask")}
    return {**kept, **by_row, **images, **{key: value.to(device) for key, value in tokens.items()}}


def _generated(responses: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """1 for the tokens of each response up to its first end token, [n, T]."""
    ends = inputs["generation_config"].eos_token_id
    is_end = torch.isin(responses, torch.tensor(ends if isinstance(ends, list) else [ends], device=responses.device))
    return (is_end.cumsum(dim=1) - is_end.long() == 0).long()
