import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cppo.assets import MICRO_DIR
from cppo.assets.rebuild import STAGES, rebuild
from cppo.recipes import load_recipe


def test_each_stage_starts_where_the_one_before_it_ended():
    recipes = [load_recipe("sft", name) for name in STAGES]
    assert [recipe.options.model for recipe in recipes[1:]] == [recipe.output_dir for recipe in recipes[:-1]]


def test_one_step_of_every_stage_gives_the_packaged_files_with_new_weights(tmp_path, monkeypatch):
    source_root = str(Path(__file__).parents[2] / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source_root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    rebuild(tmp_path / "micro", ["--max_steps", "1", "--warmup_steps", "0", "--per_device_train_batch_size", "2"])
    assert {file.name for file in (tmp_path / "micro").iterdir()} == {file.name for file in MICRO_DIR.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "micro" / name).read_text() == (MICRO_DIR / name).read_text()
    made, packaged = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "micro", MICRO_DIR))
    assert {**made, "transformers_version": None} == {**packaged, "transformers_version": None}
    untrained, last = "runs/micro-build/untrained", load_recipe("sft", STAGES[-1]).output_dir
    states = [
        AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        for folder in (untrained, last, tmp_path / "micro")
    ]
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    name = "model.visual.patch_embed.proj.weight"
    assert not torch.equal(states[0][name], states[2][name])
    assert AutoProcessor.from_pretrained(tmp_path / "micro").tokenizer.eos_token == "<|im_end|>"
