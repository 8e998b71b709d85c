"""The report: what it shows, that model text cannot break out of it, and the charts' geometry."""

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

import cppo
from cppo.errors import UserError
from cppo.reports import read_run, render_report, render_runs, write_report
from cppo.reports.charts import STYLES, Series, figure, interval_chart, line_chart, nice_ticks, running_mean, thin
from cppo.reports.side_by_side import differing_options, distinct_names, final_figures
from cppo.reports.tokens import probed_items

SOURCE = Path(cppo.__file__).parent
ATTACK = "<script>alert('x')</script><img src=http://evil.example onerror=alert(1)>"
PIXEL = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"# Resolved recipe of a cppo run\nmodel: micro\nmethod: cppo\ndata: tasks:digits\n"
        f"system_prompt: {json.dumps(ATTACK)}\nperception_weight: 0.01\nlist: [0.9, 0.1]\nflag: true\n"
    )
    metrics = [
        {"step": step, "reward": 0.5 + step / 100, "perception/cpl": 0.6, "perception/entropy": None}
        for step in range(1, 31)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"step": 31, "re')
    sample = {
        "step": 30,
        "prompt": ATTACK,
        "images": [PIXEL, "http://evil.example/x.png"],
        "answer": ATTACK,
        "reward": 0.9,
        "completion_tokens": ["see", " 3", ATTACK],
        "perception": [False, True, True],
        "score": [0.0, 0.25, 0.5],
    }
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return tmp_path


def summary(run):
    figures = {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "format_rate": 0.98, "n": 1000, "samples": 1}
    (run / "summary.json").write_text(
        json.dumps(
            {
                "steps": 30,
                "seconds": 90,
                "before": figures,
                "after": {**figures, "accuracy": 0.625},
                "blank": {**figures, "accuracy": 0.11},
                "gain": {"mean": 0.125, "low": 0.1, "high": 0.15},
                "versions": {"torch": "2.0"},
            }
        )
    )


def test_nothing_from_the_run_is_markup(run):
    html = render_report(read_run(run))
    assert "<script" not in html
    assert "<img src=http" not in html
    assert "http://evil.example/x.png" not in html
    assert html.count("&lt;script&gt;") == 4  # prompt, answer, token, system prompt
    assert f'src="{PIXEL}"' in html


def test_the_report_is_one_static_file(run):
    html = render_report(read_run(run))
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "default-src 'none'" in html


def test_perception_tokens_are_marked_by_their_score(run):
    html = render_report(read_run(run))
    marks = re.findall(r'<mark style="--a: ([\d.]+)" title="score ([\d.]+)">(.*?)</mark>', html, re.S)
    assert [(score, text) for _, score, text in marks][:1] == [("0.250", " 3")]
    assert [float(alpha) for alpha, _, _ in marks] == [pytest.approx(0.12 + 0.25), pytest.approx(0.12 + 0.5)]
    assert '<span title="score 0.000">see</span>' in html


def test_a_token_without_a_score_shows_none(run):
    sample = json.loads((run / "samples.jsonl").read_text())
    (run / "samples.jsonl").write_text(json.dumps(sample | {"perception": [True] * 3, "score": [None] * 3}) + "\n")
    html = render_report(read_run(run))
    assert len(re.findall(r'<mark style="--a: 0.12" *>', html)) == 3
    assert 'title="score' not in html


def test_accuracies_appear_only_when_they_were_measured(run):
    assert "Held-out accuracy" not in render_report(read_run(run))
    assert "not finished" in render_report(read_run(run))
    summary(run)
    html = render_report(read_run(run))
    for text in ("50.0 %", "62.5 %", "11.0 %", "+12.5", "+10.0 to +15.0", "98.0 %", "1,000 items", "1.5 minutes"):
        assert text in html
    assert "not finished" not in html


def test_charts_only_of_what_was_logged(run):
    html = render_report(read_run(run))
    assert "Perception loss (CPL)" in html
    assert "KL to the reference" not in html
    assert "Entropy under the three views" not in html  # logged as null


def test_the_configuration_is_shown(run):
    html = render_report(read_run(run))
    for name, value in (("perception_weight", "0.01"), ("list", "0.9, 0.1"), ("flag", "true")):
        assert f"<td>{name}</td><td>{value}</td>" in html


def test_a_line_that_was_cut_off_is_left_out(run):
    data = read_run(run)
    assert len(data.metrics) == 30
    assert data.series("reward")[-1] == (30.0, pytest.approx(0.8))


def test_write_report(run):
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_a_run_without_steps_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("model: micro\n")
    assert "Configuration" in render_report(read_run(tmp_path))


def test_not_a_run_directory(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path)


def test_only_the_report_of_a_run_that_goes_on_loads_itself_again(run):
    (run / "progress.json").write_text(
        json.dumps({"step": 30, "last_step": 120, "from_step": 0, "seconds": 60.0, "versions": {"trl": "1.2.3"}})
    )
    running = render_report(read_run(run), refresh=10)
    assert '<meta http-equiv="refresh" content="10">' in running
    assert "30 of 120 steps" in running
    assert "about 3.0 minutes of training left" in running  # 90 steps at 2 seconds
    assert "<td>trl</td><td>1.2.3</td>" in running
    stopped = render_report(read_run(run))
    assert "refresh" not in stopped
    assert "30 of 120 steps" in stopped
    assert "left" not in stopped.split("<h2>")[0].split("</header>")[0].split("<header>")[1]
    summary(run)
    assert "refresh" not in render_report(read_run(run), refresh=10)


def test_a_resumed_run_tells_its_time_left_from_the_steps_it_made(run):
    (run / "progress.json").write_text(json.dumps({"step": 30, "last_step": 40, "from_step": 20, "seconds": 60.0}))
    assert read_run(run).seconds_left == pytest.approx(60.0)
    assert "1.0 minutes since the resume after step 20" in render_report(read_run(run))


def test_warnings_are_shown(run):
    assert "Warnings" not in render_report(read_run(run))
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write("\n" + json.dumps({"step": 32, "loss": None}) + "\n")
    assert "Loss or gradient was not finite in 1 step(s), first in step 32" in render_report(read_run(run))


def probes(run, steps):
    item = {"id": "a", "prompt": ATTACK, "images": [], "answer": "3", "score": [0.1, 0.4], "selected": [False, True]}
    item |= {"true_perception": [None, True]}
    rows = [
        {
            "step": step,
            "accuracy": step / 100,
            "accuracy_ci95": [0.0, 1.0],
            "n": 64,
            "items": [{**item, "correct": step > 5, "tokens": [f"at {step}", ATTACK]}],
        }
        for step in steps
    ]
    rows[0]["items"][0]["images"] = [PIXEL, "http://evil.example/x.png"]
    (run / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_same_item_at_several_steps(run):
    probes(run, range(0, 31, 3))
    data = read_run(run)
    (item,) = probed_items(data, columns=4)
    assert [(step, correct) for step, correct, _ in item.responses] == [(0, False), (9, True), (21, True), (30, True)]
    assert item.images == [PIXEL]
    html = render_report(data)
    assert [int(step) for step in re.findall(r">at (\d+)<", html)] == [0, 9, 21, 30]
    assert html.count('<mark class="true"') == 4
    assert "Held-out accuracy" in html
    assert "the same 64 items each time" in html
    assert "<script" not in html
    assert "http://evil.example/x.png" not in html
    probes(run, [0])
    assert [step for step, _, _ in probed_items(read_run(run), columns=4)[0].responses] == [0]


def test_runs_side_by_side(run, tmp_path_factory):
    summary(run)
    probes(run, [0, 30])
    other = tmp_path_factory.mktemp("other") / run.name
    shutil.copytree(run, other)
    config = (other / "config.yaml").read_text().replace("perception_weight: 0.01", "beta: 0.5")
    (other / "config.yaml").write_text(config)
    (other / "summary.json").unlink()
    runs = [read_run(run), read_run(other)]
    assert distinct_names(runs) == [f"{run.name} (1)", f"{run.name} (2)"]
    assert differing_options(runs) == [("perception_weight", ["0.01", ""]), ("beta", ["", "0.5"])]
    figures = dict(final_figures(runs))
    assert figures["state"] == ["finished", "not finished"]
    assert figures["gain, points (paired)"] == ["+12.5 [+10.0, +15.0]", ""]
    assert figures["reward, last tenth"] == ["0.79", "0.79"]  # mean of steps 28, 29, 30
    assert "tokens selected, last tenth" not in figures
    html = render_runs(runs)
    assert html.count("</svg>") == 2 + 3 * 3  # the key, and held-out accuracy, reward and CPL with their legends
    assert "<script" not in html
    assert html.count(f"{run.name} (2)</span>") == 4


# Charts


def test_line_chart_maps_values_linearly():
    points = [(0.0, 0.0), (50.0, 0.5), (100.0, 1.0)]
    svg = ElementTree.fromstring(line_chart([Series("a", points)], title='<"&'))
    hits = [element for element in svg if element.get("class", "").startswith("hit")]
    xs, ys = [float(hit.get("cx")) for hit in hits], [float(hit.get("cy")) for hit in hits]
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2, abs=1e-3)
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=1e-3)
    assert xs[0] < xs[2]
    assert ys[0] > ys[2]  # up is smaller in SVG


