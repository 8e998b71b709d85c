"""The recipes of the published run, and the documents' table of it, against the published values as typed in here."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from cppo.cli.main import main
from cppo.data import question_text
from cppo.recipes import load_recipe, recipe_names
from cppo.recipes.recipe import RECIPES_DIR, recipe_summary
from cppo.runs.prepare import build_config
from cppo.runs.sources import load_sources

ROOT = Path(__file__).parents[2]
PAGE, EXAMPLES = ROOT / "docs" / "choose" / "published_run.md", ROOT / "examples"
RECIPES = ("cppo-paper", "cppo-paper-7b", "cppo-paper-geometry3k")
PUBLISHED = {
    "model": (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    "data": ("hub:TIGER-Lab/ViRL39K:train", "hub:TIGER-Lab/ViRL39K:train", "hub:hiyouga/geometry3k:train"),
    "system_prompt": (None, None, None),
    "images_per_row": (1, 1, None),
    "min_side": (28, 28, None),
    "min_pixels": (None, None, None),
    "max_pixels": (None, None, None),
    "max_prompt_tokens": (512, 512, 512),
    "num_train_epochs": (2, 2, 15),
    "num_generations": (5, 5, 4),
    "per_device_train_batch_size": (8, 2, 8),
    "gradient_accumulation_steps": (5, 20, 1),
    "steps_per_generation": (40, 160, 2),
    "num_iterations": (1, 1, 1),
    "max_completion_length": (4096, 4096, 1024),
    "temperature": (1.0, 1.0, 1.0),
    "top_p": (1.0, 1.0, 1.0),
    "top_k": (0, 0, 0),
    "repetition_penalty": (1.0, 1.0, 1.0),
    "rewards": (["accuracy", "format?form=published"],) * 3,
    "reward_weights": ([0.9, 0.1],) * 3,
    "scale_rewards": ("group", "group", "group"),
    "loss_type": ("bnpo", "bnpo", "bnpo"),
    "importance_sampling_level": ("token", "token", "token"),
    "epsilon": (0.2, 0.2, 0.2),
    "epsilon_high": (0.2, 0.2, 0.2),
    "delta": (3.0, 3.0, 3.0),
    "beta": (0.01, 0.01, 0.01),
    "entropy_coef": (0.0, 0.0, 0.0),
    "learning_rate": (1e-6, 1e-6, 1e-6),
    "lr_scheduler_type": ("constant", "constant", "constant"),
    "warmup_steps": (0, 0, 0),
    "weight_decay": (0.01, 0.01, 0.01),
    "adam_beta1": (0.9, 0.9, 0.9),
    "adam_beta2": (0.999, 0.999, 0.999),
    "adam_epsilon": (1e-8, 1e-8, 1e-8),
    "max_grad_norm": (1.0, 1.0, 1.0),
    "nonfinite": ("skip", "skip", "skip"),
    "bf16": (True, True, True),
    "gradient_checkpointing": (True, True, True),
    "freeze_vision_tower": (False, False, False),
    "use_peft": (False, False, False),
    "perception_sink": ("contrast", "contrast", "contrast"),
    "perception_weight": (0.01, 0.01, 0.01),
    "perception_temperature": (0.1, 0.1, 0.1),
    "perception_divergence": ("k3", "k3", "k3"),
    "perception_score": ("entropy_shift", "entropy_shift", "entropy_shift"),
    "perception_selector": ("top_positive", "top_positive", "top_positive"),
    "perception_top_fraction": (0.5, 0.5, 0.5),
    "perception_gate": ("advantage", "advantage", "advantage"),
    "perception_weighting": ("equal", "equal", "equal"),
    "perception_preserving_weight": (1.0, 1.0, 1.0),
    "perception_removing_weight": (1.0, 1.0, 1.0),
    "perception_rollouts_per_group": (None, None, None),
    "perception_normalization": ("microbatch", "microbatch", "microbatch"),
    "perception_view_gradients": (True, True, True),
    "perception_anchor_gradients": (True, True, True),
    "preserving_views": (["color_jitter", "perspective", "rotation"],) * 3,
    "removing_views": (["noise_rectangles", "crop"],) * 3,
    "rollout_views": ([], [], []),
    "view_brightness": ([0.2, 1.3],) * 3,
    "view_contrast": ([0.2, 1.8],) * 3,
    "view_saturation": ([0.2, 1.8],) * 3,
    "view_perspective_distortion": (0.2, 0.2, 0.2),
    "view_perspective_probability": (0.5, 0.5, 0.5),
    "view_rotation_degrees": (10.0, 10.0, 10.0),
    "view_noise_rectangles": (50, 50, 50),
    "view_noise_side": ([0.05, 0.15],) * 3,
    "view_crop_side": ([0.6, 0.7],) * 3,
    "save_steps": (248, 80, 62),
}
"""Option: its value in the published 3B, 7B and Geometry3K scripts, in our units (steps are optimizer steps)."""
BATCHES = {
    "cppo-paper": (8, 512, 64),
    "cppo-paper-7b": (8, 512, 64),
    "cppo-paper-geometry3k": (16, 64, 32),
}
"""Published devices, prompts generated together, prompts an optimizer step."""


def resolved(name):
    """Every option in force, on a machine with a GPU."""
    on_cpu = load_recipe("train", name, {"use_cpu": True, "bf16": False})
    recipe = load_recipe("train", name)
    return {**vars(build_config(on_cpu)), **vars(recipe.options), "bf16": recipe.config["bf16"]}


@pytest.mark.parametrize("place", range(3), ids=RECIPES)
def test_every_value_is_the_published_one(place):
    options = resolved(RECIPES[place])
    values = {name: getattr(options[name], "value", options[name]) for name in PUBLISHED}
    assert values == {name: published[place] for name, published in PUBLISHED.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_batches(name):
    options = resolved(name)
    devices, together, a_step = BATCHES[name]
    rollouts = devices * options["per_device_train_batch_size"]
    assert rollouts * options["steps_per_generation"] == together * options["num_generations"]
    assert rollouts * options["gradient_accumulation_steps"] == a_step * options["num_generations"]


def test_the_instruction_asks_for_what_the_published_one_asks():
    suffix = load_recipe("train", "cppo-paper").options.prompt_suffix
    for part in ("monologue", "<think>", "</think>", "\\boxed{}"):
        assert part in suffix
    assert "image" not in suffix
    assert len({load_recipe("train", name).options.prompt_suffix for name in RECIPES}) == 1


def test_the_documents_show_these_values():
    """One row an option, with the three values as YAML."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| .+ \|$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    shown = {name: tuple(yaml.safe_load(cell.strip("`")) for cell in cells) for name, *cells in rows}
    assert shown == {name: tuple(published) for name, published in PUBLISHED.items()}


def given(name):
    return yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text("utf-8"))


def test_what_is_not_published_says_so():
    paper = {name for name in recipe_names() if "paper" in name}
    assert paper == set(RECIPES)
    assert recipe_summary(RECIPES_DIR / "cppo-7b-geometry3k.yaml").startswith("Not published: ")
    for name in ("cppo-3b", "cppo-7b", "cppo-7b-geometry3k", "vllm-colocate", "vllm-server"):
        assert "No run at this size has been made here." in recipe_summary(RECIPES_DIR / f"{name}.yaml")
    assert {given(name)["extends"] for name in ("lora-24gb", "vllm-colocate", "vllm-server", "cppo-7b")} == {"cppo-3b"}


def test_every_difference_of_the_recommended_recipe_has_its_reason():
    """The comment above each option, or its block, cites a measurement or says that there is none."""
    text = (RECIPES_DIR / "cppo-3b.yaml").read_text("utf-8")
    reason = ""
    for line in text.splitlines():
        if line.startswith("#"):
            reason = line
        elif line and not line.startswith(("extends:", "output_dir:")):
            assert "judgement, unmeasured" in reason or re.search(r"\(docs/\S+\.md\)", reason), line
    assert set(given("cppo-3b")) == {
        "extends",
        "output_dir",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "loss_type",
        "perception_normalization",
        "rewards",
    }


def test_the_published_run_is_tried_on_a_stand_in(hub, small_model, tmp_path, capsys, monkeypatch):
    """The recipe as it is, its data from a hub in ViRL39K's layout, but for model, length of responses and one step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["virl39k_stand_in.py", "ViRL39K", "24"])
    runpy.run_path(str(EXAMPLES / "virl39k_stand_in.py"), run_name="__main__")
    hub.add("TIGER-Lab/ViRL39K", {path.name: path.read_bytes() for path in Path("ViRL39K").iterdir()})
    less = ["--model", small_model, "--max_completion_length", "4", "--steps_per_generation", "5"]
    assert main(["train", "--config", "cppo-paper", *less, "--use_cpu", "true", "--bf16", "false", "--dry_run"]) == 0
    plan = capsys.readouterr().out
    for line in (
        "recipe     cppo-paper",
        "rows       22 to train on, 0 bad, 2 with other images, 0 too long",
        "every 1 share 8 prompts x 5 responses",
        "micro-batches of 8 rollouts cut groups of 5: each prompt and image runs once for at most 5 of them, 3.3 on",
        "loss       bnpo, learning rate 1e-06, scorer shared",
        "rewards    accuracy_reward x 0.9, format_reward x 0.1",
    ):
        assert line in plan
    source = load_sources(load_recipe("train", "cppo-paper")).train
    suffix = load_recipe("train", "cppo-paper").options.prompt_suffix
    assert all(question_text(record.prompt).endswith(f" {suffix}") for record in source)
    assert sorted({image.size for record in source for image in record.images}) == [(28, 28), (64, 64)]
