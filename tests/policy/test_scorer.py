"""The plain scorer against log-softmax computed token by token."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from small_model import SMALL
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel

from cppo.assets.build import build_micro
from cppo.perception import ResponseScores
from cppo.policy import concatenate_rows, plain_scores, slice_rows

TEMPERATURE = 0.7
PROMPT = "<|im_start|>user\n{}What?<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class TableModel(PreTrainedModel):
    """Looks up the next token's logits by the last token; records its inputs."""

    def __init__(self, dtype, size=9):
        super().__init__(PreTrainedConfig())
        self.table = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
        self.asked = {}

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache, **inputs):
        self.asked = {"use_cache": use_cache, **inputs}
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:], aux_loss=torch.tensor(0.5))


def token_by_loop(row, token):
    """Log-probability and entropy from one row of logits, at the temperature."""
    scaled = [value / TEMPERATURE for value in row]
    total = math.fsum(math.exp(value) for value in scaled)
    logps = [value - math.log(total) for value in scaled]
    return logps[token], -math.fsum(math.exp(logp) * logp for logp in logps)


@pytest.mark.parametrize(
    ("dtype", "out", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
    ],
)
def test_scores_are_those_of_the_loop(dtype, out, tolerance):
    model = TableModel(dtype)
    ids = torch.tensor([[0, 1, 5, 2, 8], [3, 3, 4, 7, 6]])
    scores = plain_scores(model, ids, torch.ones_like(ids), 3, TEMPERATURE, {})
    assert scores.logps.shape == scores.entropies.shape == (2, 3)
    assert scores.logits.shape == (2, 3, 9)
    assert scores.logps.dtype == scores.entropies.dtype == scores.logits.dtype == out
    for row in range(2):
        for place in range(3):
            source = model.table[ids[row, place + 1]].double().tolist()
            logp, entropy = token_by_loop(source, int(ids[row, place + 2]))
            assert scores.logps[row, place].item() == pytest.approx(logp, abs=tolerance)
            assert scores.entropies[row, place].item() == pytest.approx(entropy, abs=tolerance)
            scaled = [value / TEMPERATURE for value in source]
            assert scores.logits[row, place].tolist() == pytest.approx(scaled, rel=1e-6)


def test_what_the_model_is_given():
    model = TableModel(torch.float32)
    ids = torch.tensor([[0, 1, 2]])
    vision = {"pixel_values": torch.ones(4, 6), "image_grid_thw": torch.ones(1, 3), "num_images": [1], "num_tiles": [2]}
    assert plain_scores(model, ids, torch.ones_like(ids), 1, 1.0, vision).aux_loss is None
    assert model.asked.keys() == {"use_cache", "pixel_values", "image_grid_thw"}
    assert model.asked["use_cache"] is False
    empty = {"pixel_values": torch.ones(0, 6), "num_images": [0], "image_sizes": None}
    scores = plain_scores(model, ids, torch.ones_like(ids), 1, 1.0, empty, compute_aux_loss=True)
    assert scores.aux_loss.item() == 0.5
    assert model.asked == {"use_cache": False, "output_router_logits": True}


def test_rows_of_scores():
    values = torch.arange(12.0).reshape(4, 3)
    whole = ResponseScores(values, values + 100, values[..., None].expand(4, 3, 2), torch.tensor(1.0))
    part = whole.pick(slice(1, 3))
    assert part.logps.tolist() == values[1:3].tolist()
    assert part.entropies.tolist() == (values[1:3] + 100).tolist()
    assert part.logits.shape == (2, 3, 2)
    assert part.aux_loss is whole.aux_loss
    assert whole.pick([2, 0]).logps.tolist() == values[[2, 0]].tolist()
    assert whole.detached().aux_loss is None
    assert ResponseScores(values, values).pick(slice(1)).logits is None


@pytest.fixture(scope="module")
def model_and_processor(tmp_path_factory):
    folder = build_micro(tmp_path_factory.mktemp("tiny"), texts=["What?"], **SMALL)
    return AutoModelForImageTextToText.from_pretrained(folder).double(), AutoProcessor.from_pretrained(folder)


def test_a_padded_batch_scores_each_row_as_if_alone(model_and_processor):
    """Two images, none and one; prompts padded on the left, responses on the right; gradients included."""
    model, processor = model_and_processor
    images = [[Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 96), "blue")], [], [Image.new("RGB", (64, 64))]]
    texts = [PROMPT.format(IMAGE * len(row)) for row in images]
    batch = dict(processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"))
    responses = [[40, 50, 60, 70], [80, 90], [100, 110, 120]]
    tail = torch.tensor([row + [0] * (4 - len(row)) for row in responses])
    lengths = torch.tensor([[place < len(row) for place in range(4)] for row in responses])
    ids = torch.cat([batch.pop("input_ids"), tail], dim=1)
    mask = torch.cat([batch.pop("attention_mask"), lengths.long()], dim=1)
    batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(tail)], dim=1)
    batch["num_images"] = [2, 0, 1]
    together = plain_scores(model, ids, mask, 4, TEMPERATURE, batch)
    for row, response in enumerate(responses):
        alone = dict(processor(text=[texts[row]], images=[images[row]] if images[row] else None, return_tensors="pt"))
        alone["input_ids"] = torch.cat([alone["input_ids"], torch.tensor([response])], dim=1)
        types = alone["mm_token_type_ids"]
        alone["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(response))], dim=1)
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        logits = model(**alone).logits[0, -len(response) - 1 : -1]
        expected = [token_by_loop(logits[i].tolist(), token) for i, token in enumerate(response)]
        assert together.logps[row, : len(response)].tolist() == pytest.approx([e[0] for e in expected], abs=1e-9)
        assert together.entropies[row, : len(response)].tolist() == pytest.approx([e[1] for e in expected], abs=1e-9)
    order = [2, 1, 0, 2]
    with_images = [slice_rows(batch, row, row + 1) for row in (2, 0, 2)]
    kept = [row for row in order if row != 1]
    again = plain_scores(model, ids[kept], mask[kept], 4, TEMPERATURE, concatenate_rows(with_images))
    torch.testing.assert_close(again.logps, together.logps[kept], rtol=0, atol=1e-12)
