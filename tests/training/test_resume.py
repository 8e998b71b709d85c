"""A run resumed at any step repeats the uninterrupted one exactly: rollouts, views, losses, weights and samples."""

import hashlib

import pytest
import torch
from rollout_stubs import flat_weights, lazy_dataset, make_rows, step_logs
from tiny_families import build_family
from transformers import AutoModelForImageTextToText, TrainerCallback

from cppo.checkpoints import write_manifest
from cppo.errors import UserError
from cppo.policy.loading import load_weights
from cppo.runs.recorder import sample_record
from cppo.training.config import CPPOConfig
from cppo.training.trainer import CPPOTrainer


class RecordingTrainer(CPPOTrainer):
    """Keeps the content and the loss of every micro-batch, by optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.records = {}

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training:
            views = [
                None if view is None else {kind: [digest(own) for own in view[kind].values()] for kind in view}
                for view in inputs["perception_views"]
            ]
            record = (
                inputs["completion_ids"].tolist(),
                views,
                [digest(images.get("pixel_values")) for images in inputs["prompt_images"]],
                loss.item(),
            )
            self.records.setdefault(self.state.global_step + 1, []).append(record)
        return loss


class WeightRecorder(TrainerCallback):
    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights[state.global_step] = digest(flat_weights(model))


class SampleRecorder(TrainerCallback):
    """Keeps the samples that `samples.jsonl` gets in each step."""

    def __init__(self):
        self.samples, self.trainer = {}, None

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.samples[state.global_step] = [sample_record(sample) for sample in self.trainer.last_samples]


def digest(tensor):
    return tensor if not isinstance(tensor, torch.Tensor) else hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def run(make_trainer, rows, options, resume=None, folder="out"):
    """Train, from the start or a checkpoint; the records, weights and samples of each step done, and the logs."""
    weights, samples = WeightRecorder(), SampleRecorder()
    trainer = make_trainer(
        rows,
        RecordingTrainer,
        CPPOConfig,
        folder=folder,
        callbacks=[weights, samples],
        **{"save_strategy": "steps", "save_steps": 1, "max_steps": -1, "num_train_epochs": 2, "seed": 6, **options},
    )
    samples.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == max(weights.weights)
    return trainer.records, weights.weights, samples.samples, step_logs(trainer)


def comparable(logs):
    costs = ("step_time", "time/", "memory/")
    return [{key: value for key, value in log.items() if not key.startswith(costs)} for log in logs]


# Rows, options and the number of steps. Two epochs, each of one or two generation batches.
CASES = {
    "a step a batch": ([1, 0, 2, 1], {}, 4),
    "two iterations": ([1, 2], {"num_iterations": 2}, 4),
    "scores that are kept": ([1, 2], {"num_iterations": 2, "method": "papo"}, 4),
    "views inside the model": ([1, 2], {"num_iterations": 2, "removing_views": ["image_removed"]}, 4),
    "several steps a batch": (
        [1, 0, 2, 1],
        {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "perception_normalization": "token",
        },
        4,
    ),
    "a batch ends within a step": (
        [1, 0, 2, 1],
        {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 3,
            "steps_per_generation": 2,
            "perception_rollouts_per_group": 1,
        },
        4,
    ),
    # The first step of a batch moves pixels and makes half of the rollouts from them; the second uses what was kept.
    "rollouts from entropy ascent": (
        [1, 2],
        {"num_iterations": 2, "rollout_views": ["entropy_ascent"], "rollout_view_mode": "mix"},
        4,
    ),
    # The strength of the augmentation depends on the step at which the batch began.
    "augmented rollouts": (
        [1, 2],
        {
            "num_iterations": 2,
            "rollout_views": ["diffusion_noise"],
            "rollout_view_mode": "augment",
            "rollout_view_fraction": 1.0,
            "view_diffusion_decay": [10.0, 0.5],
        },
        4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_at_any_step(make_trainer, tmp_path, case):
    counts, options, steps = CASES[case]
    rows = make_rows(counts)
    records, weights, samples, logs = run(make_trainer, rows, options)
    assert sorted(weights) == list(range(1, steps + 1))
    assert all(samples[step][0]["step"] == step for step in samples)
    assert len({str(record) for record in records.values()}) == len(set(weights.values())) == steps
    assert sum(view is not None for step in records.values() for batch in step for view in batch[1]) > steps
    for stop in range(1, steps):
        resumed = run(make_trainer, rows, options, str(tmp_path / "out" / f"checkpoint-{stop}"), f"from-{stop}")
        rest = range(stop + 1, steps + 1)
        assert resumed[0] == {step: records[step] for step in rest}, f"rollouts, views or losses from step {stop}"
        assert resumed[1] == {step: weights[step] for step in rest}, f"weights from step {stop}"
        assert resumed[2] == {step: samples[step] for step in rest}, f"samples from step {stop}"
        assert comparable(resumed[3]) == comparable(logs), f"logs from step {stop}"


def test_views_and_order_change_with_the_epoch(make_trainer):
    """Without this, a resume that forgot its epoch would pass."""
    records, *_ = run(make_trainer, make_rows([1, 1, 1, 1]), {"perception_gate": "none"})
    epochs = [[records[step][0] for step in steps] for steps in ((1, 2), (3, 4))]
    views = [{str(view["preserving"]) for batch in epoch for view in batch[1]} for epoch in epochs]
    assert len(views[0]) == len(views[1]) == 4
    assert not views[0] & views[1]
    assert epochs[0][0][2] != epochs[1][0][2]


@pytest.mark.parametrize(
    ("case", "stop", "change"),
    [
        ("a step a batch", 2, {"epoch": 0}),
        ("a step a batch", 3, {"epoch": 0}),
        ("two iterations", 3, {"buffered_inputs": None}),
        ("several steps a batch", 1, {"buffered_inputs": None}),
        ("several steps a batch", 2, {"micro_step": 2}),
    ],
)
def test_each_part_of_the_state_is_needed(make_trainer, tmp_path, case, stop, change):
    counts, options, _ = CASES[case]
    rows = make_rows(counts)
    records, *_ = run(make_trainer, rows, options)
    folder = tmp_path / "out" / f"checkpoint-{stop}"
    state = torch.load(folder / "rollout_state_0.pt", weights_only=True)
    torch.save({**state, **change}, folder / "rollout_state_0.pt")
    write_manifest(folder, processes=1)
    resumed, *_ = run(make_trainer, rows, options, str(folder), "resumed")
    assert resumed[stop + 1] != records[stop + 1]


def test_the_weights_of_the_checkpoint_are_loaded(make_trainer, tmp_path):
    """Qwen2.5-VL's files name its weights differently than the model, and transformers would skip them."""
    trainer = make_trainer(make_rows([1, 1]), save_strategy="steps", save_steps=1, learning_rate=0.01)
    trainer.train()
    resumed = make_trainer(make_rows([1, 1]), folder="resumed", max_steps=1)
    trained = trainer.model.state_dict()
    assert any(not torch.equal(weight, trained[name]) for name, weight in resumed.model.state_dict().items())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert all(torch.equal(weight, trained[name]) for name, weight in resumed.model.state_dict().items())


