"""A trainer in a script: short step lines, a report that `cppo report` reads too, and none of TRL's warnings."""

import json
import warnings

import pytest
from rollout_stubs import build_trainer, make_rows, token_reward
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cppo import ReportCallback
from cppo.cli.main import main
from cppo.cli.trained import own_options
from cppo.reports import read_run
from cppo.reports.signs import metric_warnings


def brevity(completions, **columns):
    return [1.0 / (1 + len(completion[0]["content"])) for completion in completions]


@pytest.fixture
def train(tiny, tmp_path):
    def run(resume=None, **options):
        given = {"max_steps": 2, "disable_tqdm": False, "gradient_checkpointing": True, **options}
        rewards = [token_reward, brevity]
        trainer = build_trainer(tiny, tmp_path / "run", make_rows([1, 1]), reward_funcs=rewards, **given)
        trainer.add_callback(ReportCallback(trainer))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def test_a_trainer_shows_short_lines_and_writes_a_report(train, tmp_path, capsys):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer = train()
    assert not [one for one in warned if "gradient_checkpointing" in str(one.message)]
    shown = {type(one) for one in trainer.callback_handler.callbacks}
    assert not shown & {ProgressCallback, PrinterCallback}
    captured = capsys.readouterr()
    assert captured.out == ""  # the Trainer's own lines hold forty keys
    steps = [line for line in captured.err.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == ["step 1/2", "step 2/2"]
    assert all("  token " in line and "  brevity " in line for line in steps)
    run = read_run(tmp_path / "run")
    assert [row["step"] for row in run.metrics] == [1, 2]
    signs = metric_warnings(run)
    assert any("reach the limit" in text for text in signs)
    assert all(f"cppo: warning: {text}" in captured.err for text in signs)
    assert run.samples
    assert run.config["method"] == "cppo"
    assert run.config["max_steps"] == 2
    page = (tmp_path / "run/report.html").read_text()
    assert "<h3>Other rewards</h3>" in page
    assert 'http-equiv="refresh"' not in page  # it has ended
    assert f"report     {tmp_path / 'run/report.html'}" in captured.err
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "again.html")]) == 0
    assert own_options(str(tmp_path / "run"))["view_crop_side"] == trainer.args.view_crop_side


def test_a_resume_keeps_the_steps_before_it_and_a_new_run_none(train, tmp_path):
    train(save_strategy="steps", save_steps=1)
    train(resume=str(tmp_path / "run/checkpoint-1"))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    train(max_steps=1)
    assert [row["step"] for row in read_run(tmp_path / "run").metrics] == [1]
