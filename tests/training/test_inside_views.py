"""Views inside the model in the trainer: no pixels are drawn for them, and incompatible options are refused."""

from types import SimpleNamespace

import pytest
import torch
from rollout_stubs import build_trainer, cut, generation_batch, inject, make_rows
from transformers import PreTrainedModel

from cppo import CPPOConfig
from cppo.errors import UserError
from cppo.options.views import INPUT_VIEWS, PIXEL_NOISE
from cppo.training.fit import admit_inside_views


@pytest.mark.parametrize("name", INPUT_VIEWS)
def test_every_scorer_has_the_same_loss_and_no_picture_is_drawn(tiny, tmp_path, monkeypatch, name):
    """The kernel cannot take these views; the plain scorer takes them."""
    rows, losses, gradients = make_rows([1, 0, 2]), [], []
    for scorer in ("plain", "kernel", "shared"):
        given = {"scorer": scorer, "perception_preserving_weight": 0.0, "perception_weight": 20.0}
        trainer = build_trainer(tiny, tmp_path / scorer, rows, removing_views=[name], **given)
        monkeypatch.setattr(trainer._views, "_views", None)
        if name != PIXEL_NOISE:
            monkeypatch.setattr(trainer, "_process_view", None)
        inject(trainer)
        (inputs,) = cut(trainer, generation_batch(trainer, rows), 1)
        assert any(views is not None for views in inputs["perception_views"])
        loss = trainer._compute_loss(trainer.model, inputs)
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        losses.append(loss.item())
        gradients.append(torch.cat([gradient.flatten() for gradient in found if gradient is not None]))
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-6)] * 2
    assert gradients[0].norm() > 1e-3
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-3 * gradients[0].norm()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"removing_views": ["attention_masked", "crop"]}, "attention_masked is a view inside the model and must be"),
        (
            {"preserving_views": ["image_removed"]},
            "preserving_views: image_removed is a removing view inside the model",
        ),
        ({"rollout_views": ["values_replaced"]}, "rollout_views: values_replaced is a removing view inside the model"),
        ({"removing_views": ["pixel_noise", "crop"]}, "pixel_noise is a view of the processor's output and must be"),
        ({"rollout_views": ["pixel_noise"]}, "pixel_noise is a removing view of the processor's output"),
        ({"view_pixel_noise": -1.0}, "view_pixel_noise"),
    ],
)
def test_where_such_a_view_does_not_belong(tmp_path, given, words):
    with pytest.raises(UserError) as caught:
        CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **given)
    assert words in str(caught.value)


def test_pixel_noise_has_mean_0_and_its_deviation(tiny, tmp_path):
    """Drawn for each prompt and epoch, shared by its rollouts; nothing is clipped, and text alone has no view."""
    rows, given = make_rows([2, 0, 2, 1]), {"removing_views": [PIXEL_NOISE], "perception_gate": "none"}
    seen = {}
    for deviation in (0.0, 2.0, 6.93):
        trainer = build_trainer(tiny, tmp_path / str(deviation), rows, view_pixel_noise=deviation, **given)
        views = generation_batch(inject(trainer), rows)["perception_views"]
        assert [view is None for view in views] == [place // 4 == 1 for place in range(16)]
        assert all(view is views[4 * (place // 4)] for place, view in enumerate(views))
        seen[deviation] = [view["removing"]["pixel_values"].flatten() for view in views[::4] if view is not None]
    for deviation in (2.0, 6.93):
        noise = [noised - clean for noised, clean in zip(seen[deviation], seen[0.0], strict=True)]
        drawn = torch.cat(noise)
        assert drawn.mean().abs() < 5 * deviation / len(drawn) ** 0.5
        assert drawn.std() == pytest.approx(deviation, rel=5 / (2 * len(drawn)) ** 0.5)
        assert not torch.equal(noise[0], noise[1])


def stand_in(tmp_path, model_type, **given):
    """A trainer of a model of this type, with the attributes that are read."""
    text = SimpleNamespace(model_type="llama")
    model = PreTrainedModel.__new__(PreTrainedModel)
    vars(model)["config"] = SimpleNamespace(model_type=model_type, get_text_config=lambda: text)
    args = CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **given)
    return SimpleNamespace(model=model, args=args, is_fsdp_enabled=True)


def test_models_with_another_attention_have_the_removed_image_alone(tmp_path):
    for method, reason in (("pgpo", "attention_masked"), ("cfpo", "values_replaced")):
        with pytest.raises(UserError, match=rf"\['{reason}'\] changes the attention, but model type 'gemma3'"):
            admit_inside_views(stand_in(tmp_path, "gemma3", method=method))
    admit_inside_views(stand_in(tmp_path, "gemma3", method="tor"))


def test_sharded_towers_are_not_waited_for(tmp_path):
    given = {"removing_views": ["image_removed"], "perception_view_gradients": False}
    with pytest.raises(UserError, match="and FSDP and ZeRO-3 would wait forever"):
        admit_inside_views(stand_in(tmp_path, "llava", **given))
    admit_inside_views(stand_in(tmp_path, "llava", **{**given, "perception_view_gradients": True}))
