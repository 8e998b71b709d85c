"""`cppo plan`: a table from a configuration alone, or one line that says what is wrong; what we name fits by it."""

import json
import re
from pathlib import Path

import pytest
from published_shapes import SEVEN_B, THREE_B

from cppo.assets import MICRO_DIR
from cppo.cli.fields import parse_recipe
from cppo.cli.main import main
from cppo.recipes import load_recipe, recipe_names
from cppo.runs.memory_plan import RESERVE, need
from cppo.runs.memory_work import DDP, FSDP2, LORA, ZERO3
from cppo.runs.model_shapes import read_shapes
from cppo.runs.recipe_plan import recipe_work

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
        (["--memory", "0.001"], "micro does not fit in 0.001 GiB on each of 2 GPUs, even with one rollout at a time"),
        (["--image_tokens", "40"], "--image_tokens 40 leaves no text in a prompt of 40 tokens"),
        (["--micro_batch", "41"], "--micro_batch 41: each GPU has 40 rollouts in a step: give at most that many"),
        (["--method", "gpro"], "method = 'gpro': did you mean"),
        (["--gpus", "0"], "argument --gpus: expected a whole number in [1, inf)"),
        (["--memory", "-1"], "argument --memory: expected a number in (0, inf)"),
        (["--memory", "nan"], "argument --memory: expected a number in (0, inf)"),
        (["--json", "no/such/folder/plan.json"], "--json: cannot write"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *SIZES, *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told


CONFIG = json.loads((MICRO_DIR / "config.json").read_text())


def changed(part, field, value):
    return {**CONFIG, part: {**CONFIG[part], field: value}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "has no vision tower"),
        ({"model_type": "llama"}, "has no vision tower"),
        ({"model_type": "no_such", "vision_config": {}}, "transformers cannot build a model from"),
        ({"vision_config": {}}, "transformers cannot build a model from"),
        ({"model_type": "qwen3_vl_moe", "text_config": {"num_experts": 8}, "vision_config": {}}, "mixture of experts"),
        (changed("text_config", "hidden_size", float("nan")), "expected int, got float (value: nan)"),
        (changed("text_config", "hidden_size", -64), "negative dimension"),
        (changed("text_config", "hidden_size", 10**11), "transformers cannot build a model from"),
        (changed("vision_config", "hidden_size", "wide"), "Field 'hidden_size' expected int, got str"),
        (changed("vision_config", "depth", 10**9), "has depth = 1e+09; the limit is 1000"),
        (changed("text_config", "num_hidden_layers", float("inf")), "has num_hidden_layers = inf; the limit is 1000"),
        (changed("text_config", "num_attention_heads", 0), "transformers cannot build a model from"),
        ({"model_type": "x", "vision_config": {}, "auto_map": {"AutoConfig": "own.Own"}}, "contains custom code"),
    ],
)
def test_a_configuration_without_sizes_is_one_line(config, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--model", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert len(shown.err) < 600


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Sizes of the models that recipes name."""
    found = {}
    for size, config in (("3B", THREE_B), ("7B", SEVEN_B)):
        folder = tmp_path_factory.mktemp(size)
        config.save_pretrained(folder)
        found[f"Qwen/Qwen2.5-VL-{size}-Instruct"] = read_shapes(str(folder))
    return found


MACHINES = {
    "cppo-paper-geometry3k": (16, 80),
    "cppo-7b-geometry3k": (16, 80),
    "few-rows": (1, 24),
    "lora-24gb": (1, 24),
    "vllm-server": (4, 80),
}
"""GPUs and the GiB of each that a recipe names, where they are not 8 of 80."""


def taken(recipe, shapes, way, gpus):
    """GiB of each GPU, reserve apart: in the update, and while rollouts are made, vLLM's own share included."""
    found = need(shapes, way, recipe_work(recipe, gpus))
    config = recipe.config
    colocated = config.get("use_vllm") and config["vllm_mode"] == "colocate"
    share = config["vllm_gpu_memory_utilization"] if colocated else 0
    return found.update / 2**30, found.rollouts / 2**30, 1 - RESERVE - share


LARGE = ("cppo-", "few-", "lora-", "vllm-")


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith(LARGE)])
def test_recipes_of_large_models_fit_the_machines_they_name(name, published):
    recipe = load_recipe("train", name, {"data": "my.jsonl"} if name == "few-rows" else None)
    gpus, memory = MACHINES.get(name, (8, 80))
    way = LORA if recipe.options.use_peft else FSDP2
    update, rollouts, free = taken(recipe, published[recipe.options.model], way, gpus)
    assert update <= memory * (1 - RESERVE)
    assert rollouts <= memory * free


COMMANDS = re.findall(
    r"^(?:CUDA_VISIBLE_DEVICES=\S+ )?((?:accelerate launch|torchrun) .*)$",
    (Path(__file__).parents[2] / "docs" / "scale" / "scaling.md").read_text(),
    flags=re.MULTILINE,
)
LAUNCHES = {"1gpu": (DDP, 1), "8gpu-fsdp2": (FSDP2, 8), "8gpu-zero3": (ZERO3, 8), "2nodes-fsdp2": (FSDP2, 16)}


@pytest.mark.parametrize("command", [one for one in COMMANDS if "cppo train --config" in one])
def test_the_commands_of_the_page_fit_gpus_of_80_gb(command, published):
    launch, _, options = command.partition("cppo train ")
    configuration = re.search(r"--config_file (\S+)\.yaml", launch)
    way, gpus = LAUNCHES[configuration.group(1)] if configuration else (DDP, 1)
    if number := re.search(r"--(?:num_processes|nproc_per_node) (\d+)", launch):
        gpus = int(number.group(1))
    recipe = parse_recipe("train", options.split(), default_recipe="micro", description="")
    way = LORA if recipe.options.use_peft else way
    update, rollouts, free = taken(recipe, published[recipe.options.model], way, gpus)
    assert update <= 80 * (1 - RESERVE)
    assert rollouts <= 80 * free


@pytest.mark.parametrize("micro_batch", ["2", "40"])
def test_a_micro_batch_that_is_too_large_leaves_the_generation_slice(micro_batch, capsys):
    """The reference would score it while rollouts are made; a micro-batch that fits is what counts."""
    long = [*SIZES, "--memory", "0.2", "--response_tokens", "3000"]
    assert main(["plan", *long, "--micro_batch", micro_batch]) == 0
    shown = capsys.readouterr().out
    assert figures(shown, "micro batch, at most") == ["1", "2", "1", "2", "of", "40"]
    assert figures(shown, "generation slice, at most") == ["26", "28", "18", "29", "of", "320"]


def test_rollouts_by_vllm_are_not_counted(capsys):
    assert main(["plan", *SIZES, "--config", "vllm-colocate"]) == 0
    shown = capsys.readouterr().out
    assert "rollouts by vLLM; its memory is not counted" in shown
    assert figures(shown, "keys and values") == ["0.0"] * 4
    assert "generation slice" not in shown


def test_a_configuration_of_another_name_is_named(tmp_path, refused):
    (tmp_path / "mine.json").write_text((MICRO_DIR / "config.json").read_text())
    assert "is not named config.json" in refused("plan", "--model", str(tmp_path / "mine.json"))
