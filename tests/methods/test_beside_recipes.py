"""`--method NAME` with every packaged recipe: the method's options win over the recipe's."""

import pytest
import yaml

from cppo.errors import UserError
from cppo.methods import METHODS, get_method
from cppo.recipes import load_recipe, recipe_file, recipe_names
from cppo.runs.checks import check_options

STEP_MEANS = {"papo", "papo-3b", "papo-dapo", "cfpo"}
MIXED = {"noisyrollout", "saei"}
REFUSED = {
    "lora-24gb": (STEP_MEANS, "needs the rollouts of a whole step at once, but steps_per_generation = 8"),
    "vllm-colocate": (MIXED, "with vLLM set vllm_importance_sampling_correction = false"),
    "vllm-server": (MIXED, "with vllm_mode = 'server' TRL sends one image for all: choose 'colocate'"),
}
"""The methods that a recipe cannot train, with the reason in the message."""


RECIPES = [
    name for name in recipe_names() if {"method", "extends"} & yaml.safe_load(recipe_file(name).read_text()).keys()
]
"""The recipes of `cppo train`."""
DATA = {"data": "tasks:digits"}
"""For recipes without data."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_can_be_chosen(recipe):
    refused, reason = REFUSED.get(recipe, (set(), None))
    own = load_recipe("train", recipe, DATA).method
    for method in METHODS:
        chosen = load_recipe("train", recipe, {**DATA, "method": method})
        if method != own:
            assert not chosen.config.keys() & get_method(method).options.keys(), method
            assert set(chosen.rewards) >= get_method(method).rewards.keys()
        if method in refused:
            with pytest.raises(UserError, match=reason):
                check_options(chosen)
        else:
            check_options(chosen)


def test_a_given_value_wins_or_is_refused(tmp_path, refused):
    given = ["train", "--config", "micro", "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert load_recipe("train", "micro").config["beta"] == 0
    chosen = load_recipe("train", "micro", {"method": "visionary-r1", "beta": 0.5})
    assert (chosen.resolved["beta"], chosen.resolved["schedules"]) == (0.5, ["beta=cosine"])
    line = refused(*given, "--method", "visionary-r1", "--beta", "0")
    assert line == "schedules: beta = 0 stays 0 under any factor: give beta a value"


def test_a_recipe_that_extends_one_of_another_method(tmp_path):
    """Its own values win over the method's; the other recipe's do not."""
    (tmp_path / "first.yaml").write_text(
        "extends: micro\nmethod: dapo\nepsilon_high: 0.4\nloss_type: grpo\nbeta: 0.1\n"
    )
    (tmp_path / "second.yaml").write_text("extends: first.yaml\nmethod: visionary-r1\nmax_steps: 7\n")
    first, second = (load_recipe("train", str(tmp_path / f"{name}.yaml")) for name in ("first", "second"))
    assert (first.resolved["epsilon_high"], first.resolved["loss_type"], first.resolved["beta"]) == (0.4, "grpo", 0.1)
    assert (second.resolved["beta"], second.config["max_steps"]) == (0.04, 7)
    assert "epsilon_high" not in second.config


@pytest.mark.parametrize("name", ["[a]", "7", "cpo"])
def test_what_is_no_method_is_named_with_its_file(tmp_path, refused, name):
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: micro\nmethod: {name}\n")
    assert refused("train", "--config", str(file)).startswith(f"recipe {file}: method: ")
    assert refused("train", "--method", name).startswith("--method: ")
