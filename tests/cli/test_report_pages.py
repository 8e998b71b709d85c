"""`cppo report` through the command line, and the reports' pages in a real browser."""

import json
import math

import pytest
import yaml
from browser import GOOD, LOOK, evaluate_in_page, needs_browser
from PIL import Image

from cppo.cli.main import main
from cppo.reports import read_run, render_report
from cppo.views import image_data_uri

ATTACK = "</title><script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"
PIXEL = image_data_uri(Image.new("RGB", (4, 4), "red"))
METRICS = {
    "rewards/accuracy_reward/mean": 0.5,
    "rewards/format_reward/mean": 1.0,
    "perception/cpl": 0.6,
    "perception/d_preserving": 0.1,
    "perception/d_removing": 0.9,
    "perception/entropy": 0.05,
    "perception/entropy_preserving": 0.06,
    "perception/entropy_removing": 0.3,
    "perception/selected_fraction": 0.3,
    "perception/gated_fraction": 0.4,
    "entropy": 0.04,
    "completions/mean_length": 18,
    "completions/clipped_ratio": 0.5,
    "frac_reward_zero_std": 0.3,
    "grad_norm": 0.4,
    "loss": 0.01,
    "step_time": 2.5,
    "memory/peak_rss_mib": 1600,
    **{f"time/{phase}": 1.0 for phase in ("rollout", "reward", "views", "scoring", "update")},
}

PROBE = """
(async () => {
  const found = {title: document.title, ...LOOK};
  found.charts = document.querySelectorAll("svg.chart").length;
  found.untitled = [...document.querySelectorAll("figure svg.chart")].filter(
    (one) => [...one.querySelectorAll("text.axis")].some((text) => !text.textContent)).length;
  found.cut = [...document.querySelectorAll("svg.chart text")].filter((text) => {
    const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
  }).map((text) => text.textContent);
  found.small = [...document.querySelectorAll("svg.chart text")].filter(
    (text) => text.getBoundingClientRect().height < 9).length;
  found.refresh = document.querySelectorAll("meta[http-equiv=refresh]").length;
  const lines = ["s0", "s1"].map((style) => document.querySelector(`polyline.line.${style}`));
  found.dashes = lines.map((one) => getComputedStyle(one).strokeDasharray);
  const details = document.querySelector("details");
  if (details) { details.querySelector("summary").click(); found.open = details.open; }
  found.text = document.body.innerText;
  return found;
})()
"""


def write_run(folder, *, steps=40, finished=True, **config):
    """A run directory with everything in it, texts of an attacker among them."""
    folder.mkdir()
    options = {"model": "micro", "method": "cppo", "data": "tasks:digits", "system_prompt": ATTACK, **config}
    (folder / "config.yaml").write_text("# Resolved recipe of a cppo run\n" + yaml.safe_dump(options))
    rows = [
        {"step": step, "reward": 0.5 + 0.3 * math.sin(step / 9), **METRICS, "perception/cpl": 0.6 + 1 / step}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = ["I see", " 7", ATTACK]
    sample = {"prompt": ATTACK, "images": [PIXEL], "answer": ATTACK, "reward": 1.0, "completion_tokens": tokens}
    sample |= {"perception": [False, True, True], "score": [0.0, 0.5, 0.25]}
    samples = [{"step": step, **sample} for step in range(1, 11)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    item = {"id": "a", "prompt": ATTACK, "images": [PIXEL], "answer": "7", "correct": True, "tokens": tokens}
    item |= {"score": [0.0, 0.5, 0.25], "selected": [False, True, True], "true_perception": [False, True, None]}
    probes = [
        {"step": step, "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "n": 64, "items": [item]}
        for step in range(0, steps + 1, 4)
    ]
    (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probes))
    progress = {"step": steps, "last_step": 2 * steps, "from_step": 0, "seconds": 120.0, "versions": {"torch": "2"}}
    (folder / "progress.json").write_text(json.dumps(progress))
    if finished:
        figures = {"accuracy": 0.5, "accuracy_ci95": [0.47, 0.53], "format_rate": 1.0, "n": 1000, "samples": 1}
        ends = {"before": figures, "after": figures, "blank": figures, "gain": {"mean": 0.1, "low": 0.0, "high": 0.2}}
        summary = {"steps": steps, "seconds": 130.0, "versions": {"torch": "2"}, **ends}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def pages(folder):
    """A finished run, a running one, and six side by side, as files."""
    running = write_run(folder / "running", finished=False)
    (folder / "running.html").write_text(render_report(read_run(running), refresh=10))
    runs = [running, *(write_run(folder / f"a run with a long name {n}", beta=n / 10) for n in range(5))]
    for name, chosen in (("finished", runs[1:2]), ("side by side", runs)):
        assert main(["report", *map(str, chosen), "--out", str(folder / f"{name}.html")]) == 0
    return {name: folder / f"{name}.html" for name in ("finished", "running", "side by side")}


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_pages_in_a_browser(width, tmp_path):
    for name, page in pages(tmp_path).items():
        found = evaluate_in_page(page, PROBE.replace("LOOK", LOOK), width=width, profile=tmp_path / "profile")
        text = found.pop("text")
        dashes = found.pop("dashes")
        assert "CPPO run" in found.pop("title")
        assert found.pop("charts") == {"finished": 15, "running": 14, "side by side": 24}[name]
        assert found.pop("refresh") == (name == "running")
        assert found.pop("open", True)
        assert found == {**GOOD, "untitled": 0, "cut": [], "small": 0}, name
        assert dashes[0] == "none"
        assert dashes[1] != "none"
        assert "<script>document.title" in text or name == "side by side"
        assert "50% of the responses in the latest" in text


def test_one_run_is_its_report_and_several_are_side_by_side(tmp_path, capsys):
    found = pages(tmp_path)
    assert "The same items over training" in found["finished"].read_text()
    assert "6 runs side by side" in found["side by side"].read_text()
    assert capsys.readouterr().out.splitlines()[-1] == f"report     {found['side by side']}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone", "--out", "x.html"], "gone is not a run directory"),
        (["study", "--out", "x.html"], "study: `cppo compare --config STUDY --report_only` writes its report; for one"),
        (["study", "--out", "x.html"], "such as study/cells/digits/grpo/seed-0"),
        (["run", "--out", "x.pdf"], "write a .html file"),
        (["run", "--out", "no/x.html"], "--out: cannot write no/x.html"),
        (["--out", "x.html"], "RUN"),
        (["run"] * 7 + ["--out", "x.html"], "7 runs: one page shows at most 6"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "study" / "cells" / "digits" / "grpo").mkdir(parents=True)
    write_run(tmp_path / "study" / "cells" / "digits" / "grpo" / "seed-0")
    assert message in refused("report", *words)
    assert not list(tmp_path.glob("*.html"))
