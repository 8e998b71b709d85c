"""The card that a trainer writes with its model: its facts, and a snippet that runs."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from rollout_stubs import build_trainer, make_rows

from cppo.assets import resolve_model


def blocks(card, language):
    return re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, flags=re.DOTALL | re.MULTILINE)


def run_snippet(folder, monkeypatch, capsys):
    """The output of the card's Python, run in the card's folder."""
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
    assert "2 rows; the trainer does not know their source." in card.text
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


@pytest.mark.parametrize(
    ("method", "named", "absent"),
    [
        ("grpo", ["arXiv:2402.03300"], "2601.00501"),
        ("papo", ["arxiv.org/abs/2507.06448", "arXiv:2402.03300"], "2601.00501"),
        ("cppo-no-gate", ["arXiv:2601.00501", "CPPO on every rollout with images"], "2507.06448"),
    ],
)
def test_a_method_names_its_own_papers(make_trainer, tmp_path, method, named, absent):
    make_trainer(make_rows([1, 1]), method=method).create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(part in card for part in named)
    assert absent not in card
