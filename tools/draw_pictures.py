"""Draw the figures of docs/pictures from what the embedded micro VLM answers.

    python tools/draw_pictures.py

Writes tokens.svg, views.svg, entropy.svg, gate.svg and contrast.svg. They are readable in light and in dark.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import torch
from PIL import Image

from cppo.data import load_records, question_text
from cppo.evaluation import load_model
from cppo.evaluation.inspection import InspectedItem, InspectedResponse, InspectedToken, InspectOptions, inspect_record
from cppo.perception import contrastive_perception_tokens
from cppo.rewards import extract_answer
from cppo.views import ViewSampler, image_data_uri

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
DATA = "tasks:chart?noise=40"
CLEAR, UNSURE = 0, 3
"""Places of a record that the model answers right, and of one that it answers right now and then."""
OPTIONS = InspectOptions(samples=8, max_new_tokens=80)
DRAWS = 4
"""Draws of the views that a figure shows; the others show the first."""
TAU = 0.1
"""Temperature of the contrast, nats; the default of `perception_temperature`."""
WIDTH = 800
MONO = 'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"'
STYLE = """<style>
text { font: 16px system-ui, sans-serif; fill: #1b2430; } .small { font-size: 14px; fill: #56616f; }
.card { fill: #ffffff; } .lit { fill: #fbbf24; } .on { fill: #1b2430; } .line { stroke: #8894a3; stroke-width: 1.5; }
.image { fill: #8894a3; } .removing { fill: #2f6fd0; } .preserving { fill: #2e9e5b; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #a9b4c0; } .card { fill: #161b22; } .on { fill: #1b2430; }
  .removing { fill: #6ea8ff; } .preserving { fill: #56c783; }
}
</style>"""


def card(height: float, title: str, parts: Sequence[str]) -> str:
    """A figure `WIDTH` wide on a background of its own."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">\n'
        f'<title>{escape(title)}</title>\n{STYLE}\n<rect class="card" width="100%" height="100%" rx="10"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, content: str, kind: str = "", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" {more}>{escape(content)}</text>'


def bar(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2"/>'


def picture(image: Image.Image, x: float, y: float, side: float) -> str:
    """A small image with its pixels visible."""
    place = f'x="{x:.0f}" y="{y:.0f}" width="{side:.0f}" height="{side:.0f}"'
    return f'<image {place} style="image-rendering: pixelated" href="{image_data_uri(image)}"/>'


def chip(x: float, y: float, token: InspectedToken, size: float = 20) -> tuple[str, float]:
    """A token, lit if it is selected and underlined if it is read off the image; and its width."""
    shown, step = token.text.strip(), 0.602 * size
    width = step * len(shown)
    lit = token.selected[OPTIONS.score]
    parts = [bar(x - 3, y - size, width + 6, 1.4 * size, "lit")] if lit else []
    if token.true_perception:
        parts.append(bar(x, y + 0.5 * size, width, 2.5, "removing"))
    style = f'{MONO} style="font-size: {size}px; font-family: inherit" textLength="{width:.1f}"'
    parts.append(f"<g {MONO}>{text(x, y, shown, 'on' if lit else '', style)}</g>")
    return "".join(parts), width


def words(response: InspectedResponse) -> list[InspectedToken]:
    """The tokens of a response that a reader sees."""
    return [token for token in response.tokens if not token.text.startswith("<|")]


def tokens_figure(item: InspectedItem) -> str:
    """One response with its perception tokens lit, beside its image."""
    parts = [picture(item.record.images[0], 24, 24, 176), text(224, 44, question_text(item.record.prompt))]
    x, y = 224.0, 92.0
    for token in words(item.responses[0]):
        space = 12.0 if token.text.startswith(" ") else 0.0
        drawn, width = chip(x + space, y, token)
        if x + space + width > WIDTH - 24:
            x, y, space = 224.0, y + 42, 0.0
            drawn, width = chip(x, y, token)
        parts.append(drawn)
        x += space + width
    parts += [bar(224, 182, 16, 16, "lit"), text(248, 195, "lit: selected by CPPO", "small")]
    parts += [bar(424, 194, 16, 2.5, "removing"), text(448, 195, "underlined: read off the image", "small")]
    return card(224, "A response of the micro VLM with its perception tokens lit", parts)


def first_reading(item: InspectedItem) -> InspectedToken:
    """The first token that is read off the image."""
    return next(token for token in item.responses[0].tokens if token.true_perception)


def views_figure(draws: Sequence[InspectedItem]) -> str:
    """The image and several draws of its two views, and how probable the first reading is under each."""
    first = draws[0]
    parts = [picture(first.record.images[0], 24, 62, 160), text(24, 40, "the image I")]
    parts.append(reading(24, 246, first_reading(first), "image"))
    for row, (view, name) in enumerate(
        (("preserving", "I+ is meant to keep the answer"), ("removing", "I- is meant to remove it"))
    ):
        y = 24 + 188 * row
        parts.append(text(220, y + 16, name))
        for place, item in enumerate(draws):
            x = 220 + 142 * place
            parts.append(picture((item.preserving if view == "preserving" else item.removing)[0], x, y + 28, 116))
            parts.append(reading(x, y + 166, first_reading(item), view))
    return card(404, "The image and four draws of each of its two views", parts)


def reading(x: float, y: float, token: InspectedToken, view: str) -> str:
    return text(x, y, f"P(“{token.text.strip()}”) = {100 * math.exp(token.logps[view]):.0f} %", "small")


def entropy_figure(item: InspectedItem) -> str:
    """Entropy of each token under the image and under I-; the selected tokens are lit."""
    shown = words(item.responses[0])
    floor, step = 220.0, (WIDTH - 90) / len(shown)
    most = max(max(token.entropies["image"], token.entropies["removing"]) for token in shown)
    scale = 170 / most
    parts = [f'<path class="line" d="M60 {floor}H{WIDTH - 24}M60 {floor}V40"/>']
    parts += [text(52, floor + 5, "0", "small", 'text-anchor="end"')]
    parts += [
        text(52, floor - 170 + 5, f"{most:.1f}", "small", 'text-anchor="end"'),
        text(24, 28, "entropy, nats", "small"),
    ]
    for place, token in enumerate(shown):
        x = 66 + step * place
        for number, view in enumerate(("image", "removing")):
            height = max(scale * token.entropies[view], 1)
            parts.append(bar(x + 12 * number, floor - height, 11, height, view))
        label, _ = chip(0, 0, token, 16)
        parts.append(f'<g transform="translate({x + 6:.1f} {floor + 22:.1f}) rotate(50)">{label}</g>')
    parts += [bar(440, 20, 14, 14, "image"), text(460, 32, "under the image", "small")]
    parts += [bar(620, 20, 14, 14, "removing"), text(640, 32, "under I-", "small")]
    return card(330, "The entropy of each token under the image and under I-", parts)


def gate_figure(item: InspectedItem) -> str:
    """The rollouts of one prompt: answer, advantage and whether the gate lets it pass."""
    parts = [picture(item.record.images[0], 24, 52, 176), text(24, 32, question_text(item.record.prompt))]
    parts.append(text(24, 254, f"expected: {item.record.answer}", "small"))
    parts += [
        text(250, 66, "answer", "small"),
        text(450, 66, "advantage", "small"),
        text(640, 66, "perception loss", "small"),
    ]
    most = max(abs(response.advantage or 0.0) for response in item.responses)
    for place, response in enumerate(item.responses):
        y, advantage = 96 + 27 * place, response.advantage or 0.0
        if response.gated_in:
            parts.append(bar(238, y - 18, WIDTH - 262, 25, "lit"))
        kind, width = "on" if response.gated_in else "", 60 * abs(advantage) / most
        parts.append(text(250, y, extract_answer(response.text) or "none", kind))
        parts.append(
            bar(480 if advantage > 0 else 480 - width, y - 12, width, 14, "preserving" if advantage > 0 else "image")
        )
        parts.append(text(560, y, f"{advantage:+.2f}", kind))
        parts.append(text(640, y, "takes part" if response.gated_in else "left out", kind))
    return card(310, "The rollouts of one prompt and the gate", parts)


def contrast_figure(item: InspectedItem) -> str:
    """Each selected token: its divergences from both views, and its loss."""
    shown = [token for token in words(item.responses[0]) if token.selected[OPTIONS.score]]
    most = max(max(token.d_preserving["k3"], token.d_removing["k3"]) for token in shown)
    parts = [
        text(24, 36, "token", "small"),
        bar(150, 24, 14, 14, "preserving"),
        text(170, 36, "d+: changed by I+", "small"),
        bar(330, 24, 14, 14, "removing"),
        text(350, 36, "d-: changed by I-", "small"),
        text(590, 36, "loss, nats", "small"),
    ]
    for place, token in enumerate(shown):
        y = 76 + 46 * place
        kept, removed = token.d_preserving["k3"], token.d_removing["k3"]
        parts.append(chip(27, y, token)[0])
        for number, (kind, value) in enumerate((("preserving", kept), ("removing", removed))):
            width = max(330 * value / most, 1)
            parts.append(bar(150, y - 17 + 15 * number, width, 12, kind))
            parts.append(text(156 + width, y - 6 + 15 * number, f"{value:.2f}", "small"))
        loss = contrastive_perception_tokens(torch.tensor([[kept]]), torch.tensor([[removed]]), temperature=TAU)
        parts.append(text(590, y, f"{loss.item():.2f}"))
    return card(62 + 46 * len(shown), "The contrastive loss of each selected token", parts)


def figures() -> Iterator[tuple[str, str]]:
    """Name and SVG of each figure."""
    model, processor = load_model("micro", device="cpu")
    records = load_records(DATA, split="test", limit=max(CLEAR, UNSURE) + 1)
    clear, *others = (
        inspect_record(model, processor, records[CLEAR], ViewSampler(seed=seed), OPTIONS) for seed in range(DRAWS)
    )
    unsure = inspect_record(model, processor, records[UNSURE], ViewSampler(seed=0), OPTIONS)
    yield "tokens.svg", tokens_figure(clear)
    yield "views.svg", views_figure([clear, *others])
    yield "entropy.svg", entropy_figure(clear)
    yield "gate.svg", gate_figure(unsure)
    yield "contrast.svg", contrast_figure(clear)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the figures."""
    parser = argparse.ArgumentParser(description="Draws the figures of docs/pictures with the embedded micro VLM.")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="where they go (default: %(default)s)")
    out = parser.parse_args(argv).out
    for name, drawn in figures():
        (out / name).write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
