"""A run whose responses cannot have the required form reports it: before it, after its first steps, in its report."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cppo.assets import resolve_model
from cppo.cli.main import main
from cppo.evaluation import load_processor
from cppo.reports.run_data import read_run
from cppo.reports.signs import run_warnings

SIZES = ["--per_device_train_batch_size", "4", "--num_generations", "2", "--max_completion_length", "8"]
RUN = ["--max_steps", "3", "--final_eval_samples", "0", "--probe_steps", "0", "--save_strategy", "no", *SIZES]
RUN += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--overwrite", "true"]
ASKS = "Think within <think> </think> and answer in \\boxed{}."


@pytest.fixture
def rows(tmp_path):
    """A file of rows without instructions; the question ends with the given text."""

    def write(text=""):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
        lines = [{"prompt": f"How many, {n}? {text}".strip(), "images": ["a.png"], "answer": "1"} for n in range(8)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / "rows.jsonl")

    return write


def variant(folder, template=lambda text: text, special=()):
    """A copy of the micro model with another chat template, or with tags as special tokens."""
    shutil.copytree(resolve_model("micro"), folder)
    file = folder / "chat_template.jinja"
    file.write_text(template(file.read_text()))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = load_processor("micro").tokenizer
    like = dict(next(token for token in tokenizer["added_tokens"] if token["special"]))
    for tag in special:
        (number,) = vocabulary(tag, add_special_tokens=False)["input_ids"]
        tokenizer["added_tokens"].append({**like, "id": number, "content": tag})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


@pytest.fixture(scope="module")
def reader(small_model, tmp_path_factory):
    """The untrained model with a tokenizer that spells `\\boxed{` in pieces, as those of large models do."""
    folder = shutil.copytree(small_model, tmp_path_factory.mktemp("reader") / "model")
    file = folder / "tokenizer.json"
    text, mark = file.read_text(), json.dumps("| ?\\\\boxed\\{")[1:-1]
    assert text.count(mark) == 1
    file.write_text(text.replace(mark, ""))
    return str(folder)


def opening(text):
    return text.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>")


def train(model, data, folder, capsys, *options):
    argv = ["train", "--model", model, "--data", data, "--output_dir", str(folder), *RUN, *options]
    capsys.readouterr()
    assert main(argv) == 0
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "warning: the rewards look for" in line or " 0 % in the first" in line]


def test_nobody_asks(reader, rows, tmp_path, capsys):
    before, after = train(reader, rows(), tmp_path / "run", capsys)
    assert before.startswith("cppo: warning: the rewards look for <think> and \\boxed{}, but no prompt asks for")
    assert after.startswith("cppo: warning: format 0 % in the first 3 steps: no prompt asks for `<think>`")
    assert "ask for it with system_prompt or prompt_suffix" in after
    (told,) = [text for text in run_warnings(read_run(tmp_path / "run")) if text.startswith("Format 0 %")]
    assert "no prompt asks for `<think>` and `\\boxed{}`" in told
    assert "Format 0 %" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("how", ["question", "system_prompt", "prompt_suffix"])
def test_every_command_reports_what_the_model_does(reader, rows, tmp_path, capsys, how):
    options = [] if how == "question" else [f"--{how}", ASKS]
    (after,) = train(reader, rows(ASKS if how == "question" else ""), tmp_path / "run", capsys, *options)
    assert "format 0 % in the first 3 steps: prompts ask for `<think>` and `\\boxed{}`, but no response has it" in after


def test_a_plan_reports_it_too(reader, rows, tmp_path, capsys):
    before, after = train(reader, rows(), tmp_path / "run", capsys, "--dry_run")
    assert "no prompt asks for" in before
    assert "format 0 % in the first 3 steps" in after
    assert not (tmp_path / "run").exists()


def test_only_answers_are_rewarded(reader, rows, tmp_path, capsys):
    before, after = train(reader, rows(), tmp_path / "run", capsys, "--rewards", "accuracy", "--reward_weights", "1")
    assert before.endswith(
        "look for \\boxed{}, but no prompt asks for `\\boxed{}`: ask for it with system_prompt or prompt_suffix"
    )
    assert after.startswith("cppo: warning: accuracy 0 % in the first 3 steps: no prompt asks for `\\boxed{}`")


def test_a_model_that_was_taught_the_form_is_left_alone(tmp_path, capsys):
    assert train("micro", "tasks:digits?n=8", tmp_path / "run", capsys, "--max_completion_length", "60") == []


def test_a_tokenizer_made_for_the_form_needs_no_prompt_that_asks(small_model, rows, tmp_path, capsys):
    (after,) = train(small_model, rows(), tmp_path / "run", capsys)
    assert "format 0 % in the first 3 steps: no response has `<think>` and `\\boxed{}`: teach the form" in after


def test_an_opened_tag_counts_in_training_and_evaluation(tmp_path, capsys):
    model = variant(tmp_path / "opens", opening)
    assert train(model, "tasks:digits?n=8", tmp_path / "run", capsys, "--max_completion_length", "60") == []
    (last,) = read_run(tmp_path / "run").series("rewards/format_reward/mean")[-1:]
    assert last[1] > 0.5
    capsys.readouterr()
    assert main(["eval", "--model", model, "--data", "tasks:digits", "--limit", "8", "--max_new_tokens", "60"]) == 0
    captured = capsys.readouterr()
    assert "format     100.0 %" in captured.out
    assert "warning" not in captured.err


def test_special_tokens_are_reported_in_run_and_evaluation(tmp_path, capsys):
    model = variant(tmp_path / "special", special=("<think>", "</think>"))
    before, after = train(model, "tasks:digits?n=8", tmp_path / "run", capsys, "--max_completion_length", "60")
    assert 'decoding drops `<think>` and `</think>` as special tokens: set "special": false' in before
    assert "format 0 % in the first 3 steps: decoding drops `<think>`" in after
    file = tmp_path / "figures.json"
    argv = ["eval", "--model", model, "--data", "tasks:digits", "--limit", "8", "--max_new_tokens", "60"]
    assert main([*argv, "--json", str(file)]) == 0
    captured = capsys.readouterr()
    assert "cppo: warning: format 0 %: decoding drops `<think>` and `</think>` as special tokens" in captured.err
    assert "decoding drops" in json.loads(file.read_text())["format_warning"]


def test_what_later_steps_earn_takes_the_warning_off_the_report(reader, rows, tmp_path, capsys):
    train(reader, rows(), tmp_path / "run", capsys)
    file = Path(tmp_path / "run" / "metrics.jsonl")
    with file.open("a") as stream:
        stream.write(json.dumps({"step": 4, "rewards/format_reward/mean": 0.5}) + "\n")
    assert not [text for text in run_warnings(read_run(tmp_path / "run")) if text.startswith("Format 0 %")]
