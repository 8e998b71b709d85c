"""`cppo methods`, its table, and the document with both."""

import importlib
import json
from pathlib import Path

import pytest

from cppo.cli import main as cli
from cppo.comparison.study import load_study, study_names
from cppo.methods import GROUPS, METHODS, STATUSES, Method, get_method, group_of, grouped_methods
from cppo.methods.own import OURS
from cppo.reports.method_table import COLUMNS, extra_passes, method_row

ROOT = Path(__file__).parents[2]


def printed(capsys, *words):
    assert cli.main(["methods", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "group"),
    [
        ("grpo", "baselines"),
        ("dapo", "baselines"),
        ("cppo", "losses"),
        ("sent", "losses"),
        ("vppo", "advantages"),
        ("pepo", "advantages"),
        ("grpo+views", "rollouts"),
        ("noisyrollout", "rollouts"),
        ("saei", "rollouts"),
        ("vision-sr1", "rewards"),
        ("cppo-kl", "ablations"),
        ("cppo-likelihood", "ours"),
    ],
)
def test_groups(method, group):
    assert group_of(get_method(method)) == group


def test_the_list_has_every_method_once(capsys):
    lines = printed(capsys).splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(named) == sorted(METHODS)
    assert [line for line in lines if line and not line.startswith("  ")] == list(GROUPS.values())
    told = json.loads(printed(capsys, "--format", "json"))
    assert [entry["method"] for entry in told] == named
    assert [entry["what"] for entry in told] == [METHODS[name].summary for name in named]


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("grpo", ("", "", "")),
        ("cppo", ("I- and I+, of gated-in rollouts", "", "")),
        ("cppo-no-gate", ("I- and I+", "", "")),
        ("cppo-negative-only", ("I-, of gated-in rollouts", "", "")),
        ("cppo-detached-views", ("", "I- and I+, of gated-in rollouts", "")),
        ("papo", ("", "I-", "")),  # its code scores the masked image once
        ("cfpo", ("", "I-", "")),
        ("dvrp", ("I- and I+", "", "")),
        ("sent", ("", "", "")),
        ("vppo", ("", "I, I-", "")),
        ("pepo", ("", "I", "")),  # no second pass, but one before the updates
        ("prpo", ("", "I, I-, I+", "")),
        ("noisyrollout", ("", "", "")),
        ("saei", ("I of the clean rollouts, to its pixels", "", "")),
        ("mssr", ("", "I", "1 answer to each row before the first step")),
        ("vision-sr1", ("", "", "text-only answers")),
        ("vision-sr1-two-advantages", ("text-only answers", "", "text-only answers")),
        ("visionary-r1", ("", "I, of the reference", "text-only answers")),
        ("perception-r1", ("", "", "")),
    ],
)
def test_extra_passes(method, passes):
    assert tuple(extra_passes(get_method(method)).values()) == passes


def test_a_token_mean_detects_first():
    method = Method("one", {**METHODS["cppo"].options, "perception_normalization": "token"}, "")
    assert extra_passes(method)["without"] == "I and I-, of gated-in rollouts"


def test_steps_on_pixels_and_answers_before_the_first_step_are_counted():
    method = Method("one", {**METHODS["saei"].options, "view_ascent_steps": 3}, "")
    assert extra_passes(method)["with gradient"] == "I of the clean rollouts 3 times, to its pixels"
    method = Method("two", {**METHODS["mssr"].options, "baseline_init_samples": 2}, "")
    assert extra_passes(method)["generation of"] == "2 answers to each row before the first step"
    method = Method("none", {**METHODS["mssr"].options, "baseline_init_samples": 0}, "")
    assert extra_passes(method)["generation of"] == ""


def test_rows():
    row = method_row(get_method("vepo"))
    assert list(row) == list(COLUMNS)
    assert (row["paper"], row["status"]) == ("2606.03937", "as published")
    assert (row["views"], row["score"], row["selector"], row["sink"], row["reward"], row["extra models"]) == (
        "I- pixel_noise",
        "anchored_entropy",
        "top",
        "mask_advantage",
        "-",
        "-",
    )
    assert method_row(get_method("noisyrollout"))["views"] == "rollouts diffusion_noise"
    assert method_row(get_method("papo"))["score"] == "-"  # all tokens: no score is taken
    assert method_row(get_method("perception-r1"))["extra models"] == "judge (option)"
    assert method_row(get_method("visionary-r1"))["extra models"] == "reference"


def test_every_method_has_a_source_and_a_status():
    """The first sentence of a published method names its paper, once; other facts about a source have one form."""
    for method in METHODS.values():
        assert method.status in STATUSES
        own = method.name in OURS or group_of(method) == "ablations" or method.name == "grpo+views"
        assert (method.status == "ours") == own, method.name
        assert method.summary.count("arXiv") == (0 if own else 1), method.name
        assert ("after arXiv" in method.summary) == (method.status == "constants ours"), method.name
        assert method.paper or method.name == "grpo+views"


def test_the_table_in_its_forms(capsys):
    rows = json.loads(printed(capsys, "--table", "--format", "json"))
    order = [method.name for methods in grouped_methods().values() for method in methods]
    assert [row["method"] for row in rows] == order
    markdown = printed(capsys, "--table", "--format", "markdown").splitlines()
    assert markdown[0] == "| " + " | ".join(COLUMNS) + " |"
    assert all(line.count("|") == len(COLUMNS) + 1 for line in markdown)
    text = printed(capsys, "--table")
    assert max(map(len, text.splitlines())) <= 100
    starts = [line.split()[0] for line in text.splitlines() if not line.startswith(" ")]
    assert starts == order


def test_forms_are_for_all_methods(capsys):
    assert cli.main(["methods", "papo", "--table"]) == 2
    assert "leave NAME out" in capsys.readouterr().err


def test_the_pages_have_the_tables(monkeypatch, capsys):
    """Else run `python benchmarks/method_docs.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    writer = importlib.import_module("method_docs")
    text = "".join(page.read_text(encoding="utf-8") for page in writer.PAGES)
    assert "".join(map(writer.rewritten, writer.PAGES)) == text
    assert printed(capsys, "--format", "markdown") in text
    assert printed(capsys, "--table", "--format", "markdown") in text


def test_the_smoke_study_has_every_method_that_no_evidence_study_has():
    variants = {"dapo", "cppo-async", "papo-3b", "papo-dapo", "grpo+views"}
    evidence = {v.method for name in study_names() if name.startswith("evidence") for v in load_study(name).variants}
    papers = {name for name, method in METHODS.items() if group_of(method) not in ("ablations", "ours")}
    study = load_study("methods-micro")
    assert {variant.label for variant in study.variants} >= papers - variants - evidence
    for variant in study.variants:
        assert variant.label == variant.method
        recipe = study.cell_recipe("digits", variant, 0)
        kinds = [reward.partition("?")[0] for reward in METHODS[variant.method].rewards]
        assert [reward.partition("?")[0] for reward in recipe.rewards] == (kinds or ["accuracy", "format"])
        weights = list(METHODS[variant.method].rewards.values())
        assert recipe.config.get("reward_weights", recipe.reward_weights) == (weights or [0.9, 0.1])
