"""The catalogue: a method's options exist, apply where not given, and are documented."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from trl import GRPOConfig

from cppo import CPPOConfig
from cppo.cli import main as cli
from cppo.errors import UserError
from cppo.methods import DEFAULT_METHOD, METHODS, SHAPING_SINKS, WHOLE_DISTRIBUTIONS
from cppo.methods.own import OURS
from cppo.methods.published import PUBLISHED as OF_PAPERS
from cppo.methods.rewarded import REWARDED as OF_REWARDS
from cppo.methods.reweighting import REWEIGHTING
from cppo.options import EXECUTION_OPTIONS, cppo_fields
from cppo.options.selection import DETECTORS
from cppo.perception import DEPENDENCY_SCORES, EXACT_DIVERGENCES, SCORES, SELECTORS, SHAPINGS, TERMS, needs_of
from cppo.recipes import load_recipe
from cppo.rewards import check_rewards, chosen_rewards, load_reward

ROOT = Path(__file__).parents[2]


def config(tmp_path, **given):
    return CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **given)


def test_every_option_is_a_methods_or_one_of_execution():
    inherited = {field.name for field in fields(GRPOConfig)}
    own = {field.name for field in fields(CPPOConfig)} - inherited
    assert own > EXECUTION_OPTIONS
    methods_own = own - EXECUTION_OPTIONS - {"method"}
    # A new option changes this count: decide whether it is a method's or one of EXECUTION_OPTIONS.
    assert len(methods_own) == 76
    for method in METHODS.values():
        # A run decides what is trained, except in NoisyRollout, where its code does.
        assert set(method.options) <= methods_own | inherited | {"freeze_vision_tower"}, method.name
        assert "perception_sink" in method.options


def test_the_default_method_sets_what_the_fields_have(tmp_path):
    assert CPPOConfig.method == DEFAULT_METHOD
    given, named = config(tmp_path), config(tmp_path, method=DEFAULT_METHOD)
    assert given.to_dict() == named.to_dict()
    assert {name: getattr(given, name) for name in METHODS["cppo"].options} == METHODS["cppo"].options


@pytest.mark.parametrize("name", METHODS)
def test_a_method_sets_its_options(tmp_path, name):
    made = config(tmp_path, method=name)
    assert {option: getattr(made, option) for option in METHODS[name].options} == METHODS[name].options
    # Lists are copies: a change in one run is invisible to another.
    made.removing_views.append("crop")
    assert vars(config(tmp_path, method=name))["removing_views"] != made.removing_views


PUBLISHED = {
    "visionary-r1": {"loss_type": "grpo", "beta": 0.04, "schedules": ["beta=cosine"]},
    "vision-sr1-two-advantages": {
        "loss_type": "grpo",
        "trained_answers": "description_reward",
        "trained_answers_weight": 0.5,
    },
    "perception-r1": {"epsilon": 0.2, "epsilon_high": 0.3, "beta": 0.0},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "cppo-detached-views": {"perception_view_gradients": False, "perception_anchor_gradients": True},
    "cppo-detached-anchor": {"perception_view_gradients": True, "perception_anchor_gradients": False},
    "noisyrollout": {
        "rollout_view_mode": "mix",
        "view_diffusion_steps": 500,
        "view_diffusion_decay": [30.0, 40 / 60],
        "freeze_vision_tower": True,
        "entropy_coef": 0.001,
    },
    "vppo": {
        "perception_top_fraction": 0.4,
        "perception_top_rounding": "ceil",
        "epsilon_high": 0.28,
        "delta": 3.0,
        "entropy_coef": -0.06,
        "entropy_estimator": "sampled",
        "view_draws": "rollout",
        "view_patch_probability": 0.5,
    },
    "papo": {
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "delta": 3.0,
        "perception_weight": 0.02,
        "perception_view_policy": "rollout",
        "perception_removing_entropy_weight": 0.05,
        "entropy_coef": -0.05,
        "entropy_estimator": "sampled",
        "view_patch_probability": 0.6,
        "view_patch_side": 14,
    },
    "papo-3b": {"perception_weight": 0.02, "perception_removing_entropy_weight": 0.0, "entropy_coef": 0.0},
    "papo-dapo": {"perception_weight": 0.01, "epsilon_high": 0.28, "entropy_coef": -0.03},
    "cfpo": {"perception_weight": 0.02, "perception_divergence": "k3", "removing_views": ["values_replaced"]},
    "dvrp": {
        "perception_removing_entropy_weight": 0.05,
        "perception_preserving_entropy_weight": 0.05,
        "view_diffusion_steps": 500,
        "view_diffusion_decay": [10.0, 0.5],
    },
    "cppo": {"perception_weight": 0.01, "perception_temperature": 0.1, "perception_top_fraction": 0.5},
    "cppo-async": {
        "perception_divergence": "k1",
        "perception_top_rounding": "ceil",
        "preserving_views": ["color_jitter", "perspective", "rotation", "gaussian_blur"],
        "view_draws": "once",
    },
}
PUBLISHED |= {
    "mssr": {
        "num_generations": 1,
        "epsilon_high": 0.3,
        "baseline_init_samples": 1,
        "baseline_memory": [0.875, 0.96],
        "baseline_kl_target": 0.01,
        "baseline_kl_window": 10,
        "perception_bonus_weight": 0.4,
        "perception_bonus_limit": 0.5,
    },
    "sent": {
        "epsilon": 1e6,
        "perception_weight": 0.1,
        "perception_top_fraction": 0.8,
        "perception_kl_weights": [2.0, 0.5],
        "perception_covariance_fraction": 0.0002,
        "perception_covariance_threshold": None,
    },
    "tor": {
        "perception_top_fraction": 0.3,
        "perception_entropy_fraction": 0.3,
        "perception_nucleus": 0.95,
        "perception_set_weights": [1.0, 0.5],
        "perception_selector_scope": "batch",
        "perception_advantage_floor": 1.0,
    },
    "vepo": {
        "view_pixel_noise": 6.93,
        "perception_top_fraction": 0.2,
        "perception_advantage_mean": "selected",
        "entropy_coef": 0.001,
    },
    "pepo": {
        "loss_type": "grpo",
        "perception_softmax_gate": 0.05,
        "perception_softmax_temperature": 1.8,
        "schedules": ["perception_shaping_weight=linear:0:1"],
    },
    "vgpo": {"perception_advantage_floor": 0.9, "epsilon_high": 0.28},
    "perception-r1": {"epsilon": 0.2, "epsilon_high": 0.3},
    "vision-sr1-two-advantages": {"trained_answers_weight": 0.5, "loss_type": "grpo"},
    "visionary-r1": {"beta": 0.04, "schedules": ["beta=cosine"], "loss_type": "grpo"},
}
"""The figures of the papers and their code, written once more by hand."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_figures(tmp_path, name):
    made = config(tmp_path, method=name)
    assert {option: getattr(made, option) for option in PUBLISHED[name]} == PUBLISHED[name]


