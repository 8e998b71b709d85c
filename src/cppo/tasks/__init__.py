"""Generated visual reasoning tasks with known perception tokens.

Three families: `digits` (arithmetic over handwritten digits), `shapes` (count, compare and locate coloured shapes) and
`chart` (read bars, then compute). Every item is a pure function of (family, options, seed, index, split).
"""

from collections.abc import Mapping

from cppo.errors import UserError
from cppo.tasks import chart, digits, shapes
from cppo.tasks.base import SPLITS, TaskItem, TaskOptions, add_noise, item_streams, write_response

_SKETCHES = {"digits": digits.sketch, "shapes": shapes.sketch, "chart": chart.sketch}
TASK_NAMES: tuple[str, ...] = tuple(_SKETCHES)

__all__ = ["TASK_NAMES", "TaskItem", "TaskOptions", "make_item", "parse_task_options"]


def parse_task_options(name: str, options: Mapping[str, str]) -> TaskOptions:
    """The options of family `name` from their text.

    Raises UserError for no such family, no such option, or a value out of range.
    """
    _check_family(name)
    try:
        return TaskOptions.parse(options)
    except UserError as error:
        raise UserError(f"tasks:{name}: {error}") from None


def make_item(name: str, options: TaskOptions, *, seed: int, index: int, split: str) -> TaskItem:
    """Item `index` (from 0, without end) of a split of family `name`; a pure function of its arguments.

    Raises UserError for an unknown family or split.
    """
    _check_family(name)
    if split not in SPLITS:
        raise UserError(f"tasks:{name}: split={split}: give {' or '.join(SPLITS)}")
    scene_rng, noise_rng = item_streams(name, seed, index, split)
    sketch = _SKETCHES[name](options, scene_rng, split)
    response, spans = write_response(sketch.reasoning, sketch.answer)
    return TaskItem(
        id=f"{name}-{split}-s{seed}-{index}{options.changed()}",
        prompt=sketch.prompt,
        image=add_noise(sketch.picture, options.noise, noise_rng),
        answer=sketch.answer,
        response=response,
        perception_spans=spans,
    )


def _check_family(name: str) -> None:
    if name not in TASK_NAMES:
        raise UserError(f"unknown task family {name!r}: the families are {', '.join(TASK_NAMES)}")
