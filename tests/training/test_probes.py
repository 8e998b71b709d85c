"""Probes of held-out items: their results, and training that is not changed by them."""

import json
from types import SimpleNamespace

import pytest
import torch
from rollout_stubs import make_rows

from cppo.data import load_records
from cppo.errors import UserError
from cppo.evaluation import evaluate
from cppo.evaluation.inspection import InspectOptions, inspect_record
from cppo.recipes import RunDirectory
from cppo.runs.prepare import may_probe
from cppo.runs.probes import HeldOutProbe

ASKED = {"max_new_tokens": 6, "system_prompt": None, "tolerance": 0.0}


@pytest.fixture(scope="module")
def items():
    return load_records("tasks:digits?n=5", split="test")


def train(make_trainer, tmp_path, folder, items=None, every=None, **options):
    """Three steps of sampled rollouts, probed where there are items. Returns the trainer and its logs without costs."""
    trainer = make_trainer(make_rows([1, 0, 2, 1]), folder=folder, max_steps=3, perception_gate="none", **options)
    (tmp_path / folder).mkdir(exist_ok=True)
    if items is not None:
        files = RunDirectory(tmp_path / folder)
        trainer.add_callback(HeldOutProbe(trainer, files, items, every=every, asked=ASKED))
    trainer.train()
    logs = [
        {name: value for name, value in log.items() if not name.startswith(("step_time", "time/", "memory/", "train_"))}
        for log in trainer.state.log_history
    ]
    return trainer, logs


def test_training_is_the_same_as_without_probes(make_trainer, tmp_path, items):
    plain, plain_logs = train(make_trainer, tmp_path, "plain")
    probed, probed_logs = train(make_trainer, tmp_path, "probed", items, every=1)
    assert json.dumps(plain_logs) == json.dumps(probed_logs)  # NaN equals itself in text
    probed_weights = probed.model.state_dict()
    assert all(torch.equal(weight, probed_weights[name]) for name, weight in plain.model.state_dict().items())
    assert probed.model.training == plain.model.training


def test_what_a_probe_finds(make_trainer, tmp_path, processor, items):
    trainer, _ = train(make_trainer, tmp_path, "run", items, every=2, perception_score="kl", temperature=0.7)
    probes = [json.loads(line) for line in (tmp_path / "run" / "probes.jsonl").read_text().splitlines()]
    assert [probe["step"] for probe in probes] == [0, 2, 3]
    model = trainer.model.eval()
    found = evaluate(model, processor, items, **ASKED)
    assert (probes[-1]["accuracy"], probes[-1]["n"]) == (found.accuracy, 5)
    assert [item["id"] for item in probes[-1]["items"]] == [items[place].id for place in range(3)]
    options = InspectOptions(samples=1, max_new_tokens=6, seed=3, temperature=0.7)
    for place, item in enumerate(probes[-1]["items"]):
        inspected = inspect_record(model, processor, items[place], trainer.args.view_sampler(), options)
        tokens = inspected.responses[0].tokens
        assert item["tokens"] == [token.text for token in tokens]
        assert item["score"] == pytest.approx([token.scores["kl"] for token in tokens], abs=1e-4)
        assert item["selected"] == [token.selected["kl"] for token in tokens]
    assert probes[0]["items"][0]["score"] != probes[-1]["items"][0]["score"]  # the model has learnt


def test_a_probe_inspects_as_the_run_trains_and_evaluates(make_trainer, tmp_path, items):
    options = {"temperature": 0.7, "perception_selector": "top", "perception_top_fraction": 0.3}
    options |= {"perception_top_rounding": "ceil"}
    asked = {"max_new_tokens": 400, "system_prompt": "Look.", "tolerance": 0.1}
    probe = HeldOutProbe(
        make_trainer(make_rows([1, 1]), **options), RunDirectory(tmp_path), items, every=None, asked=asked
    )
    expected = {"samples": 1, "temperature": 0.7, "max_new_tokens": 256, "seed": 3, "system_prompt": "Look."}
    expected |= {"selector": "top", "top_fraction": 0.3, "top_rounding": "ceil", "tolerance": 0.1}
    assert probe._options == InspectOptions(**expected)


def test_eight_times_a_run_by_default(make_trainer, tmp_path, items):
    trainer = make_trainer(make_rows([1, 1]))
    probe = HeldOutProbe(trainer, RunDirectory(tmp_path), items, every=None, asked=ASKED)
    taken = []
    probe._take = taken.append
    state = trainer.state
    state.global_step, state.max_steps = 0, 44
    probe.on_train_begin(trainer.args, state, trainer.control)
    for state.global_step in range(1, 45):
        probe.on_step_end(trainer.args, state, trainer.control)
    assert taken == [0, *range(6, 44, 6), 44]


@pytest.mark.parametrize("name", ["probe_steps", "final_eval_samples"])
@pytest.mark.parametrize(
    ("fsdp", "fsdp2", "deepspeed", "words"),
    [
        (True, False, False, "does not go with FSDP1: set fsdp_version to 2"),
        (False, False, True, "does not go with DeepSpeed"),
    ],
)
def test_where_held_out_items_are_not_answered(name, fsdp, fsdp2, deepspeed, words):
    def trainer(fsdp, fsdp2, deepspeed):
        accelerator = SimpleNamespace(is_fsdp2=fsdp2)
        return SimpleNamespace(is_fsdp_enabled=fsdp, is_deepspeed_enabled=deepspeed, accelerator=accelerator)

    options = SimpleNamespace(**{"probe_steps": 0, "final_eval_samples": 0, name: 5})
    assert may_probe(trainer(False, False, False), options)
    assert may_probe(trainer(True, True, False), options)
    sharded = trainer(fsdp, fsdp2, deepspeed)
    with pytest.raises(UserError, match=f"{name} {words}"):
        may_probe(sharded, options)
    assert not may_probe(sharded, SimpleNamespace(probe_steps=0, final_eval_samples=0))
