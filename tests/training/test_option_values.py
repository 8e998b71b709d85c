"""Bad values of options: one clear line each, before a trainer is made."""

import math

import pytest

from cppo.errors import UserError
from cppo.training.config import CPPOConfig

BAD_VALUES = {
    "method": "ppo",
    "perception_weight": -0.1,
    "perception_temperature": 0.0,
    "perception_top_fraction": 1.5,
    "perception_divergence": "l2",
    "perception_score": "attention",
    "perception_gate": "reward",
    "perception_normalization": "mean",
    "scorer": "fast",
    "preserving_views": ["blur"],
    "removing_views": [],
    "view_brightness": [1.3, 0.2],
    "view_contrast": [-1.0, 1.0],
    "view_saturation": [0.5],
    "view_perspective_distortion": 0.9,
    "view_perspective_probability": 2.0,
    "view_rotation_degrees": -1.0,
    "view_noise_rectangles": 0,
    "view_noise_side": [0.0, 0.1],
    "view_crop_side": [0.5, 1.5],
    "view_threads": 0,
}
TOLD = {
    "preserving_views": "'blur' is unknown",
    "removing_views": "the list is empty",
    "view_contrast": "-1.0 is outside [0, inf)",
    "view_noise_side": "0.0 is outside (0, 1]",
    "view_crop_side": "1.5 is outside (0, 1]",
}
"""The message for a list, where it does not quote the list."""
NOT_PAIRS = ("view_brightness", "view_contrast", "view_saturation", "view_noise_side", "view_crop_side")


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_refused_with_its_field(tmp_path, name):
    with pytest.raises(UserError) as caught:
        CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: BAD_VALUES[name]})
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    assert TOLD.get(name, str(BAD_VALUES[name])) in message


@pytest.mark.parametrize("name", NOT_PAIRS)
def test_one_number_where_a_pair_is_asked_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}: expected a list .*, got 0\.5") as caught:
        CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: 0.5})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["perception_weight", "perception_temperature", "perception_top_fraction"])
def test_nan_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=name):
        CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: math.nan})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"perception_gate": "correct"}, "perception_gate_reward"),
        (
            {"log_perception_grad_share": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant: false",
        ),
        (
            {
                "perception_normalization": "token",
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 3,
                "per_device_train_batch_size": 8,
            },
            "steps_per_generation = 3",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as caught:
        CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **values)
    assert "\n" not in str(caught.value)