@pytest.mark.parametrize("points", [[(1.0, 0.0)], [(1.0, 2.0), (2.0, 2.0)], [(1.0, -1e-9), (2.0, 1e9)]])
def test_line_chart_of_odd_data_is_well_formed(points):
    for element in ElementTree.fromstring(line_chart([Series("a", points)], percent=True)):
        assert "nan" not in " ".join(element.attrib.values())


def test_series_differ_without_their_colours():
    """In black and white dash and marker tell them apart."""
    svg = ElementTree.fromstring(line_chart([Series(str(n), [(1.0, n), (2.0, n)]) for n in range(STYLES)]))
    markers = {mark.get("d") for mark in svg if mark.get("class", "").startswith("mark")}
    assert len(markers) == STYLES
    style = (SOURCE / "reports" / "page.html.j2").read_text()
    dashes = re.findall(r"\.s(\d) { --c: var\(--s\1\); --d: ([^;]+); }", style)
    assert [int(number) for number, _ in dashes] == list(range(STYLES))
    assert len({dash for _, dash in dashes}) == STYLES


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out_from_the_page(scheme):
    """WCAG asks 3:1 of graphics: ratio of relative luminances."""
    style = (SOURCE / "reports" / "page.html.j2").read_text()
    rule = re.findall(r":root {(.*?)}", style, re.S)[0 if scheme == "light" else 1]
    colours = dict(re.findall(r"--(card|s\d): (#[0-9a-f]+)", rule))

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    card = luminance(colours.pop("card"))
    assert len(colours) == STYLES
    for name, colour in colours.items():
        light, dark = sorted([card, luminance(colour)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, name


def test_a_band_lies_around_its_line():
    points, band = [(0.0, 0.5), (10.0, 0.6)], [(0.0, 0.4, 0.7), (10.0, 0.5, 0.9)]
    svg = ElementTree.fromstring(line_chart([Series("a", points, band)], smooth=False))
    places = [tuple(map(float, place.split(","))) for place in svg.find("polygon").get("points").split()]
    line = [tuple(map(float, place.split(","))) for place in svg.find("polyline").get("points").split()]
    assert [x for x, _ in places] == [line[0][0], line[1][0], line[1][0], line[0][0]]
    heights = [y for _, y in places]  # high, high, low, low; up is smaller
    assert heights[0] < line[0][1] < heights[3]
    assert heights[1] < line[1][1] < heights[2]
    # 0.1 below the line and 0.2 above it, in pixels that are rounded to a tenth: each place is off by at most 0.05.
    below, above = heights[3] - line[0][1], line[0][1] - heights[0]
    assert abs(2 * below - above) <= 6 * 0.05 + 1e-9
    assert above > 20


def test_axes_have_titles_and_texts_are_escaped():
    drawn = figure("<t>", [Series("<a>", [(1.0, 2.0)]), Series("b", [(1.0, math.nan)])], y_title="<nats>", note="<n>")
    texts = [text.text for text in ElementTree.fromstring(str(drawn)).iter("text")]
    assert {"optimizer step", "<nats>"} <= set(texts)
    assert "<t>" not in drawn
    assert "&lt;a&gt;</span>" in drawn
    assert "nan" not in drawn


def test_interval_chart_is_well_formed():
    svg = ElementTree.fromstring(interval_chart([("<a>", 0.5, (0.4, 0.6)), ("b", 1.0, (1.0, 1.0))]))
    assert sum(element.get("class", "").startswith("bar") for element in svg) == 2
    assert len(svg.findall(".//g/path")) == 2


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 1.0),
        (0.43, 0.67),
        (-3.0, 1234.0),
        (1e-7, 2e-7),
        (5.0, 5.0),
        (0.0, 0.0),
        (3.6e-14, 3.6e-14),
        (0.0, 3.6e-14),
        (0.0, 1e-320),
    ],
)
def test_ticks_enclose_the_values_and_are_even(low, high):
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    steps = [after - before for before, after in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)


