"""Tiny random models of every family that shares prompts, in float64, and batches of ragged groups for them."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from cppo.policy import PromptGroup, prompt_groups
from cppo.policy.families import FAMILIES, Sizes, text_part, tiny_config
from cppo.policy.vision_inputs import prompt_vision

VOCABULARY, IMAGE, PAD, VISION_START, VISION_END = 97, 90, 0, 91, 92
TEXT = text_part(
    2, vocab_size=VOCABULARY, max_position_embeddings=256, pad_token_id=PAD, bos_token_id=1, eos_token_id=2
)
TOKENS = {"image": IMAGE, "video": 93, "start": VISION_START, "end": VISION_END}
SHARING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "idefics3", "smolvlm", "internvl")
SIDES = {"llava": 8, "llava_onevision": 8}
"""Sides of square images in families without a grid, where it is not 16."""

IMAGE_TOKENS = 4
IMAGES = (0, 1, 2, 0, 1)
"""Images of each prompt; one prompt has two, two have none."""

PROMPT_LENGTHS = (4, 5, 3, 1, 7)
"""Text tokens of each prompt."""

RESPONSE_LENGTHS = ((3, 6), (6, 1, 4), (2, 5), (4,), (0, 3))
"""Response tokens of each row of each prompt; one row has none (a masked truncated rollout)."""


@dataclass
class Batch:
    """The trainer's inputs to a scorer."""

    input_ids: Tensor
    attention_mask: Tensor
    num_response_tokens: int
    vision: dict[str, Any]
    group_ids: list[int]

    @property
    def rows(self) -> dict[str, Any]:
        """The arguments of any scorer."""
        names = ("input_ids", "attention_mask", "num_response_tokens")
        return {**{name: getattr(self, name) for name in names}, "temperature": 0.7}

    def groups(self, config: Any) -> list[PromptGroup]:
        """Its rows by prompt, for a model with this configuration."""
        length = self.input_ids.shape[1]
        rows = range(len(self.group_ids))
        return prompt_groups(self.group_ids, [prompt_vision(config, self.vision, row, length) for row in rows])

    @property
    def response_mask(self) -> Tensor:
        return self.attention_mask[:, -self.num_response_tokens :].bool()


def make_config(family: str) -> Any:
    return tiny_config(family, Sizes(TEXT, TOKENS, layers=2, patch=4, side=SIDES.get(family, 16)))


def in_patches(family: str) -> bool:
    return FAMILIES[family].images == "patches"


def make_model(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = make_config(family)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # At the usual initial widths of 0.02 a token would hardly see another.
            parameter.normal_(std=0.3 if parameter.ndim >= 2 and "norm" not in name else 0.1)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def make_batch(family: str, seed: int = 0, prompts: tuple[int, ...] = (1, 0, 2, 3, 4), view: int = 0) -> Batch:
    """Rows in an order that mixes the prompts; `view` changes only the images."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, 90, (length,), generator=generator) for length in PROMPT_LENGTHS]
    places = [(p, r) for p in prompts for r in range(len(RESPONSE_LENGTHS[p]))]
    longest = max(max(RESPONSE_LENGTHS[p]) for p in prompts)
    replies = {place: torch.randint(3, 90, (longest,), generator=generator) for place in places}
    order = torch.randperm(len(places), generator=generator).tolist()
    pixels = torch.Generator().manual_seed(1000 * view + seed)
    # Images in patches differ in size.
    grids = [[[1, 4, 4 + 4 * (number % 2)] for number in range(count)] for count in IMAGES]
    images = [[_image(family, grid, pixels) for grid in grids[p]] for p in range(len(IMAGES))]
    ids = [_prompt(family, texts[p], grids[p]) for p in range(len(IMAGES))]
    width = max(len(ids[p]) for p in prompts)
    rows = [places[i] for i in order]
    input_ids, mask = [], []
    for p, r in rows:
        left, length = width - len(ids[p]), RESPONSE_LENGTHS[p][r]
        input_ids.append(torch.cat([torch.full((left,), PAD), ids[p], replies[p, r]]))
        input_ids[-1][width + length :] = PAD
        mask.append(torch.tensor([0] * left + [1] * (len(ids[p]) + length) + [0] * (longest - length)))
    numbers = [p for p, _ in rows]
    stacked, masks = torch.stack(input_ids), torch.stack(mask)
    vision = _vision(family, [images[p] for p in numbers], [grids[p] for p in numbers])
    if in_patches(family) and vision:
        vision["mm_token_type_ids"] = (stacked == IMAGE).long()
    return Batch(stacked, masks, longest, vision, numbers)


def _image(family: str, grid: list[int], generator: torch.Generator) -> Tensor:
    if in_patches(family):
        return torch.randn(grid[1] * grid[2], 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
    if family == "llava_onevision":  # the whole image, and its one tile
        return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    side = SIDES.get(family, 16)
    return torch.randn(3, side, side, generator=generator, dtype=torch.float64)


def _prompt(family: str, text: Tensor, grids: list[list[int]]) -> Tensor:
    parts = [text[:1]]
    for grid in grids:
        count = grid[1] * grid[2] // 4 if in_patches(family) else IMAGE_TOKENS
        if family == "llava_onevision":  # one image alone is tiled, and each line of tokens ends with another
            count = 2 * IMAGE_TOKENS + 2 if len(grids) == 1 else IMAGE_TOKENS + 1
        parts.append(torch.tensor([VISION_START, *[IMAGE] * count, VISION_END]))
    return torch.cat([*parts, text[1:]])


def _vision(family: str, images: list[list[Tensor]], grids: list[list[list[int]]]) -> dict[str, Any]:
    """The inputs of these rows, in each processor's layout."""
    flat = [image for row in images for image in row]
    if not flat:
        return {}
    counts = [len(row) for row in images]
    if in_patches(family):
        grid = torch.tensor([grid for row in grids for grid in row])
        return {"pixel_values": torch.cat(flat), "image_grid_thw": grid, "num_images": counts}
    if family in ("idefics3", "smolvlm"):
        pixels = torch.zeros(len(images), max(counts), 3, 16, 16, dtype=torch.float64)
        for row, found in enumerate(images):
            for place, image in enumerate(found):
                pixels[row, place] = image
        mask = torch.ones(len(images), max(counts), 16, 16, dtype=torch.long)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "num_images": counts}
    if family == "llava_onevision":
        sizes = torch.full((len(flat), 2), 8)
        return {"pixel_values": torch.stack(flat), "image_sizes": sizes, "num_images": counts}
    tiles = {"num_tiles": counts} if family == "internvl" else {}
    return {"pixel_values": torch.stack(flat), "num_images": counts, **tiles}
