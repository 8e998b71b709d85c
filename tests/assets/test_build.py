import json

import pytest
import torch
from PIL import Image
from small_model import SMALL
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from cppo.assets import resolve_model
from cppo.assets.__main__ import main
from cppo.assets.build import SPECIAL_TOKENS, build_micro, build_tokenizer

TWO_LAYERS = {**SMALL, "vision_layers": 2}
TEXTS = ["What is the sum of the top row?", "<think> I see 3 and 5. 3 + 5 = 8. </think> \\boxed{8}"]


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_same_seed_same_weights_and_the_global_random_state_is_untouched(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights(build_micro(tmp_path / "a", seed=1, texts=TEXTS, **TWO_LAYERS))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = weights(build_micro(tmp_path / "b", seed=1, texts=TEXTS, **TWO_LAYERS))
    other = weights(build_micro(tmp_path / "c", seed=2, texts=TEXTS, **TWO_LAYERS))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], other[name])


def test_overrides_shape_the_model(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(build_micro(tmp_path, texts=TEXTS, **TWO_LAYERS))
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert model.config.text_config.hidden_size == 32
    assert len(model.model.visual.blocks) == 2
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_an_unknown_override_is_refused(tmp_path):
    with pytest.raises(TypeError, match="text_width"):
        build_micro(tmp_path, texts=TEXTS, text_width=3)


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (300, 20), (640, 480), (96, 64)])
def test_images_of_any_size_yield_the_grids_tokens_and_run(tmp_path, size):
    folder = build_micro(tmp_path, texts=TEXTS, **TWO_LAYERS)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text = "<|vision_start|><|image_pad|><|vision_end|>hi"
    batch = processor(images=[[Image.new("RGB", size)]], text=[text], return_tensors="pt")
    _, rows, columns = batch["image_grid_thw"][0].tolist()
    assert rows * columns * 64 <= 128 * 128
    image_tokens = int((batch["input_ids"] == model.config.image_token_id).sum())
    assert image_tokens == rows * columns // 4
    assert torch.isfinite(model(**batch).logits).all()
    if size == (64, 64):
        assert (rows, columns) == (8, 8)


def test_at_64_pixels_every_vision_layer_attends_to_the_whole_image(tmp_path):
    folder = build_micro(tmp_path, texts=TEXTS, **TWO_LAYERS)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    pixels = processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")
    far = pixels["pixel_values"].clone()
    far[-1] += 1.0  # the last patch, bottom right
    visual = model.model.visual
    visual.blocks = visual.blocks[:1]  # the first layer is a windowed one
    plain, changed = (visual(x, grid_thw=pixels["image_grid_thw"]).pooler_output for x in (pixels["pixel_values"], far))
    assert (plain[0] - changed[0]).abs().max() > 1e-6  # the first image token, top left


def test_any_text_survives_the_tokenizer_and_digits_stay_apart():
    tokenizer = build_tokenizer(TEXTS * 5, vocab_size=320)
    for text in ("12 + 345 = 357", "Grüße, 漢字 🙂\n\ttab", "<think> a </think> \\boxed{7}", " 10%", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [token.strip("Ġ") for token in tokenizer.tokenize("345 12") if token != "Ġ"] == list("34512")
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(SPECIAL_TOKENS)))


def test_chat_template_and_left_padding(tmp_path):
    processor = AutoProcessor.from_pretrained(build_micro(tmp_path, texts=TEXTS, **TWO_LAYERS))
    chat = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    answered = processor.apply_chat_template([*chat, {"role": "assistant", "content": "A cat."}])
    assert answered == text + "A cat.<|im_end|>\n"
    batch = processor(text=["a b c d", "a"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][1].tolist()[0] == 0
    assert batch["attention_mask"][1].tolist()[-1] == 1


def test_module_command_writes_a_loadable_folder(tmp_path, capsys):
    main([str(tmp_path / "model"), "--seed", "3"])
    assert capsys.readouterr().out.strip().endswith("model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]


def test_only_packaged_names_are_resolved():
    assert resolve_model("micro").endswith("micro")
    assert resolve_model("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