def test_steps_are_whole_numbers():
    assert nice_ticks(1.0, 3.0, 5, least_step=1.0) == [1.0, 2.0, 3.0]
    assert nice_ticks(0.0, 12.0, 5, least_step=1.0) == [0.0, 5.0, 10.0, 15.0]
    assert nice_ticks(0.0, 120.0, 5, least_step=1.0) == [0.0, 25.0, 50.0, 75.0, 100.0, 125.0]


def test_running_mean_by_brute_force():
    points = [(float(x), float(x * x % 17)) for x in range(60)]
    found = running_mean(points)
    for index in range(60):
        near = [y for x, y in points if abs(x - index) <= 3]  # 60 // 20
        assert found[index] == (float(index), pytest.approx(sum(near) / len(near)))


def test_thinning_keeps_the_ends():
    points = [(float(x), 0.0) for x in range(1000)]
    found = thin(points, 100)
    assert len(found) == 100
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert thin(points[:50], 100) == points[:50]


def test_the_legend_names_the_lines_that_are_there():
    text = figure("t", [Series("one", [(0, 1.0), (1, 2.0)]), Series("two", []), Series("three", [(0, 1.0), (1, 2.0)])])
    key = text[text.index('<div class="legend">') :]
    assert "two" not in key
    assert [style in key for style in ("s0", "s1", "s2")] == [True, False, True]


def test_every_reward_of_a_run_is_drawn(run):
    names = [f"own_{number}" for number in range(STYLES + 1)]
    with (run / "metrics.jsonl").open("a") as stream:
        for step in (31, 32):
            means = {f"rewards/{name}/mean": 0.5 for name in [*names, "accuracy_reward"]}
            stream.write("\n" + json.dumps({"step": step, **means, "rewards/own_0/std": 0.1}))
    page = render_report(read_run(run))
    assert page.count("<h3>Other rewards</h3>") == 2  # one chart has no more than `STYLES` lines
    for name in names:
        assert name in page
    assert page.index("<h3>Accuracy and format</h3>") < page.index("<h3>Other rewards</h3>")
    assert "Other rewards: own_0" in render_runs([read_run(run), read_run(run)])
