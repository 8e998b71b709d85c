"""Checkpoints are complete or do not count; a non-finite step is not applied; a resume follows its options."""

import copy
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from rollout_stubs import build_trainer, flat_weights, make_rows, step_logs
from transformers import TrainerCallback

from cppo import checkpoints
from cppo.checkpoints import MANIFEST, damage, newest_whole
from cppo.errors import UserError
from cppo.training import durable
from cppo.training.trainer import CPPOTrainer

SAVING = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01}


class Poisoned(CPPOTrainer):
    """Multiplies its loss by `poison` in the steps `poisoned`."""

    poison, poisoned = float("nan"), (2,)

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss * self.poison if self.state.global_step + 1 in self.poisoned else loss


class PoisonedBackward(CPPOTrainer):
    """Its loss is finite; one weight's gradient is infinite in step 2."""

    def _compute_loss(self, model, inputs):
        if self.state.global_step == 1:
            weight = next(weight for weight in model.parameters() if weight.requires_grad)
            weight.register_hook(lambda gradient: gradient * float("inf"))
        return super()._compute_loss(model, inputs)


class Weights(TrainerCallback):
    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = flat_weights(model).clone()


@pytest.mark.parametrize(
    ("trainer", "poison", "cause"),
    [
        (Poisoned, float("nan"), "the loss of micro-batch 1 of 1 is nan"),
        (Poisoned, float("inf"), "the loss of micro-batch 1 of 1 is inf"),
        (PoisonedBackward, None, "so it comes from the backward pass"),
    ],
)
def test_a_step_that_is_not_finite_ends_the_run_before_it(make_trainer, tmp_path, monkeypatch, trainer, poison, cause):
    monkeypatch.setattr(Poisoned, "poison", poison)
    weights = Weights()
    trainer = make_trainer(make_rows([1, 1]), trainer, callbacks=[weights], max_steps=3, save_total_limit=1, **SAVING)
    with pytest.raises(UserError, match=r"^step 2: the gradient's norm is (nan|inf)") as caught:
        trainer.train()
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(flat_weights(trainer.model), weights.after[1])
    assert newest_whole(tmp_path / "out", passed_over=pytest.fail) == tmp_path / "out" / "checkpoint-1"


def test_such_steps_are_skipped_on_request(make_trainer, capsys):
    weights = Weights()
    trainer = make_trainer(make_rows([1, 1]), Poisoned, callbacks=[weights], max_steps=3, nonfinite="skip", **SAVING)
    trainer.train()
    assert torch.equal(weights.after[2], weights.after[1])
    assert not torch.equal(weights.after[3], weights.after[2])
    assert weights.after[3].isfinite().all()
    assert "step 2 is skipped: the gradient's norm is nan" in capsys.readouterr().err


def test_too_many_skipped_steps_in_a_row_end_the_run(make_trainer, monkeypatch):
    monkeypatch.setattr(Poisoned, "poisoned", (1, 3, 4, 5))
    trainer = make_trainer(make_rows([1, 1]), Poisoned, max_steps=6, nonfinite="skip", nonfinite_limit=2)
    with pytest.raises(UserError, match=r"^step 5: the gradient's norm is nan after 2 skipped steps"):
        trainer.train()


def names(run):
    return sorted(path.name for path in run.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def saved(tiny_model, processor, tmp_path_factory):
    """A run's folder with three complete checkpoints."""

    folder = tmp_path_factory.mktemp("saved") / "out"
    options = {**SAVING, "max_steps": 3, "processing_class": processor}

    build_trainer(copy.deepcopy(tiny_model), folder, make_rows([1, 1]), **options).train()
    return folder


def drop(file):
    file.unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [drop, cut, flip])
def test_any_harmed_file_makes_a_checkpoint_not_whole(saved, tmp_path, harm):
    whole = saved / "checkpoint-3"
    names = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
    kinds = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "trainer_state.json"}
    assert kinds | {"rollout_state_0.pt", MANIFEST} <= set(map(str, names))
    assert damage(whole) is None
    for name in names:
        run = tmp_path / str(name)
        shutil.copytree(saved, run)
        harm(run / "checkpoint-3" / name)
        told = []
        assert newest_whole(run, passed_over=told.append) == run / "checkpoint-2", name
        assert len(told) == 1
        assert str(name) in told[0]


