"""`cppo inspect` through the command line, and its page in a real browser."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
from browser import evaluate_in_page, needs_browser
from PIL import Image

from cppo.assets import resolve_model
from cppo.cli.main import main
from cppo.cli.trained import answering_model, recipe_views, trained_recipe
from cppo.data import Record
from cppo.evaluation.inspection import (
    VIEWS,
    InspectedItem,
    InspectedResponse,
    InspectedToken,
    InspectOptions,
    inspect_record,
)
from cppo.perception import DEPENDENCY_SCORES, DIVERGENCES
from cppo.reports.inspection import json_item, render_inspection

ATTACK = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)>"


def token(text, score, *, selected=False, truth=None):
    return InspectedToken(
        text,
        dict.fromkeys(VIEWS, -0.5),
        dict.fromkeys(VIEWS, 0.25),
        dict.fromkeys(DIVERGENCES, 0.125),
        dict.fromkeys(DIVERGENCES, 2.0),
        {name: score * (place + 1) for place, name in enumerate(DEPENDENCY_SCORES)},
        dict.fromkeys(DEPENDENCY_SCORES, selected),
        {view: [(text, 0.75), ("other", 0.25)] for view in VIEWS},
        truth,
    )


def inspected(name, *, correct, advantage):
    tokens = (
        token("see", 0.0, truth=False),
        token(ATTACK, 1.0, selected=True, truth=True),
        token("3", 0.4, truth=True),
    )
    picture = (Image.new("RGB", (64, 64), "red"),)
    record = Record(name, f"question {name} {ATTACK}", picture, "3")
    return InspectedItem(
        record, picture, picture, (InspectedResponse("text", correct, True, advantage, advantage > 0, tokens),)
    )


ITEMS = [inspected("a", correct=True, advantage=0.5), inspected("b", correct=False, advantage=-0.5)]

PROBE = """
(async () => {
  const click = (name) => document.querySelector(`[data-shown=${name}]`).click();
  const shown = () => document.querySelectorAll("article:not([hidden])").length;
  const painted = () => [...document.querySelectorAll("article .token")].filter(
    (one) => Number(one.style.getPropertyValue("--a")) > 0).length;
  while (document.querySelectorAll("article .token").length < 6) await new Promise((done) => setTimeout(done, 20));
  const found = {title: document.title, cards: shown(), painted: painted(), images: document.images.length};
  found.selected = document.querySelectorAll("article .token.selected").length;
  found.true = document.querySelectorAll("article .token.true").length;
  const slider = document.getElementById("threshold");
  slider.value = 0.6;
  slider.dispatchEvent(new Event("input"));
  found.above = painted();
  click("wrong"); found.wrong = shown();
  click("gated"); found.gated = shown();
  click("all");
  document.querySelector("article .token").dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
  found.tip = document.getElementById("tip").textContent;
  found.wide = document.documentElement.scrollWidth > window.innerWidth;
  return found;
})()
"""


@needs_browser
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(width, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(render_inspection(ITEMS, model="micro", data="mine", score="kl"), encoding="utf-8")
    found = evaluate_in_page(file, PROBE, width=width, profile=tmp_path / "profile")
    assert found["title"] == "micro on mine"
    assert (found["cards"], found["selected"], found["true"], found["images"]) == (2, 2, 4, 6)
    assert (found["painted"], found["above"]) == (4, 2)
    assert (found["wrong"], found["gated"]) == (1, 1)
    assert "log-prob" in found["tip"]
    assert not found["wide"]


def test_texts_cannot_end_the_data():
    page = render_inspection(ITEMS, model=ATTACK, data="mine", score="kl")
    assert page.count("</script>") == 2
    assert "<img src=x" not in page
    content = re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)[1]
    assert ATTACK in json.loads(content)["texts"]
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)


def test_json_of_an_item():
    first = json_item(ITEMS[0], "js")
    assert [entry["text"] for entry in first["tokens"]] == ["see", ATTACK, "3"]
    entry = first["tokens"][1]
    assert entry["score"] == pytest.approx(4.0)
    assert (entry["selected"], entry["true_perception"]) == (True, True)
    assert (entry["logp"], entry["entropy"], entry["entropy_preserving"], entry["entropy_removing"]) == (
        -0.5,
        0.25,
        0.25,
        0.25,
    )
    assert first["gated"] is True
    assert first["responses"] == []


def test_the_command(tmp_path, capsys):
    page, figures = tmp_path / "report.html", tmp_path / "tokens.json"
    command = ["inspect", "--model", "micro", "--data", "tasks:chart", "--limit", "2", "--samples", "2"]
    assert main([*command, "--out", str(page), "--json", str(figures)]) == 0
    items = json.loads(figures.read_text())
    assert len(items) == 2
    assert [len(item["responses"]) for item in items] == [1, 1]
    needed = {
        "text",
        "logp",
        "entropy",
        "entropy_preserving",
        "entropy_removing",
        "score",
        "selected",
        "true_perception",
    }
    assert needed <= items[0]["tokens"][0].keys()
    out = capsys.readouterr().out
    assert "detectors  how well each score finds" in out
    assert "AUPRC" in out
    assert "responses  2 an item, sampled at temperature 1, as in training; `--samples 1` is greedy, as in" in out
    assert "not judged" not in out
    assert page.stat().st_size < 200_000


def test_without_marked_spans_the_command_says_why_there_is_no_table(tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Which colour?", "images": ["a.png"], "answer": "red"}) + "\n")
    asked = ["--model", "micro", "--data", str(rows), "--samples", "1", "--max_new_tokens", "4"]
    page = tmp_path / "x.html"
    assert main(["inspect", *asked, "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "responses  1 an item, greedy, as in `cppo eval`\ndetectors  not judged: " in out
    assert "perception_spans" in out
    assert "The detectors are not judged" in page.read_text()


def test_a_run_directory_is_looked_at_with_its_own_recipe(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(resolve_model("micro"), run)
    (run / "config.yaml").write_text(
        "model: micro\ndata: tasks:digits\noutput_dir: gone\nperception_score: kl\nremoving_views: [crop]\n"
        "max_completion_length: 5\nperception_selector: top\nperception_top_fraction: 0.7\n"
        "perception_top_rounding: ceil\nperception_gate: none\n"
        "temperature: 0.5\nrewards: ['accuracy?tolerance=0.1']\n"
    )
    looked = []

    def inspect(model, processor, record, sampler, options):
        looked.append(options)
        return inspect_record(model, processor, record, sampler, options)

    monkeypatch.setattr("cppo.evaluation.inspection.inspect_record", inspect)
    asked = ["--model", str(run), "--data", "tasks:digits", "--limit", "1"]
    figures = tmp_path / "tokens.json"
    assert main(["inspect", *asked, "--out", str(tmp_path / "x.html"), "--samples", "1", "--json", str(figures)]) == 0
    (item,) = json.loads(figures.read_text())
    tokens = item["tokens"]
    assert len(tokens) == 5
    assert sum(token["selected"] for token in tokens) == 4
    # The advantage of a single response is 0: only the gate "none" lets it in.
    assert item["gated"]
    expected = {"temperature": 0.5, "max_new_tokens": 5, "tolerance": 0.1, "gate": "none"}
    expected |= {"score": "kl", "selector": "top", "top_fraction": 0.7, "top_rounding": "ceil"}
    assert looked == [InspectOptions(1, **expected)]
    assert all(token["score"] == token["scores"]["kl"] for token in tokens)
    capsys.readouterr()
    assert main(["views", *asked, "--out", str(tmp_path / "views.html"), "--draws", "1"]) == 0
    out = capsys.readouterr().out
    assert "crop" in out
    assert "noise_rectangles" not in out


def shown_views(model):
    return recipe_views(argparse.Namespace(model=str(model), config=None, seed=0))


def test_a_checkpoint_has_the_options_of_its_run(tmp_path, capsys):
    """A trainer in a script writes no `data` into its config.yaml."""
    model = tmp_path / "run/checkpoint-20"
    model.mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(
        "model: micro\nperception_score: kl\nremoving_views: [crop]\nmax_completion_length: 5\n"
    )
    for folder in (model, model.parent):
        _, options, sampler = shown_views(folder)
        assert (options["perception_score"], sampler.removing_families) == ("kl", ("crop",))
        assert trained_recipe(str(folder))["max_completion_length"] == 5
    assert capsys.readouterr().err == ""


def test_a_folder_without_a_recipe_gets_the_published_options_and_a_line(tmp_path, capsys, monkeypatch):
    """The line comes after the checks, so that a mistake stays one line."""
    monkeypatch.setattr("cppo.evaluation.load_model", lambda *_, **__: (None, None))
    monkeypatch.setattr("cppo.evaluation.check_marks", lambda *_, **__: None)
    _, options, _ = shown_views(tmp_path)
    assert options["perception_score"] == "entropy_shift"
    settings = {"system_prompt": None, "prompt_suffix": None}
    for model, config, lines in ((str(tmp_path), None, 1), (str(tmp_path), "micro", 0), ("micro", None, 0)):
        answering_model(argparse.Namespace(model=model, config=config, device=None, dtype=None), settings, None)
        shown = capsys.readouterr().err
        assert shown.count("score and views: published; the model's own are not known") == lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "micro", "--data", "tasks:digits", "--out", "x.pdf"], "write a .html file"),
        (["--model", "gone/at/all", "--data", "tasks:digits", "--out", "x.html"], "there is no folder"),
        (["--model", "micro", "--data", "gone.jsonl", "--out", "x.html"], "gone.jsonl"),
        (["--model", "micro", "--data", "tasks:digits", "--out", "no/x.html"], "--out: cannot write no/x.html"),
        (["--model", "micro", "--data", "tasks:digits", "--out", "x.html", "--samples", "0"], "[1, inf)"),
        (["--model", "micro", "--data", "tasks:digits", "--out", "x.html", "--json", "./x.html"], "both name x.html"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert message in refused("inspect", *words)
    assert not list(tmp_path.iterdir())


def test_a_score_of_ones_own_stands_beside_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "from cppo.perception import needs\n\n@needs('hidden_states', 'kl')\ndef moved(anchor, removing):\n"
        "    return removing.exact['kl'] + 0 * (anchor.hidden_states - removing.hidden_states).norm(dim=-1)\n"
    )
    Path("mine.yaml").write_text("model: micro\ndata: tasks:digits\nperception_score: own.py:moved\n")
    asked = ["--model", "micro", "--data", "tasks:digits", "--limit", "1", "--samples", "1", "--max_new_tokens", "6"]
    assert main(["inspect", *asked, "--config", "mine.yaml", "--out", "x.html", "--json", "x.json"]) == 0
    (item,) = json.loads(Path("x.json").read_text())
    for token in item["tokens"]:
        assert token["score"] == token["scores"]["own.py:moved"] == pytest.approx(token["scores"]["kl"])
    assert "own.py:moved" in Path("x.html").read_text()
    assert "own.py:moved" in capsys.readouterr().out
    Path("own.py").unlink()
    assert main(["inspect", *asked, "--config", "mine.yaml", "--out", "x.html"]) == 2
    told = "there is no file own.py; run from the folder where it lies, such as the training folder"
    assert capsys.readouterr().err == f"cppo: error: perception_score 'own.py:moved': {told}\n"


@pytest.mark.parametrize(
    ("score", "selector"), [("image_focus", "two_sets"), ("robust_dependency", "band"), ("sampled_entropy", "bottom")]
)
def test_scores_and_selectors_of_other_methods(score, selector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = f"model: micro\ndata: tasks:digits\nperception_score: {score}\nperception_selector: {selector}\n"
    Path("mine.yaml").write_text(recipe + "perception_sink: mask_advantage\nperception_gate: none\n")
    asked = ["--model", "micro", "--data", "tasks:digits", "--limit", "1", "--samples", "1", "--max_new_tokens", "6"]
    assert main(["inspect", *asked, "--config", "mine.yaml", "--out", "x.html", "--json", "x.json"]) == 0
    (item,) = json.loads(Path("x.json").read_text())
    assert {score} == set(item["tokens"][0]["scores"]) - set(DEPENDENCY_SCORES)
    assert 0 < sum(token["selected"] for token in item["tokens"]) < len(item["tokens"])
