import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM, TrainerCallback

from cppo.data import load_records
from cppo.errors import UserError
from cppo.options import RunOptions
from cppo.runs.sft import sft_config, sft_dataset, sft_trainer

CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
}


@pytest.fixture
def rows_file(tmp_path):
    """Two pictures with answers that differ, and a row of text only."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    Image.new("RGB", (96, 64), "blue").save(tmp_path / "blue.png")
    rows = [
        {"prompt": "Colour?", "images": ["red.png"], "answer": "red", "response": "\\boxed{red}"},
        {"prompt": "And which colour is this?", "images": ["blue.png"], "answer": "blue", "response": "\\boxed{blue}"},
        {"prompt": "1 + 1?", "images": [], "answer": "2", "response": "1 + 1 = 2 so \\boxed{2}"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class EvalLoss(TrainerCallback):
    """Records the trainer's evaluation losses."""

    def __init__(self):
        self.losses = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.append(metrics["eval_loss"])


def response_loss(folder, records):
    """Mean negative log-likelihood (float64) of the response tokens, row by row, from hand-written chat text."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    total, count = 0.0, 0
    for record in records:
        image = "<|vision_start|><|image_pad|><|vision_end|>" * len(record.images)
        start = f"<|im_start|>user\n{image}{record.prompt}<|im_end|>\n<|im_start|>assistant\n"
        text = f"{start}{record.response}<|im_end|>\n"
        images = [list(record.images)] if record.images else None
        whole = processor(text=[text], images=images, return_tensors="pt")
        prompt_length = processor(text=[start], images=images, return_tensors="pt")["input_ids"].shape[1]
        with torch.no_grad():
            logps = model(**whole).logits[0].double().log_softmax(-1)
        for position in range(prompt_length, whole["input_ids"].shape[1]):
            total -= float(logps[position - 1, whole["input_ids"][0, position]])
            count += 1
    return total / count


def run_sft(model, data, folder, resume=None, **how):
    trainer = sft_trainer(str(model), data, str(folder), **how)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return folder


def test_the_loss_is_that_of_the_response_tokens_alone(small_model, rows_file, tmp_path):
    recorder = EvalLoss()
    args = {**CPU, "max_steps": 1, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    records = load_records(str(rows_file))
    run_sft(small_model, records, tmp_path / "out", eval_data=records, sft_args=args, callbacks=[recorder])
    assert recorder.losses == pytest.approx([response_loss(small_model, records)], rel=1e-4)


def test_training_learns_the_responses_and_saves_a_model_that_loads(small_model, rows_file, tmp_path):
    out = tmp_path / "out"
    args = {**CPU, "max_steps": 40, "learning_rate": 1e-2, "per_device_train_batch_size": 3}
    records = load_records(str(rows_file))
    run_sft(small_model, records, out, sft_args=args)
    assert response_loss(out, records) < 0.2 * response_loss(small_model, records)
    assert AutoProcessor.from_pretrained(out).chat_template == AutoProcessor.from_pretrained(small_model).chat_template


def test_same_seed_same_weights(small_model, tmp_path):
    args = {**CPU, "max_steps": 2, "per_device_train_batch_size": 4}
    data = load_records("tasks:digits?n=16&noise=25")
    assert_same_weights(*(run_sft(small_model, data, tmp_path / name, sft_args=args) for name in ("a", "b")))


@pytest.mark.parametrize("best", [False, True])
def test_a_resumed_run_ends_as_the_uninterrupted_one(small_model, tmp_path, best):
    """In this family, `Trainer` alone loads no weight, because the file names them differently than the model.

    Every evaluation is worse than the first here, so the first checkpoint is the best.
    """
    data = load_records("tasks:digits?n=16&noise=25")
    args = {**CPU, "max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    if best:
        args |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 10.0}
    whole = run_sft(small_model, data, tmp_path / "whole", eval_data=data, sft_args=args)
    if best:
        assert_same_weights(whole, whole / "checkpoint-1")
    resumed = run_sft(
        small_model, data, tmp_path / "resumed", resume=str(whole / "checkpoint-1"), eval_data=data, sft_args=args
    )
    assert_same_weights(whole, resumed)


def assert_same_weights(*folders):
    first, second = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_are_prompt_completion_with_images():
    row = sft_dataset(load_records("tasks:shapes?n=3"))[1]
    record = load_records("tasks:shapes?n=3")[1]
    assert row["prompt"] == [{"role": "user", "content": record.prompt}]
    assert row["completion"] == [{"role": "assistant", "content": record.response}]
    assert [image.tobytes() for image in row["images"]] == [record.images[0].tobytes()]


def test_a_system_prompt_is_added_to_rows_without_one(small_model, tmp_path):
    options = RunOptions("tasks:shapes?n=3", system_prompt="Look closely.")
    trainer = sft_trainer(small_model, load_records(options.data), str(tmp_path), sft_args=CPU, options=options)
    assert [message["role"] for message in trainer.train_dataset[1]["prompt"]] == ["system", "user"]
    assert trainer.train_dataset[1]["prompt"][0]["content"] == "Look closely."


def test_columns_are_mapped(small_model, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"question": "1 + 1?", "answer": "2", "solution": "\\boxed{2}"}) + "\n")
    columns = {"prompt": "question", "response": "solution"}
    args = {**CPU, "max_steps": 1}
    run_sft(small_model, load_records(str(file), columns=columns), tmp_path / "out", sft_args=args)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_data_without_responses_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl.*`response`"):
        run_sft("micro", load_records(str(file)), tmp_path / "out", sft_args=CPU)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"lr_scheduler_type": "sideways"}, "sideways"),
    ],
)
def test_refused_options_are_named(tmp_path, args, message):
    with pytest.raises(UserError, match=message) as caught:
        sft_config(str(tmp_path), {**CPU, **args})
    assert "\n" not in str(caught.value)


def test_a_model_that_is_missing_or_blind_is_refused(small_model, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        run_sft(tmp_path / "nowhere", load_records("tasks:digits?n=4"), tmp_path / "out", sft_args=CPU)
    blind = tmp_path / "blind"
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(blind)
    AutoProcessor.from_pretrained(small_model).tokenizer.save_pretrained(blind)
    with pytest.raises(UserError, match="blind"):
        run_sft(blind, load_records("tasks:digits?n=4"), tmp_path / "out", sft_args=CPU)
