"""Given options win over the method's when a configuration is rebuilt, replaced, extended or parsed."""

import copy
import dataclasses
import json
import pickle
import typing

import pytest
import torch
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from cppo import CPPOConfig
from cppo.fields import Unset
from cppo.methods import METHODS
from cppo.training.config import float32_on_cpu

CPU = {"use_cpu": True, "bf16": False}
GIVEN = {"perception_weight": 0.01, "epsilon_high": None, "delta": None, "view_draws": "epoch", "loss_type": "dapo"}
"""Plain defaults that PAPO and VPPO would change."""


@dataclasses.dataclass
class Extended(CPPOConfig):
    """A user's class, with its own field and default."""

    note: str = "mine"
    perception_top_fraction: float = 0.3


def config(folder, **given):
    return CPPOConfig(str(folder), **CPU, **given)


def rebuilt(made):
    """The configuration rebuilt from all its fields; TRL accepts one of two equivalent ones."""
    values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.init}
    return type(made)(**{**values, "generation_batch_size": None})


COPIES = {
    "rebuilt": rebuilt,
    "replaced": lambda made: dataclasses.replace(made, generation_batch_size=None),
    "pickled": lambda made: pickle.loads(pickle.dumps(made)),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("method", ["papo", "vppo", "noisyrollout"])
def test_a_copy_keeps_what_was_given_and_what_the_method_set(tmp_path, again, method):
    made = config(tmp_path, method=method, **GIVEN)
    assert {name: getattr(made, name) for name in GIVEN} == GIVEN
    others = METHODS[method].options.keys() - GIVEN
    assert {name: getattr(made, name) for name in others} == {name: METHODS[method].options[name] for name in others}
    assert again(made).to_dict() == made.to_dict()


def test_another_method_can_take_the_place_of_none(tmp_path):
    """A resolved value counts as given from then on."""
    changed = dataclasses.replace(config(tmp_path), method="papo", generation_batch_size=None)
    assert (changed.perception_weight, changed.perception_sink, changed.epsilon_high) == (0.01, "contrast", None)


def test_a_class_of_the_users_own(tmp_path):
    made = Extended(str(tmp_path), **CPU, method="vppo", note="theirs")
    assert (made.note, made.perception_top_fraction, made.perception_selector) == ("theirs", 0.3, "top")
    assert rebuilt(made) == made


def parse(parser, folder, *words):
    line = ["--output_dir", str(folder), "--use_cpu", "true", "--bf16", "false", "--method", "papo", *words]
    return (parser.parse_args_and_config if isinstance(parser, TrlParser) else parser.parse_args_into_dataclasses)(line)


@pytest.mark.parametrize("parser", [TrlParser, HfArgumentParser])
def test_parsers_that_pass_every_field(tmp_path, parser):
    words = ["--perception_weight", "0.01", "--removing_views", "crop", "--epsilon", "0.2", "--perception_gate", "none"]
    (made,) = parse(parser((CPPOConfig,)), tmp_path, *words)
    assert made == config(
        tmp_path, method="papo", perception_weight=0.01, removing_views=["crop"], epsilon=0.2, perception_gate="none"
    )
    assert (made.perception_weight, made.epsilon_high, made.perception_view_gradients) == (0.01, 0.3, False)
    (made,) = parse(parser((CPPOConfig,)), tmp_path, "--perception_sink", "divergence", "--perception_view_gradients",
                    "true", "--perception_view_policy", "current")  # fmt: skip
    assert made.perception_view_gradients is True


def test_trls_parser_takes_null_from_a_file_as_given(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epsilon_high: null\ndelta: 2.0\nview_diffusion_decay: null\nmethod: noisyrollout\n")
    words = ["--config", str(file), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (made,) = TrlParser((CPPOConfig,)).parse_args_and_config(words)
    assert (made.view_diffusion_decay, made.delta, made.view_diffusion_steps) == (None, 2.0, 500)
    file.write_text("epsilon_high: null\nmethod: papo\n")
    (made,) = TrlParser((CPPOConfig,)).parse_args_and_config(words)
    assert (made.epsilon_high, made.delta) == (None, 3.0)


def test_parsers_show_the_plain_default():
    text = " ".join(HfArgumentParser((CPPOConfig,)).format_help().split())
    assert "PERCEPTION_WEIGHT Weight lambda of the perception loss" in text
    assert "(default: the method's, else 0.01)" in text
    assert "(default: the method's, else ['noise_rectangles', 'crop'])" in text


def test_no_value_is_left_unset(tmp_path):
    made = config(tmp_path, method="papo")
    assert not [name for name, value in vars(made).items() if isinstance(value, Unset)]
    assert json.loads(made.to_json_string())["perception_weight"] == 0.02
    assert made.to_sanitized_dict()["perception_weight"] == 0.02
    assert "perception_weight=0.02," in str(made)


def test_every_field_that_a_method_sets_waits_for_it():
    waiting = {field.name for field in dataclasses.fields(CPPOConfig) if isinstance(declared(field), Unset)}
    assert waiting >= {name for method in METHODS.values() for name in method.options}


def declared(field):
    return field.default_factory() if field.default is dataclasses.MISSING and field.init else field.default


def test_trls_fields_that_methods_set_stay_trls():
    ours, theirs = CPPOConfig.__dataclass_fields__, GRPOConfig.__dataclass_fields__
    our_types, their_types = typing.get_type_hints(CPPOConfig), typing.get_type_hints(GRPOConfig)
    for name in theirs:
        assert (our_types[name], ours[name].metadata) == (their_types[name], theirs[name].metadata), name


@pytest.mark.parametrize(
    ("given", "bf16", "lines"),
    [
        ({}, False, 1),
        ({"use_cpu": True}, False, 1),
        ({"bf16": False}, False, 0),
        ({"use_cpu": True, "bf16": True}, True, 0),
    ],
)
def test_a_cpu_computes_in_float32_unless_told_otherwise(tmp_path, monkeypatch, capsys, given, bf16, lines):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert CPPOConfig(str(tmp_path), **given).bf16 is bf16
    assert capsys.readouterr().err.count("training runs on the CPU, in float32") == lines


def test_bfloat16_stays_trls_default_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not float32_on_cpu({"bf16": None})
    assert float32_on_cpu({"bf16": None, "use_cpu": True})
