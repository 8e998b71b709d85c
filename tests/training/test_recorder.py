"""The output of a run on a terminal and elsewhere, and the times when it writes its report."""

import io
import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest

from cppo.recipes import RunDirectory
from cppo.runs.progress import Milestones, TrainProgress, progress_text, sample_table
from cppo.runs.recorder import RunRecorder

pytestmark = pytest.mark.usefixtures("shows_progress")

LOGS = {
    "reward": 0.5,
    "rewards/accuracy_reward/mean": 0.25,
    "rewards/accuracy_reward/std": 0.5,
    "rewards/brevity/mean": 1.5,
    "perception/cpl": 0.75,
}
SAMPLE = {
    "step": 3,
    "prompt": "How many\nbirds?",
    "answer": "7",
    "reward": 0.9,
    "completion_tokens": ["I see", " 7", "\x1b[2J<script>\r\n"],
    "perception": [False, True, False],
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress_of(monkeypatch, stream, *, quiet=False):
    monkeypatch.setattr("sys.stderr", stream)
    progress = TrainProgress(quiet=quiet)
    progress.begin(0, 40)
    for step in range(1, 41):
        progress.advance(step)
        progress.show(step, 40, LOGS)
        if step == 20:
            progress.samples([SAMPLE])
    progress.end()
    return stream.getvalue()


def test_a_terminal_has_a_bar_with_figures_and_time_left(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # of which a bar takes no more
    text = progress_of(monkeypatch, Terminal())
    assert re.search(r"train: +\d+%.*\d+/40 \[.*<.*reward=0.500, accuracy=0.250, brevity=1.500, cpl=0.750\]", text)
    assert "How many birds?" in text
    assert "step 20/40" not in text


@pytest.mark.parametrize(("stream", "quiet"), [(io.StringIO, False), (Terminal, True), (io.StringIO, True)])
def test_elsewhere_or_if_quiet_there_are_plain_lines(monkeypatch, stream, quiet):
    text = progress_of(monkeypatch, stream(), quiet=quiet)
    lines = [re.sub(r"  \d\d:\d\d left$", "  a while left", line) for line in text.splitlines()]
    left = ["  a while left"] * 20 + [""]
    figures = "reward 0.500  accuracy 0.250  brevity 1.500  cpl 0.750"
    shown = [f"step {step}/40  {figures}" for step in (1, *range(2, 41, 2))]
    assert lines == [step + rest for step, rest in zip(shown, left, strict=True)]


@pytest.mark.parametrize(
    ("logged", "last", "shown"),
    [
        (range(1, 11), 100, [1, 5, 10]),
        (range(10, 131, 10), 130, list(range(10, 131, 10))),  # none of them a multiple of 130 // 20
        (range(51, 61), 100, [51, 55, 60]),  # a run that goes on
        (range(1, 4), 3, [1, 2, 3]),
    ],
)
def test_milestones_are_among_the_steps_that_are_logged(logged, last, shown):
    milestones = Milestones(20)
    assert [step for step in logged if milestones.reached(step, last)] == shown


def test_a_single_reward_is_shown_once():
    logs = {name: value for name, value in LOGS.items() if name != "rewards/brevity/mean"}
    assert progress_text(logs) == {"reward": "0.500", "cpl": "0.750"}


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_table_of_samples_fits_and_steers_no_terminal(columns):
    lines = sample_table([SAMPLE, {**SAMPLE, "prompt": "x" * 500, "reward": None, "answer": "y" * 99}], columns)
    assert "\x1b[4m 7\x1b[24m" in lines[1]
    visible = [line.replace("\x1b[4m", "").replace("\x1b[24m", "") for line in lines]
    assert all(line.isprintable() and len(line) <= max(columns, 48) for line in visible)
    assert len({line.index(text) for line, text in zip(visible, ["response", "I see", "I see"], strict=True)}) == 1


def recorder(tmp_path, times, seconds_a_report=0.0):
    """A recorder with a clock set by hand; reports are recorded as (time, refresh)."""
    clock, written = SimpleNamespace(now=0.0), []

    def report(run_dir, *, refresh=None):
        assert json.loads((run_dir / "progress.json").read_text())["last_step"] == 200
        written.append((clock.now, refresh))
        clock.now += seconds_a_report

    args = SimpleNamespace(disable_tqdm=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=200)
    one = RunRecorder(RunDirectory(tmp_path), tuple, report=report, versions={"x": "1"}, now=lambda: clock.now)
    one.on_train_begin(args, state, None)
    for state.global_step, clock.now in enumerate(times, 1):
        one.on_log(args, state, None, {"reward": 0.5})
    return one, args, state, written


def test_a_report_every_ten_seconds(tmp_path):
    one, args, state, written = recorder(tmp_path, [3.0 * step for step in range(1, 12)])
    assert written == [(3.0, 10), (15.0, 10), (27.0, 10)]
    one.on_train_end(args, state, None)
    assert written[-1] == (33.0, 10)
    progress = json.loads((tmp_path / "progress.json").read_text())
    counted = {"step": 11, "last_step": 200, "from_step": 0, "seconds": 33.0}
    assert progress == {**counted, "versions": {"x": "1"}, "fallbacks": []}


def test_a_report_that_takes_long_is_written_less_often(tmp_path):
    *_, written = recorder(tmp_path, [3.0 * step for step in range(1, 60)], seconds_a_report=1.0)
    times = [time for time, _ in written]
    assert all(after - before >= 51 for before, after in pairwise(times))
    assert len(times) > 2


def test_a_run_that_is_broken_off_leaves_a_report_that_waits_for_nothing(tmp_path):
    one, _, state, written = recorder(tmp_path, [3.0])
    one.stop(state)
    assert written[-1][1] is None


def test_other_processes_write_nothing(tmp_path):
    args = SimpleNamespace(disable_tqdm=False)
    state = SimpleNamespace(is_world_process_zero=False, global_step=1, max_steps=2)
    one = RunRecorder(RunDirectory(tmp_path), tuple)
    one.on_train_begin(args, state, None)
    one.on_log(args, state, None, {"reward": 0.5})
    one.on_train_end(args, state, None)
    one.stop(state)
    assert not list(tmp_path.iterdir())
