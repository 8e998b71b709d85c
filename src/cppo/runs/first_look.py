"""Facts of data and a model for a first recipe. No weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cppo.data import PixelBounds, RecordSource, load_records, parse_spec, summarize
from cppo.data.spec import TaskSpec
from cppo.errors import UserError
from cppo.runs.model_shapes import ModelShapes

LOOKED_AT = 256
"""Number of rows with checked images and prompts, evenly spread over the data."""
METADATA = "metadata.jsonl"
"""The file that describes a folder of pictures; its rows name their picture in `file_name`."""

Columns = Mapping[str, str | None] | str | None


@dataclass(frozen=True)
class DataFacts:
    """Facts of the data.

    Attributes:
        specs: names of the sources.
        columns: names of their columns, if they differ from ours.
        rows: usable ones; `bad` ones are skipped.
        images: smallest and largest number of images of the checked rows.
        largest: width and height of their largest image, in pixels; None without images.
        generated: whether tasks of this package generate them.
        source: the checked rows.
    """

    specs: list[str]
    columns: Columns
    rows: int
    bad: int
    images: tuple[int, int]
    largest: tuple[int, int] | None
    generated: bool
    source: RecordSource


def look_at_data(specs: Sequence[str], columns: Columns = None, max_bad_fraction: float = 0.01) -> DataFacts:
    """Read the data and check some of their rows.

    A folder of pictures with a `metadata.jsonl` is read by that file.

    Raises:
        UserError: the data cannot be read; the message names file and row.
    """
    specs = [str(Path(spec) / METADATA) if (Path(spec) / METADATA).is_file() else spec for spec in specs]
    if columns is None and all(Path(spec).name == METADATA for spec in specs):
        columns = {"images": "file_name"}
    source = load_records(specs, columns=columns, max_bad_fraction=max_bad_fraction, with_facts=True)
    kept = source.keep(range(0, len(source), max(1, -(-len(source) // LOOKED_AT))))
    summary = summarize(kept)
    return DataFacts(
        specs,
        columns,
        rows=len(source),
        bad=len(source.skipped),
        images=(min(summary.images_a_row), max(summary.images_a_row)),
        largest=max(summary.sizes, key=lambda size: size[0] * size[1], default=None),
        generated=all(isinstance(parse_spec(spec), TaskSpec) for spec in specs),
        source=kept,
    )


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model.

    Attributes:
        name: as it was given.
        shapes: its sizes; None for a family that `cppo plan` does not count, with the reason in `uncounted`.
        form_built_in: whether its tokenizer has the form of the responses as tokens (`ChatForm`).
    """

    name: str
    shapes: ModelShapes | None
    uncounted: str = ""
    form_built_in: bool = False


def look_at_model(name: str) -> ModelFacts:
    """Read a model's configuration and tokenizer. Raises UserError if it is no vision-language model."""
    from cppo.runs.checks import check_model
    from cppo.runs.model_shapes import read_shapes

    check_model(name)
    form = _form_built_in(name)
    try:
        return ModelFacts(name, read_shapes(name), form_built_in=form)
    except UserError as error:
        return ModelFacts(name, None, str(error).removeprefix("model: "), form)


def _form_built_in(name: str) -> bool:
    """Whether the tokenizer has the form as tokens; False without a processor."""
    from cppo.evaluation import load_processor
    from cppo.rewards import ChatForm

    try:
        return ChatForm.of(load_processor(name)).built_in
    except UserError:
        return False


def longest_prompt(model: str, data: DataFacts, pixels: PixelBounds, prompt_suffix: str | None) -> int | None:
    """Tokens of the longest checked prompt, images included; None if the model has no processor."""
    from cppo.evaluation import load_processor, prompt_lengths

    source = data.source
    source.pixels, source.prompt_suffix = pixels, prompt_suffix
    try:
        processor = load_processor(model)
    except UserError:
        return None
    return max(prompt_lengths(processor, source))
