"""The model card as text: front matter that parses, what a run knows, hostile text as text."""

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown import markdown

from cppo.reports.model_card import RunFacts, TrainedModel, model_card, portable

MODEL = TrainedModel(
    base="Org/Model-3B",
    is_adapter=False,
    steps=1,
    log_history=[{"step": 1, "reward": 0.5}],
    train_rows=7,
    method="grpo",
    loss_type="dapo",
    max_completion_length=64,
    changed_options={},
    citation=None,
    versions={"cppo": "1.2.3"},
    fallbacks=["it is *slower*"],
)
FACTS = RunFacts({"data": ["hub:org/name:train", "/home/ann/secret place/rows.jsonl"]}, 7, 2, 0, 1)


def blocks(card, language):
    return re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, flags=re.DOTALL | re.MULTILINE)


def test_what_a_run_knows():
    parsed = ModelCard(model_card(MODEL, FACTS, "m", ["org/other"], ["mine"]))
    assert parsed.data.base_model == "Org/Model-3B"
    assert parsed.data.datasets == ["org/other", "org/name"]
    assert "mine" in parsed.data.tags
    assert "7 rows to train on; 2 unusable rows were skipped, 1 left out as too long" in parsed.text
    assert "/home/ann" not in parsed.content


def test_what_a_trainer_knows():
    parsed = ModelCard(model_card(replace(MODEL, train_rows=None, changed_options={"seed": 3}), None, "m", [], []))
    assert "Training, step 1: `reward` 0.500." in parsed.text
    assert "A stream of rows; the trainer does not know their source." in parsed.text
    assert "cppo 1.2.3\n\nFallback\\: it is \\*slower\\*" in parsed.text
    ((_, recipe),) = blocks(parsed.text, "yaml")
    assert yaml.safe_load(recipe) == {"seed": 3}


HOSTILE = [
    "x</script><script>alert(1)</script>",
    "a\n---\nlicense: mine\n---\n# Title",
    "```\n</code><img src=x onerror=alert(1)>\n````\n",
    "`</code><b>``bold``</b>`",
    "[click](javascript:alert(1)) & *stars* | pipes",
    "'\"\"\"; print('run')  # {{ jinja }}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(text):
    recipe = {"data": text, "eval_data": [text], "system_prompt": text, "prompt_suffix": text}
    facts = replace(FACTS, recipe={**recipe, "hub_token": "hf_abc"})
    summary = {"before": {"n": 1, "accuracy": 0.0, "accuracy_ci95": (0.0, 1.0), "format_rate": 0.0}}
    content = model_card(MODEL, replace(facts, summary=summary), text, [], [])
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