REWARDED = {
    "mssr": {"accuracy": 1.0},
    "perception-r1": {"accuracy": 0.9, "format": 0.1, "facts": 0.7, "word_repetition?ngram_size=20": 2.0},
    "vision-sr1": {"accuracy": 0.9, "format?before=description": 0.1, "description": 1.0},
    "vision-sr1-two-advantages": {"accuracy": 0.9, "format?before=description": 0.1, "description": 0.0},
    "visionary-r1": {
        "accuracy": 1.0,
        "format?before=info": 1.0,
        "description?opening=<info>&closing=</info>&refusal=not a description": 0.1,
    },
}


def test_the_published_rewards_and_their_weights():
    assert {name: method.rewards for name, method in METHODS.items() if method.rewards} == REWARDED
    for rewards in REWARDED.values():
        names = [load_reward(spec).__name__ for spec in check_rewards(list(rewards), None)]
        assert names[:2] == ["accuracy_reward", "format_reward"][: len(rewards)]


def test_a_method_brings_its_rewards_beside_other_rewards():
    own = REWARDED["vision-sr1"]
    assert chosen_rewards(None, "vision-sr1") == (list(own), [0.9, 0.1, 1.0])
    assert chosen_rewards(["method", "my.py:f"], "vision-sr1") == ([*own, "my.py:f"], [0.9, 0.1, 1.0, 1.0])
    assert chosen_rewards(["my.py:f", "method"], "cppo") == (["my.py:f", "accuracy", "format"], [1.0, 0.9, 0.1])
    assert chosen_rewards(["accuracy"], "vision-sr1") == (["accuracy"], [1.0])
    assert chosen_rewards(None, "grpo") == (["accuracy", "format"], [0.9, 0.1])


