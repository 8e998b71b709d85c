"""A model's own marks in texts: which they are in each family, and every command refuses them in one line."""

import json

import pytest
import transformers.models.smolvlm.processing_smolvlm as smol
from PIL import Image
from tiny_families import FAMILIES, build_family, build_processor

from cppo.cli.main import main
from cppo.data import load_records, load_rows
from cppo.errors import UserError
from cppo.evaluation import check_marks, marked_rows, prompt_inputs
from cppo.evaluation.readable import own_marks

PICTURE = Image.new("RGB", (64, 64), "red")


@pytest.fixture(autouse=True)
def _without_num2words(monkeypatch):
    monkeypatch.setattr(smol, "num2words", str)


def image_tokens(processor, text):
    """Number of image tokens in the processor's output for a question with one image."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    ids = prompt_inputs(processor, [[{"role": "user", "content": content}]], [[PICTURE]])["input_ids"][0]
    own = {processor.image_token_id, getattr(processor.tokenizer, "image_token_id", None)}
    return sum(token in own for token in ids.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_that_upsets_the_processor_is_found(family):
    """Special tokens of all families in a question: a mark fails, or changes the number of image tokens."""
    processor = build_processor(family)
    marks, expected = own_marks(processor), image_tokens(processor, "what is it")
    every = {token for parts in FAMILIES.values() for token in (*parts.special.values(), *parts.tokens.values())}
    upset = set()
    for token in sorted(every | set(processor.tokenizer.all_special_tokens)):
        try:
            unlike = image_tokens(processor, f"what is {token} it") != expected
        except Exception:
            unlike = True
        if unlike:
            upset.add(token)
    assert processor.image_token in upset | set(marks)
    assert upset <= set(marks)


@pytest.mark.parametrize(
    ("family", "mark"),
    [
        ("internvl", "<IMG_CONTEXT>"),
        ("llava", "<image>"),
        ("gemma3", "<start_of_image>"),
        ("gemma3", "<image_soft_token>"),
        ("smolvlm", "<image>"),
        ("llava_onevision", "<video>"),
    ],
)
def test_rows_and_options_with_a_mark_are_named(family, mark):
    processor = build_processor(family)
    part = [{"type": "image"}, {"type": "text", "text": f"What does {mark} mean?"}]
    prompts = ["What is it?", [{"role": "user", "content": part}], "How many?"]
    if mark != "<video>":  # the readers refuse it for every model
        source = load_rows([{"prompt": prompt, "answer": "a", "image": PICTURE} for prompt in prompts])
        assert marked_rows(source, processor) == [(1, mark)]
        with pytest.raises(UserError, match=f"^rows row 2: its text holds {mark}, "):
            check_marks(processor, [None, source])
    for name in ("system_prompt", "prompt_suffix"):
        with pytest.raises(UserError, match=f"^{name}: it holds {mark}, "):
            check_marks(processor, [], **{name: f"See {mark} first"})
    check_marks(processor, [load_rows([{"prompt": "<other> 1 < 2 | 3 > 2", "answer": "a"}])], system_prompt="Look.")


def test_marks_in_system_messages_and_responses():
    processor = build_processor("internvl")
    chat = [{"role": "system", "content": "See <IMG_CONTEXT>."}, {"role": "user", "content": "q"}]
    rows = [{"prompt": chat, "answer": "a"}, {"prompt": "q", "answer": "a", "response": "<IMG_CONTEXT>"}]
    assert marked_rows(load_rows(rows), processor) == [(0, "<IMG_CONTEXT>"), (1, "<IMG_CONTEXT>")]
    assert marked_rows(load_records("tasks:digits?n=3"), processor) == []


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    return build_family("internvl", tmp_path_factory.mktemp("internvl"))


def test_every_command_refuses_them_in_one_line(internvl, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("a.png")
    rows = [{"prompt": f"what does <IMG_CONTEXT> mean {n}", "images": ["a.png"], "answer": "3"} for n in range(4)]
    with open("mark.jsonl", "w") as file:
        file.writelines(json.dumps({**row, "response": "three"}) + "\n" for row in rows)
    train = ["--use_cpu", "true", "--bf16", "false", "--max_steps", "1", "--per_device_train_batch_size", "4"]
    asked = ["--model", internvl, "--data", "mark.jsonl"]
    for command in (
        ["train", *asked, *train, "--num_generations", "2", "--max_completion_length", "4", "--output_dir", "run"],
        ["train", *asked, *train, "--num_generations", "2", "--max_completion_length", "4", "--dry_run"],
        ["sft", *asked, *train, "--output_dir", "sft"],
        ["eval", *asked, "--max_new_tokens", "2"],
        ["inspect", *asked, "--out", "page.html"],
    ):
        assert "mark.jsonl line 1: its text holds <IMG_CONTEXT>" in refused(*command), command


def test_data_check_names_them(internvl, tmp_path, capsys):
    rows = [{"prompt": "what is it", "answer": "3"}, {"prompt": "what is <IMG_CONTEXT>", "answer": "3"}]
    (tmp_path / "mark.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(tmp_path / "mark.jsonl"), "--model", internvl]) == 1
    printed = capsys.readouterr().out
    assert (
        f"bad row  {tmp_path / 'mark.jsonl'} line 2: its text holds <IMG_CONTEXT>, a mark of the model's own" in printed
    )
    assert "rows        2, 1 usable, 1 bad (50.0 %)" in printed
