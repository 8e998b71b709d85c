"""Generation against a loop written out by hand: no cache, no padding, one prompt at a time."""

import numpy as np
import pytest
import torch
from PIL import Image

from cppo.errors import UserError
from cppo.evaluation import generate_responses, load_model
from cppo.evaluation.generate import DrawnToken, response_stream
from cppo.policy import vision_placeholder_ids

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def tiny(small_model):
    model, processor = load_model(small_model, device="cpu")
    with torch.no_grad():  # an untrained model repeats its last token whatever it sees: let the layers speak up
        for module in [*model.model.language_model.layers.modules(), *model.model.visual.modules()]:
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(8)
    return model, processor


def picture(seed, width=64, height=64):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(text):
    return [{"role": "user", "content": text}]


PROMPTS = [user("What is it?"), user("1 + 1?"), user("Which of these two pictures shows more, and how many?")]
IMAGES = [(picture(0),), (), (picture(1), picture(2, 96, 64))]


@torch.no_grad()
def greedy_by_hand(model, processor, prompt, images):
    """Argmax of the last position's logits, one token after the other, over hand-written chat text."""
    vision = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
    text = f"<|im_start|>user\n{vision}{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[text], images=[list(images)] if images else None, return_tensors="pt")
    banned, tokens = vision_placeholder_ids(processor, model.config), []
    for _ in range(NEW_TOKENS):
        logits = model(**inputs, use_cache=False).logits[0, -1]
        logits[banned] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == processor.tokenizer.eos_token_id:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[-1:]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_greedy_in_a_batch_equals_greedy_by_hand(tiny):
    found = generate_responses(*tiny, PROMPTS, IMAGES, max_new_tokens=NEW_TOKENS)
    expected = [greedy_by_hand(*tiny, prompt, images) for prompt, images in zip(PROMPTS, IMAGES, strict=True)]
    assert found == expected
    assert len(set(found)) == 3
    other = [(picture(3),), *IMAGES[1:]]
    assert generate_responses(*tiny, PROMPTS, other, max_new_tokens=NEW_TOKENS)[0] != found[0]


def test_vision_placeholders_are_never_generated(tiny):
    model, processor = tiny
    image_token = model.config.image_token_id
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([image_token]), 1e4)
    )
    try:
        plain = model.generate(**processor(text=["hello"], return_tensors="pt"), max_new_tokens=3, do_sample=False)
        assert (plain[0, -3:] == image_token).all()  # the hook works
        shown = {}
        original = processor.batch_decode
        processor.batch_decode = lambda ids, **kwargs: shown.update(ids=ids) or original(ids, **kwargs)
        try:
            generate_responses(model, processor, PROMPTS[:1], IMAGES[:1], max_new_tokens=4)
        finally:
            del processor.batch_decode
        assert len(shown["ids"][0]) >= 1
        assert not set(shown["ids"][0]) & set(vision_placeholder_ids(processor, model.config))
    finally:
        hook.remove()


def streams(seed):
    return [response_stream(seed, "row", sample) for sample in range(len(PROMPTS))]


def test_samples_depend_on_the_seed_and_leave_torch_alone(tiny):
    def sample(seed):
        return generate_responses(*tiny, PROMPTS, IMAGES, max_new_tokens=12, temperature=2.0, streams=streams(seed))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert sample(1) == first
    assert sample(2) != first


def test_a_sample_is_the_same_alone_and_in_a_batch(tiny):
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95}
    together = generate_responses(*tiny, PROMPTS, IMAGES, streams=streams(3), **options)
    alone = [
        generate_responses(*tiny, [prompt], [images], streams=[stream], **options)[0]
        for prompt, images, stream in zip(PROMPTS, IMAGES, streams(3), strict=True)
    ]
    assert alone == together
    assert len(set(together)) == 3


def test_streams_differ_by_each_argument():
    first = {response_stream(*key).random() for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]}
    assert len(first) == 4


class Grid:
    """A stream whose one number is given."""

    def __init__(self, number):
        self._number = number

    def random(self, count):
        return np.array([self._number] * count)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_drawn_tokens_have_the_tempered_nucleus_shares(top_p):
    """One uniform number a row on a fine grid: the share of each token is its probability to within the grid."""
    logits, temperature, rows = np.array([0.3, 2.0, -np.inf, 1.1, 0.9]), 0.7, 20_000
    shares = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    kept, mass = np.zeros(5), 0.0
    for token in np.argsort(-shares):
        if mass < top_p:
            kept[token] = shares[token]
            mass += shares[token]
    draw = DrawnToken([Grid(row / rows) for row in range(rows)], 1, temperature, top_p)
    left = draw(torch.zeros(rows, 1), torch.tensor(logits).expand(rows, -1))
    assert (left.isfinite().sum(dim=1) == 1).all()
    found = np.bincount(left.argmax(dim=1).numpy(), minlength=5) / rows
    assert np.abs(found - kept / mass).max() <= 1 / rows + 1e-12
    assert found[2] == 0
    assert (found > 0).sum() == (4 if top_p == 1 else 1 + (shares.max() < top_p))


def test_temperature_and_top_p_reach_the_draw(tiny):
    """Near temperature 0, and in a nucleus of one token, the stream decides nothing."""

    def sample(**given):
        return generate_responses(*tiny, PROMPTS, IMAGES, max_new_tokens=NEW_TOKENS, streams=streams(1), **given)

    greedy = generate_responses(*tiny, PROMPTS, IMAGES, max_new_tokens=NEW_TOKENS)
    assert sample(temperature=1e-4) == sample(temperature=2.0, top_p=1e-6) == greedy
    assert sample(temperature=2.0) != greedy


def test_the_checkpoints_own_sampling_defaults_play_no_part(tiny):
    model, processor = tiny
    before = generate_responses(model, processor, PROMPTS, IMAGES, max_new_tokens=NEW_TOKENS)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    try:
        assert generate_responses(model, processor, PROMPTS, IMAGES, max_new_tokens=NEW_TOKENS) == before
    finally:
        model.generation_config.repetition_penalty = None
        model.generation_config.do_sample = None


def test_training_mode_is_restored(tiny):
    model, processor = tiny
    model.train()
    try:
        generate_responses(model, processor, PROMPTS[:1], IMAGES[:1], max_new_tokens=1)
        assert model.training
    finally:
        model.eval()


def test_models_that_cannot_be_loaded(small_model, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path / "gone"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="no vision tower"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="device"):
        load_model(small_model, device="nonsense")
