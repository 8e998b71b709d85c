"""Pictures of views: a row's images under every family, with the model's answers; as a grid or as a page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

from cppo.data import Record, question_text
from cppo.reports.page import render_page
from cppo.rewards import extract_answer
from cppo.views import EVERY_PRESERVING, EVERY_REMOVING, View, ViewSampler, family_draws, image_data_uri

if TYPE_CHECKING:  # pictures alone need neither torch nor TRL, which evaluation imports
    from cppo.evaluation import ItemResult, PairedDifference

THUMBNAIL = 320
"""Longest side in pixels of a picture on the page."""
CELL = 200
"""Side in pixels of a picture in the grid; smaller ones are enlarged by whole factors."""
EDGE = "lightgrey"
"""Colour of the line around each picture of the grid, one pixel wide."""
MARGIN, LINE = 10, 16
LINE_CHARS = 30
"""Characters that fit below a picture of the grid."""
SHOWN_CHARS = 60
HALF = 0.5
"""The share of unchanged answers above which I- leaves too much, and below which I+ keeps too little."""
NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class ShownView:
    """A row's images under one draw of a family (None: unchanged), and the model's answer, if it was asked.

    `same` is whether it equals the answer to the unchanged images.
    """

    family: str | None
    parameters: str
    images: tuple[Image.Image, ...]
    answer: str | None = None
    correct: bool | None = None
    same: bool = True

    @property
    def kind(self) -> str:
        """The family's purpose."""
        if self.family is None:
            return "image"
        if self.family in EVERY_PRESERVING:
            return "I+"
        return "I\u2212" if self.family in EVERY_REMOVING else "own"

    @property
    def uris(self) -> list[str]:
        """The images as data URIs."""
        return [image_data_uri(image, THUMBNAIL) for image in self.images]


@dataclass(frozen=True)
class ShownItem:
    """A row, unchanged and under its views."""

    id: str
    question: str
    expected: str
    original: ShownView
    views: tuple[ShownView, ...]

    @property
    def families(self) -> dict[str, list[ShownView]]:
        """The draws of each family."""
        found: dict[str, list[ShownView]] = {}
        for view in self.views:
            found.setdefault(str(view.family), []).append(view)
        return found


@dataclass(frozen=True)
class FamilySummary:
    """A family over all items and draws: share of unchanged answers, accuracy and its paired change."""

    family: str
    kind: str
    unchanged: float
    accuracy: float | None
    change: "PairedDifference | None"


def perturbed_records(
    record: Record, sampler: ViewSampler, draws: int, families: Sequence[str] | None = None
) -> tuple[list[Record], list[tuple[View, ...]]]:
    """The record and copies of it, one under each view, in the order of the views (`family_draws`)."""
    views = list(family_draws(record.images, sampler, record.id, draws, families))
    return [record, *(replace(record, images=tuple(view.image for view in row)) for row in views)], views


def shown_item(
    record: Record, views: Sequence[tuple[View, ...]], answers: "Sequence[ItemResult] | None" = None
) -> ShownItem:
    """Small pictures and texts of a record, its views and the model's answers to `perturbed_records`."""

    def shown(family: str | None, parameters: str, images: Iterable[Image.Image], place: int) -> ShownView:
        view = ShownView(family, parameters, tuple(_shrunk(image, THUMBNAIL) for image in images))
        if not answers:
            return view
        text, correct = given_answer(answers[place].responses[0]), bool(answers[place].correct[0])
        same = place == 0 or unchanged(answers[place], answers[0])
        return replace(view, answer=text, correct=correct if record.answer else None, same=same)

    drawn = [
        shown(row[0].family, "; ".join(map(parameter_text, row)), (view.image for view in row), place)
        for place, row in enumerate(views, start=1)
    ]
    original = shown(None, "", record.images, 0)
    return ShownItem(record.id, question_text(record.prompt), record.answer, original, tuple(drawn))


def unchanged(item: "ItemResult", before: "ItemResult") -> bool:
    """Whether an answer stays the same: by `same_answers`, or word for word without a box."""
    if extract_answer(before.responses[0]) is None:
        return item.responses[0].split() == before.responses[0].split()
    from cppo.evaluation import same_answers

    return same_answers(item, before) == 1


def given_answer(response: str) -> str:
    r"""The boxed answer of a response, or its end without a box; at most 60 characters."""
    answer = extract_answer(response)
    if answer is None:
        text = " ".join(response.split())
        answer = "\u2026" + text[-SHOWN_CHARS:] if len(text) > SHOWN_CHARS else text
    return answer if len(answer) <= SHOWN_CHARS + 1 else answer[:SHOWN_CHARS] + "\u2026"


def parameter_text(view: View) -> str:
    """The drawn values, e.g. "brightness 0.42, contrast 1.1, saturation 0.3"."""
    # No line ends between a name and its value.
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}".replace(" ", NO_BREAK) for name, value in view.parameters.items()
    )