def test_another_method_brings_its_rewards_in_the_place_of_the_recipes(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: tasks:digits\nrewards: [accuracy]\nreward_weights: [2.0]\n")
    kept = load_recipe("train", str(file), {"method": "papo"})
    assert (kept.rewards, kept.config["reward_weights"]) == (["accuracy"], [2.0])
    brought = load_recipe("train", str(file), {"method": "vision-sr1"})
    assert (brought.rewards, brought.reward_weights) == (list(REWARDED["vision-sr1"]), [0.9, 0.1, 1.0])
    assert "reward_weights" not in brought.config
    both = load_recipe("train", str(file), {"method": "vision-sr1", "rewards": ["method", "length"]})
    assert both.rewards == [*REWARDED["vision-sr1"], "length"]


def test_what_is_given_wins(tmp_path):
    made = config(tmp_path, method="vppo", perception_top_fraction=0.5, epsilon_high=0.2)
    assert (made.perception_top_fraction, made.epsilon_high, made.perception_sink) == (0.5, 0.2, "mask_advantage")


def test_another_method_drops_the_recipes_options_of_methods(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: tasks:digits\nperception_weight: 0.3\nscorer: plain\nlearning_rate: 1.0e-3\n")
    kept = load_recipe("train", str(file), {"method": "cppo"})
    assert kept.config["perception_weight"] == 0.3
    other = load_recipe("train", str(file), {"method": "papo", "perception_temperature": 0.2})
    assert "perception_weight" not in other.config
    assert (other.config["scorer"], other.config["learning_rate"]) == ("plain", 1.0e-3)
    assert (other.resolved["perception_weight"], other.resolved["perception_temperature"]) == (0.02, 0.2)
    file.write_text("data: tasks:digits\nmethod: papo\nentropy_coef: -0.1\nbeta: 0.04\n")
    cppo = load_recipe("train", str(file), {"method": "cppo"})
    assert ("entropy_coef" in cppo.config, cppo.config["beta"]) == (False, 0.04)  # PAPO sets the first alone
    file.write_text("data: tasks:digits\nperception_weight: 0.3\n")
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {file}\nmethod: dvrp\nperception_top_fraction: 0.2\n")
    assert load_recipe("train", str(child)).resolved["perception_weight"] == 0.01


def test_names_of_options_are_those_of_functions():
    exact = {name for name, score in SCORES.items() if {"logits", "kl", "js"} & needs_of(score) and ":" not in name}
    assert set(WHOLE_DISTRIBUTIONS) == {*EXACT_DIVERGENCES, *exact}
    registries = {"score": SCORES, "selector": SELECTORS, "sink": {**TERMS, **SHAPINGS, "none": None}}
    for option, registry in registries.items():
        packaged = {name for name in registry if ":" not in name}
        assert set(cppo_fields()[f"perception_{option}"].choices) == packaged
    assert set(DETECTORS) == set(DEPENDENCY_SCORES)
    assert set(SHAPING_SINKS) == {name for name in SHAPINGS if ":" not in name}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "gppo"}, "method = 'gppo': did you mean"),
        ({"method": "vppo", "perception_selector": "all"}, "perception_selector = 'all'"),
        ({"method": "vppo", "perception_rollouts_per_group": 1}, "perception_rollouts_per_group"),
        ({"method": "grpo", "rl_weight": 0.0}, "rl_weight = 0"),
        ({"rl_weight": 0.0, "perception_weight": 0.0}, "rl_weight = 0"),
        ({"method": "cppo-detached-views", "perception_anchor_gradients": False}, "are both false"),
        ({"method": "vppo", "rl_weight": 0.0}, "rl_weight = 0"),
        ({"method": "papo-dapo", "perception_selector": "top"}, "perception_removing_entropy_weight"),
        ({"rollout_views": ["crop"]}, "rollout_views: 'crop' is unknown"),
        ({"view_diffusion_decay": [30.0, 0.5]}, "view_diffusion_decay fades out diffusion noise"),
        ({"method": "dvrp", "view_diffusion_decay": [30.0]}, "give two numbers, [steepness, midpoint]"),
        ({"method": "dvrp", "view_diffusion_decay": [30.0, 1.5]}, "a midpoint in [0, 1]"),
        ({"method": "cppo-async", "perception_view_gradients": False}, "because the anchor cancels"),
        ({"method": "papo", "perception_view_gradients": True}, "set perception_view_gradients = false"),
        ({"method": "papo", "perception_divergence": "kl"}, "perception_divergence = 'kl' compares full"),
        (
            {"method": "papo-3b", "perception_selector": "top", "perception_score": "js"},
            "perception_score = 'js' compares full distributions",
        ),
        ({"method": "papo", "top_entropy_quantile": 0.2}, "top_entropy_quantile selects tokens by exact"),
        ({"method": "dvrp", "perception_view_gradients": False}, "trains the policy under the view"),
        (
            {"method": "pgpo", "perception_preserving_entropy_weight": 0.1},
            "perception_preserving_entropy_weight is part",
        ),
        ({"perception_preserving_weight": 0.0, "perception_removing_weight": 0.0}, "are both 0"),
        ({"method": "cppo-likelihood", "perception_view_gradients": False}, "perception_view_gradients = true"),
        ({"method": "cppo-likelihood", "perception_gate": "none"}, "needs perception_gate = 'advantage'"),
        ({"method": "cppo-likelihood", "perception_removing_weight": 1.0}, "perception_removing_weight = 0"),
        ({"method": "vppo", "perception_weighting": "advantage"}, "choose 'equal'"),
        ({"perception_weighting": "advantage", "perception_normalization": "token"}, "perception_normalization"),
        ({"method": "vppo", "perception_gate": "advantage"}, "needs perception_gate = 'none'"),
        ({"method": "vppo", "perception_removing_entropy_weight": 0.1}, "perception_removing_entropy_weight"),
        ({"method": "pgpo", "perception_selector": "top"}, "choose 'all'"),
        ({"method": "pgpo", "perception_gate": "correct", "perception_gate_reward": "x"}, "perception_gate = 'none'"),
        ({"method": "pgpo", "perception_weight_threshold": 1.0}, "perception_weight_threshold"),
        ({"method": "noisyrollout", "rollout_view_fraction": 0.05}, "give at least 0.125"),
        ({"perception_sink": "contrasts"}, "perception_sink: 'contrasts' is unknown; did you mean `contrast`"),
        ({"per_device_generation_batch_size": 4, "use_vllm": True}, "use_vllm = true chooses"),
        (
            {"per_device_generation_batch_size": 4, "use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching = true chooses",
        ),
        ({"per_device_generation_batch_size": 0}, "per_device_generation_batch_size"),
        ({"rollout_view_fraction": 1.5}, "rollout_view_fraction"),
    ],
)
def test_what_does_not_go_together(tmp_path, given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config(tmp_path, **given)


def test_noise_in_rollouts_and_vllms_correction(tmp_path):
    given = {"method": "noisyrollout", "use_vllm": True}
    with pytest.raises(UserError, match="vllm_importance_sampling_correction = false"):
        config(tmp_path, **given)
    given["vllm_importance_sampling_correction"] = False
    assert config(tmp_path, **given, vllm_mode="colocate").rollout_view_mode == "mix"
    with pytest.raises(UserError, match="vllm_mode = 'server' TRL sends one image for all"):
        config(tmp_path, **given, vllm_mode="server")


def test_the_command(capsys):
    assert cli.main(["methods", "papo"]) == 0
    shown = capsys.readouterr().out
    assert "arXiv 2507.06448" in shown
    assert "removing_views: black_patches" in shown
    assert "rewards:" not in shown
    assert cli.main(["methods", "vision-sr1"]) == 0
    assert "rewards: accuracy x 0.9, format?before=description x 0.1, description x 1\n" in capsys.readouterr().out


def test_declarations_are_short():
    """At most 25 lines outside the docstring."""
    for function in (*OF_PAPERS.values(), *OF_REWARDS.values(), *REWEIGHTING.values(), *OURS.values()):
        lines = inspect.getsource(function).splitlines()
        assert len(lines) - len((function.__doc__ or "").splitlines()) <= 25, function.__name__


def test_training_knows_no_method():
    """No method's name is in the code or the messages of training/, except TRL's own method."""
    names = METHODS.keys() - {"cppo", "grpo"}
    files = sorted((ROOT / "src" / "cppo" / "training").glob("*.py"))
    assert len(files) > 5
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, documented) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        words = set(re.findall(r"[a-z0-9+-]+", ast.unparse(tree).lower()))
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not words & (names - {"sent"}), file.name  # which is a word too
        assert not texts & names, file.name
