"""LoRA from the command line: train, resume, evaluate, inspect, export; QLoRA's configuration; what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from cppo.assets import adapter_base, resolve_model
from cppo.cli.main import main
from cppo.data import chat_messages, load_records
from cppo.errors import UserError
from cppo.evaluation import load_processor, prompt_inputs
from cppo.options import RunOptions
from cppo.recipes import load_recipe
from cppo.runs.adapters import adapter_arguments, language_model_layers

DATA = ["--data", "tasks:digits?n=12"]
SIZES = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "12"]
SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "5", "--logging_steps", "1"]
LORA = ["--use_peft", "--lora_r", "2", "--learning_rate", "0.01", "--warmup_steps", "0", "--perception_gate", "none"]


def status(folder, *options):
    argv = ["train", "--config", "micro", "--output_dir", str(folder), *DATA, *SIZES, *SAVING, *LORA, *options]
    return main([*argv, "--eval_strategy", "no", "--final_eval_samples", "0", "--load_best_model_at_end", "false"])


def train(folder, *options):
    assert status(folder, *options) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    train(folder, "--max_steps", "2")
    return folder


def logits_of(model):
    (record,) = load_records("tasks:digits", split="test", limit=1)
    inputs = prompt_inputs(load_processor("micro"), [chat_messages(record.prompt)], [record.images])
    with torch.no_grad():
        return model(**inputs).logits


def test_a_run_leaves_an_adapter_of_micro(run):
    assert adapter_base(str(run)) == adapter_base(str(run / "checkpoint-1")) == "micro"
    assert not (run / "model.safetensors").exists()
    assert "use_peft: true\nlora_r: 2\n" in (run / "config.yaml").read_text()
    weights = load_file(run / "adapter_model.safetensors")
    assert all(".language_model." in name for name in weights)
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)


def test_resumed_from_a_checkpoint_it_ends_the_same(run, tmp_path):
    train(tmp_path / "resumed", "--max_steps", "2", "--resume_from_checkpoint", str(run / "checkpoint-1"))
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "resumed", run))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_other_commands_take_the_adapter(run, tmp_path):
    figures = []
    assert main(["export", "--model", str(run), "--out", str(tmp_path / "plain")]) == 0
    for model in (run, tmp_path / "plain"):
        file = tmp_path / "result.json"
        command = ["eval", "--model", str(model), "--data", "tasks:digits?noise=150", "--limit", "16"]
        assert main([*command, "--max_new_tokens", "12", "--json", str(file)]) == 0
        figures.append(json.loads(file.read_text())["accuracy"])
    assert figures[0] == figures[1]
    page = ["--limit", "1", "--max_new_tokens", "12", "--out", str(tmp_path / "page.html")]
    assert main(["inspect", "--model", str(run), "--data", "tasks:digits", *page]) == 0


def test_an_adapter_without_some_of_its_weights_is_refused(run, tmp_path, refused, capsys):
    """Also in a resume: as in a checkpoint of cppo 0.1.0, no manifest tells."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "manifest.json").unlink()
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    commands = [["eval", "--data", "tasks:digits?n=1"], ["export", "--out", tmp_path / "plain"]]
    for argv in commands:
        assert f"lacks {name}: its file is incomplete" in refused(*argv, "--model", checkpoint)
    assert status(tmp_path / "run", "--max_steps", "2", "--resume_from_checkpoint", str(checkpoint)) == 2
    assert f"lacks {name}: its file is incomplete" in capsys.readouterr().err
    file.unlink()
    for argv in commands:
        assert "has no adapter_model.safetensors" in refused(*argv, "--model", checkpoint)