def summarize_families(items: Sequence[ShownItem], seed: int) -> list[FamilySummary]:
    """Each family over all items; empty without a model's answers. An item counts with the mean of its draws."""
    if not items or items[0].original.answer is None:
        return []
    from cppo.evaluation import paired_bootstrap

    summaries = []
    for family, first in items[0].families.items():
        rows = [(item.original, item.families[family]) for item in items]
        same = [sum(view.same for view in views) / len(views) for _, views in rows]
        known = all(before.correct is not None for before, _ in rows)
        after = [sum(bool(view.correct) for view in views) / len(views) for _, views in rows]
        change = paired_bootstrap([float(bool(before.correct)) for before, _ in rows], after, seed=seed)
        summaries.append(
            FamilySummary(
                family,
                first[0].kind,
                sum(same) / len(same),
                sum(after) / len(after) if known else None,
                change if known else None,
            )
        )
    return summaries


def clean_accuracy(items: Sequence[ShownItem]) -> float | None:
    """The accuracy on the unchanged images, a fraction; None without a model's answers or known right answers."""
    answered = [item.original.correct for item in items if item.original.correct is not None]
    return sum(answered) / len(answered) if answered else None


def view_remarks(summaries: Sequence[FamilySummary]) -> list[str]:
    """Families that miss their purpose, with a remedy: one line each for I- and I+."""
    kept = [row.family for row in summaries if row.kind == "I\u2212" and row.unchanged > HALF]
    lost = [row.family for row in summaries if row.kind == "I+" and row.unchanged < HALF]
    remarks = []
    if kept:
        remarks.append(
            f"{', '.join(kept)} (I-): most answers stay the same, so the answer is still visible, or is "
            "guessed without the image (`cppo eval --blank` tells). Remove more: raise its strength "
            "(view_noise_rectangles, view_noise_side, view_patch_probability; lower view_crop_side), or set "
            "other removing_views"
        )
    if lost:
        remarks.append(
            f"{', '.join(lost)} (I+): most answers change, so the view does not keep what the answer needs. Change "
            "less: narrow its strength (view_brightness, view_contrast, view_saturation, view_perspective_distortion, "
            "view_rotation_degrees), or set other preserving_views"
        )
    return remarks


def render_views(items: Sequence[ShownItem], *, title: str, strengths: str, seed: int) -> str:
    """One HTML page of all items and, if a model answered, how each family changes its answers."""
    summaries = summarize_families(items, seed)
    return render_page(
        "views.html.j2",
        title=title,
        strengths=strengths,
        items=items,
        summaries=summaries,
        remarks=view_remarks(summaries),
        accuracy=clean_accuracy(items),
    )


def draw_grid(item: ShownItem) -> Image.Image:
    """One picture: the row's images, then a line for each family with its draws, labelled."""
    font = ImageFont.load_default(size=12)
    lines = [(("image", ""), [item.original])]
    lines += [((views[0].kind, family), views) for family, views in item.families.items()]
    images = max(1, len(item.original.images))
    labels = {id(view): _label(view, LINE_CHARS * images) for view in (item.original, *item.views)}
    text_lines = max(map(len, labels.values()))
    height, width = CELL + text_lines * LINE + MARGIN, images * (CELL + 4) + MARGIN
    columns = max(len(views) for _, views in lines)
    left = 130
    grid = Image.new("RGB", (left + columns * width + MARGIN, len(lines) * height + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(grid)
    for row, ((kind, family), views) in enumerate(lines):
        y = MARGIN + row * height
        pen.text((MARGIN, y), f"{kind.replace(chr(0x2212), '-')}\n{family}", fill="black", font=font)
        for column, view in enumerate(views):
            x = left + column * width
            for place, image in enumerate(view.images):
                framed = ImageOps.expand(_enlarged(image), 1, EDGE)
                grid.paste(framed, (x + place * (CELL + 4) - 1, y - 1))
            for number, text in enumerate(labels[id(view)]):
                pen.text((x, y + CELL + 2 + number * LINE), text, fill="black", font=font)
    return grid


def _label(view: ShownView, chars: int) -> list[str]:
    """The lines below a picture of the grid: the drawn values, and the model's answer."""
    lines = [line.replace(NO_BREAK, " ") for line in wrap(view.parameters, chars)]
    if view.answer is not None:
        lines.append(f"answers {view.answer[: chars - 12]!r}")
        verdict = [] if view.correct is None else ["right" if view.correct else "wrong"]
        verdict += [] if view.same else ["changed"]
        lines += [", ".join(verdict)] if verdict else []
    return lines


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    small = image.copy()
    small.thumbnail((side, side))
    return small


def _enlarged(image: Image.Image) -> Image.Image:
    factor = CELL // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return _shrunk(image, CELL)
