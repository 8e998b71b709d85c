"""A model that trains a step in a tenth of a second."""

import copy
import gc

import pytest
import torch
from rollout_stubs import build_trainer
from transformers import AutoModelForImageTextToText, AutoProcessor

from cppo.assets.build import build_micro

TINY = {
    "text_hidden": 32,
    "text_layers": 2,
    "text_heads": 2,
    "text_intermediate": 48,
    "vision_hidden": 16,
    "vision_layers": 1,
    "vision_heads": 2,
    "vision_intermediate": 32,
    "min_pixels": 32 * 32,
    "max_pixels": 64 * 64,
    "vocab_size": 270,
    "max_positions": 256,
}


@pytest.fixture(autouse=True, scope="session")
def _light_process():
    # Each training begins with a full collection, which would visit every object of the imported libraries.
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a random model whose predictions depend on the image; with untrained widths of 0.04 they hardly do."""
    folder = build_micro(tmp_path_factory.mktemp("tiny"), texts=["What is number 0123456789 see \\boxed{}"], **TINY)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(12.0 if "visual" in name else 7.0)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def processor(tiny):
    return AutoProcessor.from_pretrained(tiny, padding_side="left")


@pytest.fixture(scope="session")
def tiny_model(tiny):
    """The model itself, to be copied: loading takes longer than a step."""
    return AutoModelForImageTextToText.from_pretrained(tiny)


@pytest.fixture
def make_trainer(tiny_model, processor, tmp_path):
    """`build_trainer` with a copy of the tiny model, in a folder of the test."""

    def make(rows, *classes, model=None, folder="out", **given):
        model = copy.deepcopy(tiny_model) if model is None else model
        return build_trainer(model, tmp_path / folder, rows, *classes, **{"processing_class": processor, **given})

    return make
