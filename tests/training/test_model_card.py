"""The model card: front matter that parses, a snippet that runs, hostile text as text."""

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown import markdown
from peft import LoraConfig
from PIL import Image
from rollout_stubs import build_trainer, make_rows

from cppo.assets import resolve_model
from cppo.training.model_card import RunFacts, model_card, portable

FACTS = RunFacts({"data": ["hub:org/name:train", "/home/ann/secret place/rows.jsonl"]}, 7, 2, 0, 1)


def blocks(card, language):
    return re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, flags=re.DOTALL | re.MULTILINE)


def run_snippet(folder, monkeypatch, capsys):
    """What the card's Python prints, run where the card lies."""
    ((_, code),) = blocks((folder / "README.md").read_text(), "python")
    Image.new("RGB", (64, 64), "red").save(folder / "image.png")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_saving_writes_a_card_whose_python_runs(make_trainer, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(make_rows([1, 1]))
    trainer.save_model(str(tmp_path / "my model"))
    card = ModelCard.load(tmp_path / "my model" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert (card.data.license, card.data.base_model, card.data.datasets) == (None, None, None)
    assert card.text.lstrip().startswith("# my model\n")
    assert "2 rows; the trainer was not told where they come from." in card.text
    assert "arXiv:2601.00501" in card.text
    ((_, recipe),) = blocks(card.text, "yaml")
    assert yaml.safe_load(recipe)["max_completion_length"] == trainer.args.max_completion_length
    assert run_snippet(tmp_path / "my model", monkeypatch, capsys).endswith("\n")


def test_an_adapter_of_micro(tmp_path, monkeypatch, capsys):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = build_trainer(resolve_model("micro"), tmp_path / "out", make_rows([1, 1]), peft_config=lora)
    trainer.save_model(str(tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license) == ("peft", "apache-2.0")
    assert "A LoRA adapter, trained on top of `micro`" in card.text
    assert run_snippet(tmp_path / "out", monkeypatch, capsys).endswith("\n")


def test_what_a_run_knows(make_trainer):
    trainer = make_trainer(make_rows([1, 1]))
    trainer.model.config.name_or_path = "Org/Model-3B"
    parsed = ModelCard(model_card(trainer, FACTS, "m", ["org/other"], ["mine"]))
    assert parsed.data.base_model == "Org/Model-3B"
    assert parsed.data.datasets == ["org/other", "org/name"]
    assert "mine" in parsed.data.tags
    assert "7 rows to train on; 2 that could not be used were skipped, 1 left out as too long" in parsed.text
    assert "/home/ann" not in parsed.content


@pytest.mark.parametrize(
    ("method", "named", "absent"),
    [
        ("grpo", ["arXiv:2402.03300"], "2601.00501"),
        ("papo", ["arxiv.org/abs/2507.06448", "arXiv:2402.03300"], "2601.00501"),
        ("cppo-no-gate", ["arXiv:2601.00501", "CPPO on every rollout with images"], "2507.06448"),
    ],
)
def test_a_method_names_its_own_papers(make_trainer, method, named, absent):
    card = model_card(make_trainer(make_rows([1, 1]), method=method), None, "m", [], [])
    assert all(part in card for part in named)
    assert absent not in card


HOSTILE = [
    "x</script><script>alert(1)</script>",
    "a\n---\nlicense: mine\n---\n# Title",
    "```\n</code><img src=x onerror=alert(1)>\n````\n",
    "`</code><b>``bold``</b>`",
    "[click](javascript:alert(1)) & *stars* | pipes",
    "'\"\"\"; print('run')  # {{ jinja }}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(make_trainer, text):
    recipe = {"data": text, "eval_data": [text], "system_prompt": text, "prompt_suffix": text}
    facts = replace(FACTS, recipe={**recipe, "hub_token": "hf_abc"})
    summary = {"before": {"n": 1, "accuracy": 0.0, "accuracy_ci95": (0.0, 1.0), "format_rate": 0.0}}
    content = model_card(make_trainer(make_rows([1, 1])), replace(facts, summary=summary), text, [], [])
    assert "hf_abc" not in content
    card = ModelCard(content)
    assert card.data.model_name == text
    assert card.data.license is None
    ((_, shown),) = blocks(card.text, "yaml")
    assert yaml.safe_load(shown) == recipe
    ((_, code),) = blocks(card.text, "python")
    compile(code, "README.md", "exec")
    assert repr(text) in code
    assert repr(f"What does the image show? {text}") in code
    page = markdown(card.text, extensions=["fenced_code", "tables"])
    for part in ("<script", "<img", "<b>", 'href="javascript', "<em>"):
        assert part not in page


def test_paths_of_a_machine_are_shortened():
    given = {"a": "/home/ann/data/rows.jsonl", "b": ["~/m", "C:\\data\\x.jsonl", "rel/rows.jsonl"], "c": 1, "d": None}
    assert portable(given) == {"a": "rows.jsonl", "b": ["m", "x.jsonl", "rel/rows.jsonl"], "c": 1, "d": None}
    assert portable("tasks:digits?n=8") == "tasks:digits?n=8"
