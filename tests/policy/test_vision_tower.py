"""A frozen vision tower stays out of the backward pass; trained parts get the same gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from policy.tiny_models import SHARING, make_batch, make_model

from cppo.policy import leave_out_frozen_tower, plain_scores, vision_tower_parameters

LANGUAGE = r".*(language_model|text_model)\..*(q_proj|down_proj)"
EVERYWHERE = r".*(q_proj|qkv|fc1|gate_proj|linear_fc1)"


def trained_model(family, case, use_reentrant=False):
    """(model to run, transformers model): with checkpointing, and gradients for embeddings, as in training."""
    model = make_model(family)
    if case == "projector":
        for parameter in vision_tower_parameters(model):
            parameter.requires_grad_(False)
        wrapped = model
    else:
        targets = LANGUAGE if case == "language model" else EVERYWHERE
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets)).double()
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    wrapped.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    wrapped.enable_input_require_grads()
    return wrapped.train(), model


def gradients(wrapped, family):
    batch = make_batch(family)
    scores = plain_scores(wrapped, **batch.rows, vision=batch.vision)
    mask = batch.response_mask
    (scores.logps[mask].sum() + scores.entropies[mask].square().sum()).backward()
    return {name: weight.grad for name, weight in wrapped.named_parameters() if weight.requires_grad}


def parts_in_the_graph(wrapped, model, family):
    """Modules around the tower's own parameters with outputs that a backward pass would reach."""
    own, found = {id(weight) for weight in vision_tower_parameters(model)}, []
    for name, module in model.get_encoder(modality="image").named_modules():
        if any(id(weight) in own for weight in module.parameters(recurse=False)):

            def note(_module, _inputs, output, name=name):
                if getattr(output, "grad_fn", None) is not None:
                    found.append(name)

            module.register_forward_hook(note)
    gradients(wrapped, family)
    return found


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("case", ["language model", "projector"])
def test_a_frozen_tower_is_left_out(family, case):
    expected = gradients(trained_model(family, case)[0], family)
    wrapped, model = trained_model(family, case)
    leave_out_frozen_tower(model)
    found = gradients(wrapped, family)
    assert found.keys() == expected.keys()
    assert any(gradient is not None and gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)
    assert parts_in_the_graph(wrapped, model, family) == []


def test_adapters_under_reentrant_checkpointing_keep_their_gradients():
    """There the text's embeddings must require gradients, and still do."""
    wrapped, model = trained_model("qwen2_5_vl", "language model")
    expected = gradients(wrapped, "qwen2_5_vl")
    wrapped, model = trained_model("qwen2_5_vl", "language model", use_reentrant=True)
    leave_out_frozen_tower(model)
    for name, gradient in gradients(wrapped, "qwen2_5_vl").items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_a_tower_with_an_adapter_is_trained(family):
    expected = gradients(trained_model(family, "everywhere")[0], family)
    wrapped, model = trained_model(family, "everywhere")
    leave_out_frozen_tower(model)
    found = gradients(wrapped, family)
    tower = {id(weight) for weight in vision_tower_parameters(model)}
    adapters = {name for name, weight in wrapped.named_parameters() if id(weight) in tower and weight.requires_grad}
    assert adapters
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert all(found[name].any() for name in adapters if "lora_A" in name)
