"""The output of `cppo verl-config` in verl: hydra composes it, verl accepts it, and its losses are TRL's."""

from functools import cache
from importlib.resources import files

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.tensordict_utils import nested_tensor_from_tensor_list
from verl.workers.utils.losses import ppo_loss
from verl_recipes import LOSSES, OTHERS, stored

from cppo.assets import MICRO_DIR
from cppo.verl.command import overrides, read_options, write_options
from cppo.verl.composed import composed as composed_of
from cppo.verl.options import options_from


@cache
def composed(name):
    return composed_of(overrides(stored()[name]))


def plain(value):
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@pytest.mark.parametrize("name", [*OTHERS, *LOSSES])
def test_verl_takes_the_options(name):
    config = composed(name)
    for option, value in stored()[name].items():
        assert plain(OmegaConf.select(config, option, throw_on_missing=True)) == value, option
    if "lora_rank" not in config.actor_rollout_ref.model or not config.actor_rollout_ref.model.lora_rank:
        validate_config(config, need_reference_policy(config), need_critic(config))  # with LoRA it imports vLLM
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    assert options_from(rollout.custom["cppo"]).perception_weight in (0.01, 0.02)
    config.actor_rollout_ref.model.path = str(MICRO_DIR)
    assert omega_conf_to_dataclass(config.actor_rollout_ref.model).lora_rank in (0, 32)


def test_words_survive_hydra(tmp_path):
    """Text, lists and mappings of every kind arrive unchanged."""
    values = [
        "plain",
        "a b",
        "it's",
        r"\boxed{}",
        "back\\",
        r"\'",
        "true",
        "null",
        "1e3",
        "",
        "a,b",
        "{a: 1}",
        "${no}",
        "#x",
    ]
    options = {f"data.apply_chat_template_kwargs.option_{number}": value for number, value in enumerate(values)}
    options["data.apply_chat_template_kwargs.many"] = [*values, None, True, 1.5e-6, [1]]
    options["data.apply_chat_template_kwargs.named"] = {"one": values[3], "two": [False]}
    write_options(options, tmp_path / "options.yaml", ["a remark"])
    for given in (overrides(options), read_options(str(tmp_path / "options.yaml"))):
        with initialize_config_dir(str(files("cppo.verl") / "config"), version_base=None):
            found = compose("cppo", given).data.apply_chat_template_kwargs
        assert OmegaConf.to_container(found, resolve=True) == {
            option.rpartition(".")[2]: value for option, value in options.items()
        }


# The losses, against TRL's formulas (trl.trainer.grpo_trainer, 1.16), written out here in float64


def trl_loss(kind, logps, old, advantages, mask, ref, beta, corrects, epsilon, high, delta, temperatures, length):
    log_ratio = logps - old
    if kind == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None]
    ratio = log_ratio.exp()
    kl = (ref - logps).exp() - (ref - logps) - 1
    if corrects:
        kl = kl * ratio
    if kind == "cispo":
        tokens = -ratio.clamp(max=high).detach() * advantages * logps
    elif kind == "sapo":
        tau = torch.where(advantages > 0, temperatures[0], temperatures[1])
        tokens = -(tau * (ratio - 1)).sigmoid() * 4 / tau * advantages
    else:
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        tokens = -torch.minimum(bounded * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    tokens = (tokens + beta * kl).expand_as(mask)
    if kind in ("grpo", "sapo", "sequence"):
        return ((tokens * mask).sum(1) / mask.sum(1)).mean()
    if kind == "dr_grpo":
        return (tokens * mask).sum() / (len(mask) * length)
    return (tokens * mask).sum() / mask.sum()


def verl_loss(actor, logps, old, advantages, lengths, ref):
    """verl's full policy loss of rows with a prompt of one token, as its engines call it."""

    def rows(values):
        return nested_tensor_from_tensor_list(
            [row[:length] for row, length in zip(values, lengths.tolist(), strict=True)]
        )

    ones = torch.ones_like(old, dtype=torch.long)
    columns = {"responses": ones, "response_mask": ones, "old_log_probs": old, "advantages": advantages}
    data = {name: rows(values) for name, values in {**columns, "ref_log_prob": ref}.items()}
    data["prompts"] = nested_tensor_from_tensor_list([torch.ones(1, dtype=torch.long)] * len(old))
    data = TensorDict(data, [len(old)])
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(lengths.sum()), global_batch_size=len(old))
    # The model's output at a token predicts the next one.
    outputs = [
        torch.nn.functional.pad(row[:length], (0, 1)) for row, length in zip(logps, lengths.tolist(), strict=True)
    ]
    return ppo_loss(actor, {"log_probs": torch.cat(outputs)}, data)[0]


SETTINGS = {
    "dapo": {},
    "dapo-delta": {"delta": 3.0},
    "grpo": {"high": 0.28},
    "dr_grpo": {"beta": 0.04},
    "sapo": {"temperatures": (1.0, 1.3)},
    "cispo": {"high": 5.0},
    "sequence": {},
    "k3": {"beta": 0.04, "corrects": False},
}


# The gradient of a corrected KL is the same only in the first update, as `cppo verl-config` reports.
AFTERWARDS = [name for name in LOSSES if not SETTINGS[name].get("beta") or name == "k3"]


@pytest.mark.parametrize(
    ("name", "on_policy"), [*((name, True) for name in LOSSES), *((name, False) for name in AFTERWARDS)]
)
def test_a_translated_loss_is_that_of_trl(name, on_policy):
    settings = {"epsilon": 0.2, "high": 0.2, "delta": None, "beta": 0.0, "corrects": True, "temperatures": (1.0, 1.05)}
    settings |= {"length": 4096} | SETTINGS[name]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 3, 5, 6])
    mask = (torch.arange(7) < lengths[:, None]).double()
    logps, noise, shift = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    old = logps if on_policy else logps + noise
    ref = logps + 0.5 * shift  # verl's estimate of KL ends at 10 nats
    advantages = torch.tensor([1.3, -0.4, 0.7, -1.6], dtype=torch.float64)[:, None]
    ours = logps.clone().requires_grad_()
    kind = name.partition("-")[0] if name != "k3" else "dapo"
    expected = trl_loss(kind, ours, old, advantages, mask, ref, **settings)
    (gradient,) = torch.autograd.grad(expected, ours)

    theirs = logps.clone().requires_grad_()
    actor = omega_conf_to_dataclass(composed(name).actor_rollout_ref.actor)
    found = verl_loss(actor, theirs, old, advantages.expand_as(logps), lengths, ref)
    (verl_gradient,) = torch.autograd.grad(found, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(verl_gradient * mask, gradient * mask, rtol=1e-6, atol=1e-9)
