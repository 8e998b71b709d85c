"""`cppo plan`: a table from a configuration alone, or one line that says what is wrong."""

import json

import pytest

from cppo.assets import MICRO_DIR
from cppo.cli.main import main

SIZES = ["--model", "micro", "--gpus", "2", "--memory", "24", "--prompt_tokens", "40", "--response_tokens", "30"]


def figures(text: str, row: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(row)]
    return line.removeprefix(row).split()


def test_a_plan_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", *SIZES, "--image_tokens", "16", "--lora_r", "8", "--json", str(file)]) == 0
    shown, written = capsys.readouterr().out, json.loads(file.read_text())
    assert list(written["bytes"]) == ["DDP", "FSDP2", "ZeRO-3", "LoRA"]
    work = written["work"]
    assert (work["gpus"], work["prompt_tokens"], work["image_tokens"], work["response_tokens"]) == (2, 40, 16, 30)
    assert (work["lora_r"], work["views"], work["num_generations"], work["micro_batch"]) == (8, 2, 5, 5)
    for counts in written["bytes"].values():
        lasting = counts["weights"] + counts["optimizer"] + counts["reference"] + counts["buffers"]
        update = lasting + counts["gradients"] + counts["pixels"] + counts["activations"]
        assert counts["update"] == update
        made = max(counts["keys_and_values"] + counts["generation"], counts["scoring"])
        assert counts["rollouts"] == lasting + made
        assert counts["fits"] == {"micro_batch": 40, "generation_slice": 320}
    assert figures(shown, "micro batch, at most") == ["40"] * 4 + ["of", "40"]
    assert "no measurement" in shown


def test_the_configuration_alone_is_enough(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text((MICRO_DIR / "config.json").read_text())
    outputs = []
    for name in ("micro", str(tmp_path), str(config)):
        assert main(["plan", *SIZES, "--model", name]) == 0
        outputs.append(capsys.readouterr().out.replace(name, "micro"))
    assert outputs[0] == outputs[1] == outputs[2]


def test_recipe_and_method_say_what_is_not_given(tmp_path, capsys):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("extends: cppo-3b\nbeta: 0\nper_device_train_batch_size: 10\nmax_completion_length: 20\n")
    assert main(["plan", "--model", "micro", "--config", str(recipe), "--method", "grpo"]) == 0
    shown = capsys.readouterr().out
    assert "rollouts of 512 + 20 tokens (384 of an image), 0 views, micro-batch 10, generation slice 40" in shown
    assert figures(shown, "reference model") == ["0.0"] * 4


def test_own_functions_say_how_many_views_they_take(tmp_path, capsys):
    own, recipe = tmp_path / "own.py", tmp_path / "own.yaml"
    declared = "from cppo.perception import advantage_shaping\n@advantage_shaping\n"
    own.write_text(f"{declared}def halved(scores, advantages, options):\n    return advantages / 2\n")
    recipe.write_text(f"extends: cppo-3b\nperception_sink: {own}:halved\nperception_gate: none\n")
    assert main(["plan", *SIZES, "--config", str(recipe)]) == 0
    assert "tokens (30 of an image), 1 views" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model"], "model: "),
        (["--memory", "0.001"], "micro does not fit in 0.001 GiB on each of 2 GPUs, not even one rollout at a time"),
        (["--image_tokens", "40"], "--image_tokens 40 leaves no text in a prompt of 40 tokens"),
        (["--method", "gpro"], "method = 'gpro': did you mean"),
        (["--gpus", "0"], "argument --gpus: expected a whole number in [1, inf)"),
        (["--json", "no/such/folder/plan.json"], "--json: cannot write"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *SIZES, *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "has no vision tower"),
        ({"model_type": "no_such", "vision_config": {}}, "transformers makes no model of"),
        ({"vision_config": {}}, "transformers makes no model of"),
        ({"model_type": "qwen2_5_vl", "vision_config": {"hidden_size": "wide"}}, "transformers makes no model of"),
    ],
)
def test_a_configuration_without_sizes_is_one_line(config, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--model", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