class Payload:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def as_torch_saves(file, marker):
    torch.save(Payload(marker), file)


def as_pickle(file, marker):
    file.write_bytes(pickle.dumps(Payload(marker)))


def as_one_byte(file, marker):
    file.write_bytes(b"\x80")


def as_half(file, marker):
    cut(file)


@pytest.mark.parametrize("harm", [as_torch_saves, as_pickle, as_one_byte, as_half])
@pytest.mark.parametrize(
    "name",
    ["rollout_state_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "pytorch_model.bin"],
)
def test_what_a_checkpoint_holds_beside_tensors_is_one_line_and_runs_nothing(make_trainer, saved, tmp_path, name, harm):
    """The manifest matches, as after an attack or in a copy from a damaged disk."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(saved / "checkpoint-2", folder)
    if name == "pytorch_model.bin":
        torch.save({"weight": torch.zeros(2)}, folder / name)
        (folder / "model.safetensors").unlink()
    harm(folder / name, tmp_path / "ran")
    checkpoints.write_manifest(folder, processes=1)
    trainer = make_trainer(make_rows([1, 1]), max_steps=4)
    with pytest.raises(UserError, match="cannot be read: ") as caught:
        trainer.train(resume_from_checkpoint=str(folder))
    assert "checkpoint-2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "config.json", "model.safetensors"])
def test_an_older_checkpoint_that_lacks_a_part_is_refused(make_trainer, saved, tmp_path, name):
    """cppo 0.1.0 wrote no manifest."""
    folder = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(saved / "checkpoint-2", folder)
    (folder / MANIFEST).unlink()
    told = []
    assert newest_whole(tmp_path / "out", passed_over=told.append) is None
    assert "as from cppo 0.1.0; give its folder to --resume_from_checkpoint to continue from it" in told[0]
    make_trainer(make_rows([1, 1]), max_steps=3, folder="other").train(resume_from_checkpoint=str(folder))
    for file in folder.glob("*config.json") if name == "config.json" else [folder / name]:
        file.unlink()
    with pytest.raises(UserError, match=r"is missing|no file named|valid checkpoint"):
        make_trainer(make_rows([1, 1]), max_steps=3, folder="other").train(resume_from_checkpoint=str(folder))


def test_a_trainer_takes_the_newest_whole_checkpoint_and_refuses_a_harmed_one(make_trainer, saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "out")
    cut(tmp_path / "out" / "checkpoint-3" / "optimizer.pt")
    trainer = make_trainer(make_rows([1, 1]), **{**SAVING, "max_steps": 4})
    with pytest.raises(UserError, match=r"checkpoint-3 cannot be resumed from: optimizer.pt has [\d,]+ bytes, not"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=True)
    assert [log["step"] for log in step_logs(trainer)] == [1, 2, 3, 4]
    assert "checkpoint-3 is skipped: optimizer.pt" in capsys.readouterr().err


def test_a_checkpoint_of_another_number_of_processes_is_refused(make_trainer, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "out")
    checkpoints.write_manifest(tmp_path / "out" / "checkpoint-3", processes=2)
    with pytest.raises(UserError, match=r"2 processes wrote .*checkpoint-3, but 1 resumes"):
        make_trainer(make_rows([1, 1]), max_steps=4).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("pytorch_model_fsdp_0/__0_0.distcp", "sharded by FSDP"),
        ("pytorch_model_fsdp.bin", "whole by FSDP"),
        ("global_step3/mp_rank_00_model_states.pt", "by DeepSpeed"),
    ],
)
def test_a_checkpoint_whose_weights_were_written_another_way_is_refused(make_trainer, saved, tmp_path, entry, words):
    folder = tmp_path / "out" / "checkpoint-3"
    shutil.copytree(saved / "checkpoint-3", folder)
    (folder / entry).parent.mkdir(exist_ok=True)
    (folder / entry).touch()
    with pytest.raises(UserError, match=f"were written {words}, but this run writes them without FSDP and DeepSpeed"):
        make_trainer(make_rows([1, 1]), max_steps=4).train(resume_from_checkpoint=str(folder))


def test_a_plain_checkpoint_is_named_as_the_start_of_a_run_under_fsdp(saved):
    folder = saved / "checkpoint-3"
    with pytest.raises(UserError, match="written without FSDP and DeepSpeed, but this run writes them sharded") as told:
        checkpoints.check_weights_written(folder, "sharded by FSDP")
    assert str(told.value).endswith(f"or start a new run with --model {folder}")


def test_older_checkpoints_go_when_the_new_one_is_whole(make_trainer, tmp_path, monkeypatch):
    seen = []

    def stop(folder, *facts):
        seen.append(names(tmp_path / "out"))
        write(folder, *facts)
        if len(seen) == 3:
            raise KeyboardInterrupt

    write = durable.write_manifest
    monkeypatch.setattr(durable, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(make_rows([1, 1]), **{**SAVING, "max_steps": 4, "save_total_limit": 1}).train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_file_that_cannot_be_written_is_named_and_costs_no_checkpoint(make_trainer, saved, tmp_path, share):
    """The limit on a file's size acts like a full disk, for safetensors, torch and Python."""
    largest = max(file.stat().st_size for file in (saved / "checkpoint-1").iterdir())

    class Limit(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"out/checkpoint-2/\S+ cannot be written: .+earlier checkpoints") as caught:
            make_trainer(make_rows([1, 1]), callbacks=[Limit()], max_steps=3, save_total_limit=1, **SAVING).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "out") == ["checkpoint-1"]
    assert damage(tmp_path / "out" / "checkpoint-1") is None


