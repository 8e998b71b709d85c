"""Colocated vLLM gets each prompt with one placeholder an image, and expands it as the processor has done.

The stand-in for vLLM replaces placeholders by its rule: the next image's tokens in the place of each one, as long as
there are images. `benchmarks/vllm_colocate.py` asks vLLM itself.
"""

import copy
from types import SimpleNamespace

import pytest
from rollout_stubs import generation_batch, make_rows
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

from cppo.errors import UserError
from cppo.policy.families import VISION_ROPE_THETA
from cppo.probing import failure
from cppo.trl_surface import probe_colocated_prompts
from cppo.upstream import COLOCATED_PROMPTS


class ReplacingEngine:
    """Answers each prompt by two tokens after it has expanded its images, whose sides are multiples of 16 pixels."""

    def __init__(self, image_token: int, side: int = 16) -> None:
        self.image_token, self.side = image_token, side
        self.asked: list[dict] = []

    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked += prompts
        return [self._answer(**prompt) for prompt in prompts]

    def _answer(self, prompt_token_ids, multi_modal_data=None):
        images = (multi_modal_data or {"image": []})["image"]
        left = iter(images if isinstance(images, list) else [images])
        made = []
        for token in prompt_token_ids:
            image = next(left, None) if token == self.image_token else None
            size = 1 if image is None else (image.width // self.side) * (image.height // self.side)
            made += [token] * size
        drawn = SimpleNamespace(rank=1, logprob=-0.5)
        output = SimpleNamespace(token_ids=[8, 9], logprobs=[{8: drawn}, {9: drawn}])
        return SimpleNamespace(prompt_token_ids=made, outputs=[output])


@pytest.fixture
def model(tiny_model):
    """With the rotary base that vLLM computes with."""
    model = copy.deepcopy(tiny_model)
    model.config.vision_config.rope_parameters["rope_theta"] = VISION_ROPE_THETA
    return model


@pytest.fixture
def colocated(make_trainer, model, processor, monkeypatch):
    """A trainer whose rollouts come from the stand-in, through TRL's own link to colocated vLLM."""
    engine = ReplacingEngine(processor.tokenizer.convert_tokens_to_ids(processor.image_token))

    class Link(vllm_generation.VLLMGeneration):
        def _init_vllm(self):
            self.llm = engine

        def sync_weights(self):
            pass

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Link)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    failure.cache_clear()

    def make(rows):
        return make_trainer(rows, model=model, use_vllm=True, vllm_mode="colocate"), engine

    yield make
    failure.cache_clear()


@pytest.mark.parametrize("images", [[1], [2], [2, 0, 1], [0, 0]], ids=["one", "two", "mixed rows", "text alone"])
def test_each_image_has_one_placeholder_and_is_expanded_once(colocated, images):
    rows = make_rows(images)
    trainer, engine = colocated(rows)
    batch = generation_batch(trainer, rows)
    assert len(engine.asked) == 4 * len(rows)
    for place, asked in enumerate(engine.asked):
        count = images[place // 4]
        assert asked["prompt_token_ids"].count(engine.image_token) == count
        assert ("multi_modal_data" in asked) == (count > 0)
    # What is trained on: as many tokens as the processor makes of 32 x 32 and of 48 x 32 pixels.
    expected = [sum((4, 6)[index % 2] for index in range(count)) for count in images for _ in range(4)]
    assert (batch["prompt_ids"] == engine.image_token).sum(dim=1).tolist() == expected
    assert batch["completion_ids"].tolist() == [[8, 9]] * len(expected)


def test_trl_alone_would_have_images_expanded_twice(colocated):
    rows = make_rows([2])
    trainer, engine = colocated(rows)
    trainer._colocated.begin = lambda expanded, prompts: None
    with pytest.raises(UserError, match=r"vLLM expands a prompt with images to .* tokens, but the processor to"):
        generation_batch(trainer, rows)
    assert engine.asked[0]["prompt_token_ids"].count(engine.image_token) == 4 + 6


def test_an_image_that_vllm_expands_otherwise_is_refused(colocated):
    rows = make_rows([1])
    trainer, engine = colocated(rows)
    engine.side = 8
    with pytest.raises(UserError, match="its image processor has other settings"):
        generation_batch(trainer, rows)


def test_after_a_tools_answer_the_response_follows_the_unexpanded_prompt(colocated):
    trainer, _ = colocated(make_rows([1]))
    trainer._colocated._unexpanded = {(5, 5, 6): [5, 6], (7,): [7]}
    assert trainer._colocated.unexpanded([5, 5, 6, 8, 5]) == [5, 6, 8, 5]
    assert trainer._colocated.unexpanded([7]) == [7]
    assert trainer._colocated.unexpanded([9, 9]) == [9, 9]


def test_a_server_gets_prompts_as_trl_sends_them(make_trainer, model, monkeypatch):
    class Link(vllm_generation.VLLMGeneration):
        def _init_vllm(self):
            pass

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Link)
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_correction": False}
    trainer = make_trainer(make_rows([1]), model=model, **options)
    assert trainer._colocated is None
    assert "generate" not in vars(trainer.vllm_generation)


def test_a_vision_tower_that_vllm_would_compute_otherwise_is_refused(colocated, model):
    model.config.vision_config.rope_parameters["rope_theta"] = 100.0
    with pytest.raises(UserError, match="has rope_theta 100, but vLLM always computes with 10000"):
        colocated(make_rows([1]))


def test_a_trl_that_asks_otherwise_is_refused(colocated, monkeypatch):
    assert failure(probe_colocated_prompts) is None
    theirs = vllm_generation.VLLMGeneration.generate

    def expanding(self, prompts, **asked):
        return theirs(self, prompts=[[*ids, 0] for ids in prompts], **asked)

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "generate", expanding)
    failure.cache_clear()
    assert "vLLM gets other prompts" in COLOCATED_PROMPTS.missing()
    with pytest.raises(UserError, match=r"expand the images of a prompt twice.*vllm_mode = 'server'"):
        colocated(make_rows([1]))