def test_responses_of_an_adapter_belong_to_its_model_too(run, tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(resolve_model("micro"), base)
    shutil.copytree(run, adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    argv = ["eval", "--model", str(adapter), "--data", "tasks:digits", "--limit", "2", "--max_new_tokens", "4"]
    argv += ["--responses", str(tmp_path / "responses.jsonl")]
    assert main(argv) == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert main(argv) == 2
    assert "adapter's model was" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["", "checkpoint-1"])
def test_what_is_exported_is_the_model_with_the_adapter(run, part, tmp_path, capsys):
    out = tmp_path / "new" / "plain"
    assert main(["export", "--model", str(run / part), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"weights    1,419,744, float32\nmodel      {out}\n"
    base = AutoModelForImageTextToText.from_pretrained(resolve_model("micro"))
    plain_logits = logits_of(base)
    expected = logits_of(PeftModel.from_pretrained(base, run / part))
    found = logits_of(AutoModelForImageTextToText.from_pretrained(out))
    assert (found - expected).abs().max() <= 1e-4
    assert (found - plain_logits).abs().max() > 1e-3
    assert type(AutoProcessor.from_pretrained(out)).__name__ == "Qwen2_5_VLProcessor"
    assert not list(out.glob("adapter*"))


def test_a_whole_model_is_exported_in_another_precision(tmp_path):
    assert main(["export", "--model", "micro", "--out", str(tmp_path), "--dtype", "bfloat16"]) == 0
    found = AutoModelForImageTextToText.from_pretrained(tmp_path)
    micro = AutoModelForImageTextToText.from_pretrained(resolve_model("micro"))
    assert found.dtype == torch.bfloat16
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(found.parameters(), micro.parameters(), strict=True))


def test_sft_trains_an_adapter(tmp_path):
    sizes = ["--per_device_train_batch_size", "2", "--max_steps", "1", "--use_cpu", "true", "--bf16", "false"]
    assert main(["sft", "--output_dir", str(tmp_path / "sft"), *DATA, *sizes, "--use_peft"]) == 0
    assert adapter_base(str(tmp_path / "sft")) == "micro"
    assert any(".language_model." in name for name in load_file(tmp_path / "sft" / "adapter_model.safetensors"))


def test_a_rehearsal_counts_the_adapters_weights(capsys, tmp_path):
    argv = ["train", "--config", "micro", *DATA, *SIZES, *LORA, "--max_steps", "3", "--dry_run"]
    argv += ["--output_dir", str(tmp_path / "run")]
    assert main(argv) == 0
    pattern = language_model_layers("micro")
    model = AutoModelForImageTextToText.from_pretrained(resolve_model("micro"))
    layers = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
    trained = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    assert f"{trained:,} of {model.num_parameters() + trained:,} weights trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora_r", "4"], "lora_r = 4 needs use_peft = true"),
        (["--load_in_4bit"], "load_in_4bit = True needs use_peft = true"),
        (["--use_peft", "--load_in_4bit", "--load_in_8bit"], "load_in_4bit and load_in_8bit are both true"),
        (["--use_peft", "--load_in_4bit"], "load_in_4bit needs the package bitsandbytes"),
        (["--use_peft", "--lora_r", "0"], "--lora_r: 0 is outside [1, inf)"),
    ],
)
def test_options_that_do_not_go_together(options, words, tmp_path, refused):
    argv = ["train", "--output_dir", str(tmp_path / "run"), *DATA, *SIZES, *options, "--eval_data", "tasks:digits?n=4"]
    assert words in refused(*argv, "--final_eval_samples", "0")


def test_target_modules_that_the_model_lacks(tmp_path, capsys):
    """Only the loaded model shows it, after the start's lines."""
    argv = ["train", "--output_dir", str(tmp_path / "run"), *DATA, *SIZES, "--final_eval_samples", "0"]
    assert main([*argv, "--use_peft", "--lora_target_modules", "nowhere"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("cppo: error: ")
    assert "Target modules {'nowhere'} not found" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"base_model_name_or_path": "no/where/here"}', "is an adapter of no/where/here: there is no folder"),
        ('{"base_model_name_or_path": null}', "names no model: set its `base_model_name_or_path`"),
        ("[]", "is not the configuration of an adapter"),
        ("{", "is not the configuration of an adapter"),
    ],
)
def test_adapters_without_their_model(text, words, tmp_path, refused):
    (tmp_path / "adapter_config.json").write_text(text)
    assert words in refused("eval", "--model", tmp_path, "--data", "tasks:digits")


def test_an_adapter_is_not_trained_on_as_a_model(run, tmp_path, refused):
    error = refused("train", "--model", run, "--output_dir", tmp_path / "run")
    assert f"is an adapter: `cppo export --model {run} --out DIR`" in error


def test_export_never_writes_over_files(tmp_path, refused):
    (tmp_path / "mine.txt").write_text("mine")
    assert "is not empty" in refused("export", "--model", "micro", "--out", tmp_path)
    error = refused("export", "--model", "micro", "--out", tmp_path / "mine.txt")
    assert "--out: cannot write to" in error
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_qlora_makes_a_configuration(monkeypatch, tmp_path):
    options = RunOptions("tasks:digits", use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True)
    args = TrainingArguments(str(tmp_path), use_cpu=True, bf16=True)
    with pytest.raises(UserError, match="load_in_4bit needs a CUDA GPU"):
        adapter_arguments(options, args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = adapter_arguments(options, args)["quantization_config"]
    assert (found.load_in_4bit, found.load_in_8bit) == (True, False)
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("nf4", True)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16


def test_the_recipe_for_24_gigabytes():
    recipe = load_recipe("train", "lora-24gb", {"model": "micro", "bf16": False, "use_cpu": True})
    assert recipe.options.use_peft
    assert recipe.options.max_pixels == 401408
    assert recipe.config["per_device_train_batch_size"] * recipe.config["gradient_accumulation_steps"] == 64 * 5
    assert adapter_arguments(recipe.options, TrainingArguments("x", use_cpu=True))["peft_config"].r == 32
    assert Path(recipe.output_dir).name == "lora-24gb"