def test_a_learning_rate_given_at_a_resume_holds(make_trainer, saved):
    trainer = make_trainer(make_rows([1, 1]), folder="changed", max_steps=6, **{**SAVING, "learning_rate": 0.5})
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    rates = {log["step"]: log["learning_rate"] for log in step_logs(trainer) if log["step"] > 2}
    # TRL's schedule falls linearly to 0; step s + 1 uses the rate after s steps.
    assert rates == pytest.approx({step: 0.5 * (1 - (step - 1) / 6) for step in (3, 4, 5, 6)}, rel=1e-12)


def test_optimizer_constants_and_intervals_given_at_a_resume_hold(make_trainer, saved, tmp_path):
    given = {**SAVING, "weight_decay": 0.25, "adam_beta1": 0.5, "save_steps": 3, "max_steps": 7, "logging_steps": 2}
    trainer = make_trainer(make_rows([1, 1]), folder="changed", **given)
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.25, 0.0}
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.5, 0.999)}
    assert names(tmp_path / "changed") == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    assert [log["step"] for log in step_logs(trainer)] == [1, 2, 4, 6]


def test_a_resume_at_the_last_step_trains_nothing(make_trainer, saved, tmp_path):
    """Three of an epoch's four steps are done: the Trainer itself would do the fourth."""
    rows = make_rows([1] * 8)
    trainer = make_trainer(rows, folder="whole", max_steps=3, **SAVING)
    trainer.train()
    resumed = make_trainer(rows, folder="again", max_steps=3, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 3
    assert torch.equal(flat_weights(resumed.model), flat_weights(trainer.model))


def test_weights_that_are_trained_otherwise_than_before_are_refused(make_trainer, saved):
    trainer = make_trainer(make_rows([1, 1]), folder="frozen", max_steps=4, freeze_vision_tower=True)
    with pytest.raises(UserError, match="has other weights than this run trains"):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))


def test_a_folder_is_no_checkpoint(make_trainer, tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        make_trainer(make_rows([1, 1])).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="cannot be resumed from"):
        make_trainer(make_rows([1, 1])).train(resume_from_checkpoint=str(Path(tmp_path)))
