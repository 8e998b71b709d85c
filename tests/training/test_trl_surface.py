"""CPPO's overrides and inherited parts of TRL 1.16: names, signatures, calls, fields and defaults."""

import ast
import dataclasses
import inspect
import textwrap

import pytest
import transformers
from rollout_stubs import make_rows
from trl import GRPOConfig, GRPOTrainer

from cppo.fields import plain_default
from cppo.training import OLDEST_TRANSFORMERS, SUPPORTED_TRL, check_versions
from cppo.training.config import CPPOConfig
from cppo.training.trainer import CPPOTrainer
from cppo.upstream import OVERRIDES

TRL_1_16_PARAMETERS = {
    "create_accelerator_and_postprocess": [],
    "_tokenize_prompts": ["prompts"],
    "_generate": ["prompts"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["inputs"],
    "_get_per_token_logps_and_entropies": [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ],
    "_prepare_input": ["data"],
    "_prepare_inputs": ["generation_batch"],
    "_compute_loss": ["model", "inputs"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "_get_train_sampler": ["dataset"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_save_checkpoint": ["model", "trial"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_run_epoch": [
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_rng_state": ["checkpoint"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "create_model_card": ["model_name", "dataset_name", "tags"],
    "save_model": ["output_dir", "_internal_call"],
}

PUBLISHED_DEFAULTS = {
    "perception_advantage_mean": "all",
    "perception_shaping_weight": 1.0,
    "perception_bonus_weight": 0.4,
    "perception_bonus_limit": 0.5,
    "perception_softmax_gate": 0.05,
    "perception_softmax_temperature": 1.8,
    "perception_kl_target": "old",
    "perception_kl_weights": [2.0, 0.5],
    "perception_covariance_fraction": 0.0002,
    "perception_covariance_threshold": None,
    "perception_selector_scope": "rollout",
    "perception_band": [0.2, 0.8],
    "perception_entropy_fraction": 0.3,
    "perception_nucleus": 0.95,
    "perception_set_weights": [1.0, 0.5],
    "trained_answers": None,
    "trained_answers_weight": 0.5,
    "schedules": [],
    "advantage_baseline": "group",
    "baseline_init_samples": 1,
    "baseline_memory": [0.875, 0.96],
    "baseline_kl_target": 0.01,
    "baseline_kl_window": 10,
    "dynamic_sampling_rounds": 1,
    "data_stages": 1,
    "method": "cppo",
    "perception_sink": "contrast",
    "perception_weight": 0.01,
    "perception_preserving_weight": 1.0,
    "perception_removing_weight": 1.0,
    "perception_removing_entropy_weight": 0.0,
    "perception_preserving_entropy_weight": 0.0,
    "entropy_estimator": "exact",
    "perception_temperature": 0.1,
    "perception_top_fraction": 0.5,
    "perception_top_rounding": "floor",
    "perception_selector": "top_positive",
    "perception_divergence": "k3",
    "perception_score": "entropy_shift",
    "perception_gate": "advantage",
    "perception_gate_reward": None,
    "perception_weighting": "equal",
    "perception_advantage_floor": 0.9,
    "perception_advantage_scope": "batch",
    "perception_weight_threshold": 0.4,
    "perception_weight_slope": 2.0,
    "perception_rollouts_per_group": None,
    "perception_normalization": "rollout",
    "perception_view_policy": "current",
    "perception_view_gradients": True,
    "perception_anchor_gradients": True,
    "perception_memory": "joint",
    "scorer": "shared",
    "require_sharing": False,
    "freeze_vision_tower": False,
    "rl_weight": 1.0,
    "log_perception_grad_share": False,
    "preserving_views": ["color_jitter", "perspective", "rotation"],
    "removing_views": ["noise_rectangles", "crop"],
    "view_draws": "epoch",
    "view_brightness": [0.2, 1.3],
    "view_contrast": [0.2, 1.8],
    "view_saturation": [0.2, 1.8],
    "view_perspective_distortion": 0.2,
    "view_perspective_probability": 0.5,
    "view_rotation_degrees": 10.0,
    "view_diffusion_steps": 200,
    "view_diffusion_decay": None,
    "view_noise_rectangles": 50,
    "view_noise_side": [0.05, 0.15],
    "view_crop_side": [0.6, 0.7],
    "view_pixel_noise": 2.0,
    "view_patch_side": 14,
    "view_ascent_steps": 1,
    "view_ascent_step": 0.1,
    "view_ascent_bound": 0.1,
    "view_ascent_direction": "sign",
    "view_ascent_band": [0.2, 0.8],
    "view_patch_probability": 0.6,
    "rollout_views": [],
    "rollout_view_mode": "augment",
    "rollout_view_fraction": 0.5,
    "nonfinite": "stop",
    "nonfinite_limit": 5,
    "per_device_generation_batch_size": None,
    "view_threads": 2,
}
"""arXiv 2601.00501 and its published implementation; only the normalization differs."""

CLASS_MARKS = {
    "__dict__",
    "__weakref__",
    "__module__",
    "__annotations__",
    "__doc__",
    "__init__",
    "__firstlineno__",
    "__static_attributes__",
    "_tag_names",
}


def parameters_of(method):
    """Its parameters without `self`."""
    return list(inspect.signature(method).parameters.values())[1:]


def test_the_table_names_every_override():
    assert set(TRL_1_16_PARAMETERS) == set(OVERRIDES)
    assert all(reason.strip() for reason in OVERRIDES.values())


def test_what_the_class_takes_from_trl_is_listed():
    ours = [parent for parent in CPPOTrainer.__mro__ if parent.__module__.startswith("cppo.")]
    assert CPPOTrainer.__mro__[len(ours)] is GRPOTrainer
    inherited = {name for parent in CPPOTrainer.__mro__[len(ours) :] for name in vars(parent)}
    own = {name for parent in ours for name in vars(parent)}
    assert (own & inherited) - CLASS_MARKS == set(OVERRIDES)


@pytest.mark.parametrize("name", TRL_1_16_PARAMETERS)
def test_trl_has_the_method_with_the_recorded_parameters(name):
    assert [parameter.name for parameter in parameters_of(getattr(GRPOTrainer, name))] == TRL_1_16_PARAMETERS[name]


@pytest.mark.parametrize("name", TRL_1_16_PARAMETERS)
def test_ours_takes_the_parameters_of_trls_by_name(name):
    ours = inspect.signature(getattr(CPPOTrainer, name))
    theirs = parameters_of(getattr(GRPOTrainer, name))
    ours.bind(object(), **{parameter.name: object() for parameter in theirs})
    required = [parameter.name for parameter in theirs if parameter.default is inspect.Parameter.empty]
    ours.bind(object(), **dict.fromkeys(required))
    ours.bind(object(), *required)
    for parameter in theirs:
        if parameter.default is not inspect.Parameter.empty and parameter.name in ours.parameters:
            assert ours.parameters[parameter.name].default == parameter.default


def calls_in(cls, names):
    """Every call to a method of one of these names in the source of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            yield node


@pytest.mark.parametrize("cls", [GRPOTrainer, transformers.Trainer])
def test_ours_takes_every_call_that_the_parents_make(cls):
    for call in calls_in(cls, set(OVERRIDES)):
        keywords = {keyword.arg: object() for keyword in call.keywords if keyword.arg is not None}
        assert not any(isinstance(argument, ast.Starred) for argument in call.args)
        inspect.signature(getattr(CPPOTrainer, call.func.attr)).bind(object(), *call.args, **keywords)


def test_every_override_is_called_by_a_parent():
    """`_get_train_sampler` is passed as a function; `bind` above would not notice a missing method."""
    called = {call.func.attr for cls in (GRPOTrainer, transformers.Trainer) for call in calls_in(cls, set(OVERRIDES))}
    assert set(OVERRIDES) - called == {"_get_train_sampler"}


def test_the_constructor_is_trls():
    ours, theirs = parameters_of(CPPOTrainer.__init__), parameters_of(GRPOTrainer.__init__)
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


def test_helpers_shadow_nothing_of_a_trainer(make_trainer):
    """Names that CPPO sets on itself must be free in TRL's trainer, or a call of TRL's would reach CPPO's."""
    theirs, ours = make_trainer(make_rows([1, 1]), GRPOTrainer, GRPOConfig), make_trainer(make_rows([1, 1]))
    for trainer in (theirs, ours):
        trainer.get_train_dataloader()
    own = {"_views", "_policy", "_counts_images", "_generating", "_scored", "_step_tokens", "_grad_share", "_samples"}
    own |= {
        "_shares_prompts",
        "_placeholder_ids",
        "_costs",
        "_trained",
        "_rollout_views",
        "_perception_means",
        "_colocated",
    }
    own |= {"_shares_rollouts", "_train_sampler", "fallbacks", "kernels", "form_watch", "asked", "_asks"}
    own |= {"_rewards", "_answering", "_stages"}
    assert set(vars(ours)) - set(vars(theirs)) - set(dir(GRPOTrainer)) == own


@pytest.mark.parametrize(
    ("name", "installed"),
    [("trl", found) for found in ("1.15.3", "1.17.0", "1.17.0.dev0", "2.0", "0.29.1", "1")]
    + [("transformers", found) for found in ("5.16.3", "5.10.4", "4.57.1")],
)
def test_another_version_is_refused_in_words(name, installed):
    with pytest.raises(ImportError) as caught:
        check_versions(**{"trl": "1.16.0", "transformers": "5.24.0", name: installed})
    message = str(caught.value)
    assert f"{name} {installed} is installed" in message
    supported = {"trl": SUPPORTED_TRL, "transformers": f">={OLDEST_TRANSFORMERS}"}[name]
    assert message.endswith(f"pip install '{name}{supported}'")
    assert "\n" not in message
    assert caught.value.name == name  # the command line reports it in one line by this name


@pytest.mark.parametrize("installed", ["1.16", "1.16.0", "1.16.4", "1.16.0.post1"])
def test_a_patch_release_is_taken(installed):
    check_versions(installed, "5.17.0")


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({}, ("removing", "preserving")),
        ({"perception_removing_entropy_weight": 0.05}, ("removing", "preserving")),
        ({"perception_removing_entropy_weight": 0.05, "perception_weight": 0.0}, ("removing",)),
        ({"perception_preserving_entropy_weight": 0.05, "perception_weight": 0.0}, ("preserving",)),
        ({"perception_removing_weight": 0.0, "perception_selector": "all"}, ("preserving",)),
    ],
)
def test_only_the_views_that_count_are_scored(tmp_path, options, views):
    assert CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options).scored_views == views


def test_inherited_fields_keep_trls_defaults():
    ours = {field.name: field for field in dataclasses.fields(CPPOConfig)}
    for field in dataclasses.fields(GRPOConfig):
        assert field.name in ours
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            assert ours[field.name].default is dataclasses.MISSING
        else:
            assert plain_default(ours[field.name]) == plain_default(field), field.name


def test_new_fields_default_to_the_published_values():
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    new = [field for field in dataclasses.fields(CPPOConfig) if field.name not in inherited]
    assert {field.name: plain_default(field) for field in new} == PUBLISHED_DEFAULTS
    assert all(field.metadata["help"] for field in new)
    assert all(isinstance(plain_default(field), type(PUBLISHED_DEFAULTS[field.name])) for field in new)


def test_lists_of_defaults_are_not_shared(tmp_path):
    one, other = (CPPOConfig(str(tmp_path), use_cpu=True, bf16=False) for _ in range(2))
    one.removing_views.append("crop")
    one.view_crop_side[0] = 0.1
    assert other.removing_views == ["noise_rectangles", "crop"]
    assert other.view_crop_side == [0.6, 0.7]
