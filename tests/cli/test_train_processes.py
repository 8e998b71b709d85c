"""`cppo train` in two processes, by DDP and by FSDP2: answers to held-out items, probes, resume, the saved model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pictures import picture
from safetensors.torch import load_file, save_file
from small_model import SHORT_RUN
from transformers import AutoModelForImageTextToText, AutoProcessor

from cppo.data import load_records
from cppo.evaluation import BLANK, evaluate
from cppo.evaluation.inspection import inspect_record
from cppo.recipes import RunDirectory, load_recipe
from cppo.runs.prepare import build_config
from cppo.runs.probes import HeldOutProbe

JOB = Path(__file__).with_name("train_rank_job.py")
OWN = """
import torch
from cppo.perception import needs

def reward(completions, **columns):
    return [float(len(completion[0]["content"]) % 3) for completion in completions]

@needs("kl")
def lost(anchor, removing):
    return removing.exact["kl"] + anchor.logps - removing.logps

@needs("draws")
def lottery(score, response_mask, top_fraction, *, draws, **_):
    return response_mask & (draws < top_fraction)

@needs("hidden_states")
def near(scores, options):
    return 1 - torch.cosine_similarity(scores.anchor.hidden_states, scores.preserving.hidden_states, dim=-1)
"""
HELD_OUT = (1, 1, 0, 0, 1, 0, 1, 1, 0)
"""Images of each held-out row: batches of two with one process in the vision tower and the other not, and one alone."""
DIGITS = "tasks:digits?n=7"
EVALUATED = {"eval_data": DIGITS, "eval_strategy": "steps", "eval_steps": 1}
RUNS = {
    # Sharded checkpoints, with rollouts that are still to be trained on; layers that are computed again.
    "sharded": {"fsdp": {"activation_checkpointing": True}, "own": True, "beta": 0.05, "num_iterations": 2},
    "sharded resumed": {"resume": "sharded"},
    # Whole checkpoints, and weights that the first process alone loads.
    "best": {
        **EVALUATED,
        "fsdp": {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": True},
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_completions/mean_length",
        "greater_is_better": False,
    },
    "copied": {**EVALUATED, "own": True, "num_iterations": 2},
    "copied resumed": {"resume": "copied"},
}
STEPS = 3
BATCH = 2
PROBED = 5


@pytest.fixture(scope="module")
def model(small_model, tmp_path_factory):
    """Folder of the small model with larger weights: its answers differ by image and question."""
    folder = shutil.copytree(small_model, tmp_path_factory.mktemp("larger") / "model")
    weights = load_file(folder / "model.safetensors")
    scaled = {name: weight * (7.0 if weight.ndim > 1 else 1.0) for name, weight in weights.items()}
    save_file(scaled, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Every run's folder, and `answers.json`."""
    folder = tmp_path_factory.mktemp("runs")
    own = folder / "own.py"
    own.write_text(OWN)
    picture(1).save(folder / "picture.png")
    rows = [
        {"id": str(place), "prompt": f"What is {place}?", "images": ["picture.png"] * images, "answer": str(place)}
        for place, images in enumerate(HELD_OUT)
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hooks = {"rewards": f"{own}:reward", "perception_score": f"{own}:lost", "perception_selector": f"{own}:lottery"}
    hooks["perception_sink"] = f"{own}:near"
    runs = []
    for name, given in RUNS.items():
        options = {**RUNS[given["resume"]], **given} if "resume" in given else dict(given)
        run = {kind: options.pop(kind) for kind in ("fsdp", "resume") if kind in options}
        options = {
            **SHORT_RUN,
            "data": "tasks:digits?n=8",
            "eval_data": str(folder / "held_out.jsonl"),
            "final_eval_samples": len(HELD_OUT),
            "probe_steps": 1,
            "probe_items": PROBED,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "perception_gate": "none",
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "max_steps": STEPS,
            "save_steps": 1,
            "save_total_limit": STEPS,
            "rewards": f"{own}:reward",
            **(hooks if options.pop("own", False) else {}),
            **options,
        }
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        run["argv"] = ["--config", "micro", "--model", model, "--output_dir", str(folder / name), *words]
        runs.append(json.dumps(run))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = subprocess.run(
        [sys.executable, *launcher, str(JOB), str(folder), str(BATCH), *runs],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert job.returncode == 0, job.stderr[-3000:]
    return folder


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_costs(records):
    costs = ("step_time", "time/", "memory/", "eval_runtime", "eval_samples_per", "eval_steps_per")
    return [{key: value for key, value in record.items() if not key.startswith(costs)} for record in records]


@pytest.mark.parametrize("name", ["sharded", "best", "copied"])
def test_held_out_items_are_answered_as_by_one_process(folder, model, name):
    """Before and after training, and in every probe; the model that is saved is the one that answered."""
    processor = AutoProcessor.from_pretrained(model)
    source = RUNS[name].get("eval_data", str(folder / "held_out.jsonl"))
    items = load_records(source, split="test", limit=len(HELD_OUT))
    answers = json.loads((folder / "answers.json").read_text())[name]
    before, *probes, after, blank = answers
    start, end = (AutoModelForImageTextToText.from_pretrained(path) for path in (model, folder / name))

    def alone(weights, count=None, **how):
        asked = {"batch_size": BATCH, "max_new_tokens": SHORT_RUN["max_completion_length"]}
        found = evaluate(weights, processor, items if count is None else items.keep(range(count)), **asked, **how)
        return [text for item in found.items for text in item.responses]

    assert before == alone(start)
    assert len(set(before)) > 1
    assert probes[0] == alone(start, PROBED)
    assert len(probes) == STEPS + 1
    assert after == alone(end)
    assert blank == alone(end, condition=BLANK)
    written = lines(folder / name / "probes.jsonl")
    assert [probe["step"] for probe in written] == [*range(STEPS + 1)]
    if name == "best":  # the model of another step than the last
        return
    assert probes[-1] == alone(end, PROBED)
    args = build_config(load_recipe("train", str(folder / name / "config.yaml")))
    asked = {"max_new_tokens": args.max_completion_length, "system_prompt": None, "tolerance": 0.0}
    probe = HeldOutProbe(SimpleNamespace(args=args), RunDirectory(folder / name), items, every=1, asked=asked)
    for item, shown in zip(items, written[-1]["items"], strict=False):
        tokens = inspect_record(end, processor, item, probe._sampler, probe._options).responses[0].tokens
        assert shown["tokens"] == [token.text for token in tokens]
        assert shown["score"] == [round(token.scores[args.perception_score], 5) for token in tokens]
        assert shown["selected"] == [token.selected[args.perception_score] for token in tokens]


def test_the_best_model_is_saved_whole(folder, model):
    state = json.loads((folder / "best" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] != str(folder / "best" / f"checkpoint-{STEPS}")
    best = load_file(Path(state["best_model_checkpoint"], "model.safetensors"))
    saved = load_file(folder / "best" / "model.safetensors")
    assert saved.keys() == best.keys()
    assert all(torch.equal(weight, best[name]) for name, weight in saved.items())
    start = load_file(Path(model, "model.safetensors"))
    assert any(not torch.equal(weight, saved[name]) for name, weight in start.items())


@pytest.mark.parametrize("name", ["sharded", "copied"])
def test_a_resumed_run_repeats_the_uninterrupted_one(folder, name):
    """To the last bit, with AdamW and sampled rollouts; no step is logged twice or left out."""
    whole, resumed = folder / name, folder / f"{name} resumed"
    weights, again = (load_file(run / "model.safetensors") for run in (whole, resumed))
    assert weights.keys() == again.keys()
    for weight, value in weights.items():
        assert torch.equal(value, again[weight]), weight
    for file in ("metrics.jsonl", "probes.jsonl", "samples.jsonl"):
        records = without_costs(lines(whole / file))
        assert without_costs(lines(resumed / file)) == records
    steps = {"metrics.jsonl": [1, 2, 3], "probes.jsonl": [0, 1, 2, 3]}
    for file, expected in steps.items():
        assert list(dict.fromkeys(line["step"] for line in lines(resumed / file))) == expected
    answers = json.loads((folder / "answers.json").read_text())
    # The start, and what came after the checkpoint.
    assert answers[resumed.name] == [answers[name][0], *answers[name][-3:]]


def test_another_number_of_processes_cannot_resume(folder, refused):
    """It is refused before anything of the run is changed."""
    run = folder / "copied"
    before = {file: file.stat().st_mtime_ns for file in sorted(run.rglob("*"))}
    argv = ["train", "--config", str(run / "config.yaml"), "--resume_from_checkpoint", str(run / "checkpoint-2")]
    line = refused(*argv)
    assert line.startswith(
        f"resume_from_checkpoint: 2 processes wrote {run}/checkpoint-2, but 1 resumes: start the same number"
    )
    assert {file: file.stat().st_mtime_ns for file in sorted(run.rglob("*"))} == before
