"""`cppo train --dry_run`, and rows that a run leaves out: what is said is counted by hand, nothing is written."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_model import SHORT_RUN, SMALL
from transformers import DynamicCache

from cppo.assets.build import build_micro
from cppo.cli.main import main
from cppo.data import load_records
from cppo.evaluation import load_processor
from cppo.probing import failure
from cppo.recipes import load_recipe
from cppo.reports.run_data import read_run
from cppo.reports.signs import run_warnings
from cppo.runs.dry_run import method_text, rehearse, sharing_text
from cppo.runs.memory_plan import need
from cppo.runs.memory_work import DDP, FSDP2, LORA, ZERO3
from cppo.runs.model_shapes import read_shapes
from cppo.runs.recipe_plan import launched_way, recipe_work
from cppo.runs.rehearsal import BatchNeeds, MemoryParts, PeakMemory, memory_parts
from cppo.runs.sources import load_sources
from cppo.training.trainer import CPPOTrainer

DATA = ["tasks:digits?n=14", "tasks:chart?n=6"]
OPTIONS = {
    **SHORT_RUN,
    "data": DATA,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "final_eval_samples": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    model = build_micro(folder / "model", **SMALL)
    (folder / "tiny.yaml").write_text(
        yaml.safe_dump({"model": str(model), "output_dir": str(folder / "run"), **OPTIONS})
    )
    return folder


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def prompt_tokens(folder):
    """Tokens of each prompt, counted one at a time with the processor alone."""
    processor = load_processor(folder / "model")
    counts = []
    for record in load_records(DATA, split="train"):
        content = [*({"type": "image"} for _ in record.images), {"type": "text", "text": record.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        counts.append(len(processor(text=[text], images=list(record.images))["input_ids"][0]))
    return counts


def test_the_plan(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = snapshot(folder)
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--dry_run"]) == 0
    lines = dict(re.split(r" {2,}| (?=rollout)", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    counts = prompt_tokens(folder)
    assert lines["sharing"] == (
        "micro-batches of 4 rollouts of groups of 2: each prompt and image runs once for at most 2 of them, "
        "2.0 on average"
    )
    assert lines["rows"] == "20 to train on, 0 bad, 0 with other images, 0 too long"
    assert lines["held-out"] == "nothing is answered"
    # 20 rows in batches of 4 prompts, one step each, twice.
    assert lines["steps"] == "10, 2.00 epochs; every 1 share 4 prompts x 2 responses"
    assert lines["tokens"].startswith(f"prompts {sum(counts) / 20:.0f} on average, {max(counts)} at most in 20 rows")
    assert lines["rewards"] == "accuracy_reward x 0.9, format_reward x 0.1"
    assert lines["method"] == "cppo: perception_sink contrast, perception_weight 0.01, views joint"
    padded = "padded SDPA (cpu is not an NVIDIA GPU)"
    tower = "sdpa, one call per window (cpu is not an NVIDIA GPU)"
    assert lines["attention"] == f"packed rows: {padded}, rollouts: sdpa, vision tower: {tower}"
    assert lines["loss"] == "dapo, learning rate 1e-06, scorer shared"
    assert lines["arithmetic one GPU, by `cppo plan`, not measured:"].startswith("rollouts ")
    assert "measured on" not in lines["arithmetic one GPU, by `cppo plan`, not measured:"]
    assert snapshot(folder) == before
    assert not any(tmp_path.iterdir())


def planned(folder, way, gpus=1, prompt=None, image=None):
    """GiB of rollouts and update by the arithmetic, as the plan shows them."""
    recipe = load_recipe("train", str(folder / "tiny.yaml"))
    work = recipe_work(recipe, gpus, prompt or max(prompt_tokens(folder)), image)
    found = need(read_shapes(recipe.options.model), way, work)
    return f"rollouts {found.rollouts / 2**30:.2f} GiB, update {found.update / 2**30:.2f} GiB on each"


@pytest.fixture
def gpu_recipe(folder):
    """The recipe as one for a GPU: in bfloat16."""
    file = folder / "gpu.yaml"
    file.write_text(f"extends: {folder / 'tiny.yaml'}\nuse_cpu: false\nbf16: true\n")
    yield str(file)
    file.unlink()


@pytest.mark.parametrize(
    ("variables", "adapter", "way", "gpus"),
    [
        ({}, False, DDP, 1),
        ({"WORLD_SIZE": "4"}, False, DDP, 4),
        ({"WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true"}, False, FSDP2, 8),
        ({"WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true"}, False, ZERO3, 8),
        ({"WORLD_SIZE": "2"}, True, LORA, 2),
    ],
)
def test_the_launch_says_how_training_is_spread(variables, adapter, way, gpus, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_way(adapter) == (way, gpus)


@pytest.mark.parametrize("way", [DDP, FSDP2])
def test_without_a_gpu_the_plan_is_arithmetic(folder, gpu_recipe, way, capsys, monkeypatch):
    monkeypatch.setattr(CPPOTrainer, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("cppo.runs.dry_run.launched_way", lambda adapter: (way, 4))
    before = snapshot(folder)
    assert main(["train", "--config", gpu_recipe, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"arithmetic {way.name} on 4 GPUs, by `cppo plan`, not measured: {planned(folder, way, 4)}" in shown
    assert "nothing was run, measured" in shown
    assert "rows       20 to train on, 0 bad" in shown
    assert snapshot(folder) == before
    assert main(["train", "--config", gpu_recipe, "--dry_run", "--perception_weight", "-1"]) == 2


def test_on_a_gpu_the_measured_peak_stands_beside_the_arithmetic(folder, capsys, monkeypatch):
    """The rehearsal as on a GPU, whose memory is read from here: 2 GiB while rollouts are made, 3 in the update."""
    reads = iter([2, 3] * 3)
    resets = []

    class Card(PeakMemory):
        on_gpu = True

        def read(self):
            return next(reads) * 2**30

        def reset(self):
            resets.append(len(resets))

    monkeypatch.setattr("cppo.runs.rehearsal.PeakMemory", Card)
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--dry_run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("arithmetic ")]
    assert line.startswith("arithmetic one GPU, by `cppo plan`, not measured: rollouts ")
    assert line.endswith("; measured on this GPU at worst: rollouts 2.00 GiB, update 3.00 GiB")
    assert len(resets) == 1 + 2 * 3  # as memory is entered, and after each phase of three batches


def test_a_gpus_memory_is_what_pytorch_allocated_there(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * len(asked))
    device = torch.device("cuda", 1)
    with PeakMemory(device) as memory:
        assert memory.on_gpu
        assert memory.read() == 7
        memory.reset()
        assert memory.read() == 14
    assert asked == [device, device]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "grpo"}, "no views"),
        ({"method": "cppo", "perception_weight": 0}, "no views"),
        (
            {"method": "papo"},
            "perception_sink divergence, perception_weight 0.02, views scored once a generation batch; "
            "entropy under I- x 0.05",
        ),
        (
            {"method": "dvrp"},
            "perception_sink divergence, perception_weight 0.01, views joint; entropy under I- x 0.05; "
            "entropy under I+ x 0.05",
        ),
        ({"method": "vppo"}, "perception_sink mask_advantage, kept by the tokens of the best k3"),
        ({"method": "noisyrollout"}, "rollouts from diffusion_noise (mix 0.5)"),
    ],
)
def test_the_plan_tells_what_a_method_makes_of_views(options, text):
    assert method_text(load_recipe("train", "micro", options).resolved) == text


def test_memory_that_stays_and_the_worst_batch(folder, monkeypatch):
    batches, trainers = [], []
    generate = CPPOTrainer._generate_and_score_completions

    def watch(trainer, inputs):
        output = generate(trainer, inputs)
        trainers.append(trainer)
        batches.append((output["completion_mask"].sum(dim=1).tolist(), trainer._rewards.tolist()))
        return output

    monkeypatch.setattr(CPPOTrainer, "_generate_and_score_completions", watch)
    # A model that soon ends its response.
    ends = {"sequence_bias": [[[load_processor(folder / "model").tokenizer.eos_token_id], 7.0]]}
    evaluated = {"eval_data": "tasks:digits?n=30", "eval_strategy": "epoch", "eval_limit": 20, "probe_items": 10}
    recipe = load_recipe("train", str(folder / "tiny.yaml"), {"max_steps": 7, "generation_kwargs": ends, **evaluated})
    text = "\n".join(rehearse(recipe, load_sources(recipe)))
    weights = load_file(folder / "model" / "model.safetensors")
    numbers = sum(weight.numel() for weight in weights.values())
    assert f"{numbers:,} of {numbers:,} weights trained, float32 on cpu, 1 process(es)" in text
    assert "steps      7, " in text
    assert "held-out   20 items in each evaluation, 10 items in each probe\n" in text
    memory = memory_parts(trainers[-1], libraries=0)
    # AdamW: two moments a weight and a step count a tensor, all float32.
    assert memory == MemoryParts(0, 4 * numbers, 4 * numbers, 8 * numbers + 4 * len(weights))
    libraries, shown = re.search(r"memory     libraries ([\d,]+) MiB, (.*)", text).groups()
    assert int(libraries.replace(",", "")) > 64
    assert shown == ", ".join(
        f"{name} {getattr(memory, name) / 2**20:.0f} MiB" for name in ("weights", "gradients", "optimizer")
    )
    _, (as_answered, _), (lengths, rewards) = batches
    assert min(as_answered) < 8
    assert lengths == [8] * 8
    assert rewards == [[0.0, 0.0], [1.0, 1.0]] * 4


def test_the_peak_is_the_larger_phase():
    memory = MemoryParts(libraries=1000, weights=100, gradients=10, optimizer=1)
    assert BatchNeeds(rollout=50, update=30, step_seconds=1.0).peak(memory) == 1151
    assert BatchNeeds(rollout=50, update=45, step_seconds=1.0).peak(memory) == 1156


def test_peak_memory_sees_what_was_freed():
    with PeakMemory(torch.device("cpu")) as memory:
        start = memory.read()
        torch.ones(2**26).sum()  # 256 MiB
        assert memory.read() - start >= 0.9 * 2**28
        memory.reset()
        assert memory.read() - start <= 0.5 * 2**28


@pytest.mark.parametrize(
    ("size", "shares", "text"),
    [
        (8, True, "8 rollouts cut groups of 5: each prompt and image runs once for at most 5 of them, 3.3 on average"),
        (2, True, "2 rollouts cut groups of 5: each prompt and image runs once for at most 2 of them, 1.7 on average"),
        (8, False, "none: each of the 8 rollouts of a micro-batch runs its own prompt and images"),
    ],
)
def test_what_a_cut_shares(size, shares, text):
    args = SimpleNamespace(per_device_train_batch_size=size, num_generations=5, steps_per_generation=320 // size)
    assert sharing_text(args, shares).endswith(text)


def test_a_logger_that_is_not_there(folder, capsys):
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--dry_run", "--report_to", "wandb"]) == 2
    assert "report_to: " in capsys.readouterr().err


def test_long_rows_are_named_and_left_out(folder, capsys, tmp_path):
    counts = prompt_tokens(folder)
    limit = max(counts) - 1
    long = [index for index, count in enumerate(counts) if count > limit]
    argv = ["train", "--config", str(folder / "tiny.yaml"), "--max_steps", "1", "--max_prompt_tokens", str(limit)]
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    left_out = json.loads((tmp_path / "run" / "summary.json").read_text())["long_rows"]
    assert [row["tokens"] for row in left_out] == [counts[index] for index in long]
    assert 0 < len(long) < 20
    for row in left_out[:10]:
        assert f"{row['place']} is left out: {row['tokens']} prompt tokens" in error


def test_rows_with_other_images_are_counted_and_left_out(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 20), "red").save("red.png")
    # Every third row would be a bad one: it has more images than marks.
    rows = [
        {"prompt": f"{number} {'<image>' * (number % 3 > 0)}?", "answer": "1", "images": ["red.png"] * (number % 3)}
        for number in range(12)
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["train", "--config", str(folder / "tiny.yaml"), "--data", "my.jsonl", "--images_per_row"]
    assert main([*argv, "1", "--max_steps", "1", "--output_dir", "run"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["rows_with_other_images"] == 8
    assert "4 rows to train on" in Path("run/README.md").read_text()
    assert "8 left out for their number of images" in Path("run/README.md").read_text()
    said = (
        "8 rows are left out: they have another number of images than images_per_row = 1; the first is my.jsonl line 1"
    )
    assert said in capsys.readouterr().err
    assert main([*argv, "3", "--output_dir", "other"]) == 2
    assert "my.jsonl: images_per_row = 3 leaves no row" in capsys.readouterr().err


def test_no_row_is_short_enough(folder, capsys, tmp_path):
    argv = ["train", "--config", str(folder / "tiny.yaml"), "--max_prompt_tokens", "5"]
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 2
    assert f"the shortest prompt has {min(prompt_tokens(folder))} tokens" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sft"])
def test_pixel_bounds_that_make_no_sense(command, refused, tmp_path):
    argv = [command, "--data", *DATA, "--output_dir", tmp_path, "--min_pixels", 900, "--max_pixels", 800]
    assert "min_pixels = 900 is more than max_pixels = 800" in refused(*argv)


def test_what_a_run_goes_without_is_told_everywhere(folder, capsys, monkeypatch, tmp_path):
    """Here `generate` keeps its keys and values in a cache of another class, as a later transformers might."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.generation.utils.DynamicCache", type("OtherCache", (DynamicCache,), {}))
    failure.cache_clear()
    command = ["train", "--config", str(folder / "tiny.yaml")]
    try:
        assert main([*command, "--require_sharing", "true", "--dry_run"]) == 2
        refused = capsys.readouterr().err.splitlines()[-1]
        assert main([*command, "--dry_run"]) == 0
        (line,) = re.findall(r"^fallback +(.*)$", capsys.readouterr().out, flags=re.MULTILINE)
        assert main([*command, "--max_steps", "1", "--output_dir", "run"]) == 0
    finally:
        failure.cache_clear()
    assert line.startswith("rollouts do not share their prompt")
    assert refused == f"cppo: error: require_sharing = true, but {line}"
    run = tmp_path / "run"
    assert f"\n# {line}\n" in (run / "config.yaml").read_text()
    assert load_recipe("train", str(run / "config.yaml")).config["max_steps"] == 1
    assert [json.loads((run / name).read_text())["fallbacks"] for name in ("progress.json", "summary.json")] == [
        [line]
    ] * 2
    assert any(one[1:] == f"{line[1:]}." for one in run_warnings(read_run(run)))
    assert "Fallback\\: rollouts do not share their prompt" in (run / "README.md").read_text()
    assert "ollouts do not share their prompt" in (run / "report.html").read_text()