def test_a_head_in_float32_is_loaded_as_it_was_saved(tmp_path):
    folder = build_family("qwen2_5_vl", tmp_path / "model")
    trained, started = (AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2))
    for model in (trained, started):
        model.lm_head.float()
    trained.lm_head.weight.data += 1e-4 * torch.rand_like(trained.lm_head.weight)
    trained.save_pretrained(tmp_path / "checkpoint")
    assert load_weights(started, str(tmp_path / "checkpoint"))
    assert torch.equal(started.lm_head.weight, trained.lm_head.weight)
    assert started.dtype == torch.bfloat16


def test_a_checkpoint_without_the_state_is_refused(make_trainer, tmp_path):
    rows = make_rows([1, 1])
    run(make_trainer, rows, {"max_steps": 1})
    folder = tmp_path / "out" / "checkpoint-1"
    state = folder / "rollout_state_0.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match=r"rollout_state_0\.pt has 100 bytes, not [\d,]+") as caught:
        run(make_trainer, rows, {"max_steps": 2}, str(folder))
    assert "\n" not in str(caught.value)
    state.unlink()
    with pytest.raises(UserError, match=r"rollout_state_0\.pt is missing") as caught:
        run(make_trainer, rows, {"max_steps": 2}, str(folder))
    assert "\n" not in str(caught.value)


def test_unfinished_rollouts_without_the_views_that_are_needed_now_are_refused(make_trainer, tmp_path):
    rows, options = make_rows([1, 2]), {"num_iterations": 2, "perception_selector": "all"}
    run(make_trainer, rows, {**options, "perception_removing_weight": 0.0})
    with pytest.raises(UserError, match="have no removing views") as caught:
        run(make_trainer, rows, options, str(tmp_path / "out" / "checkpoint-1"), "resumed")
    assert "\n" not in str(caught.value)


def test_evaluation_between_the_steps_does_not_disturb_a_resume(make_trainer, tmp_path):
    rows = make_rows([1, 2])
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "eval_dataset": lazy_dataset(make_rows([1], first=30)),
        "num_iterations": 2,
    }
    records, weights, *_ = run(make_trainer, rows, options)
    resumed = run(make_trainer, rows, options, str(tmp_path / "out" / "checkpoint-1"), "resumed")
    assert resumed[0] == {step: records[step] for step in (2, 3, 4)}
    assert resumed[1] == {step: weights[step] for step in (2, 3, 4)}
