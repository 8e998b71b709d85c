"""Long work shows its life: what the heartbeat says, and when, by a clock that is set by hand."""

import io
import sys
from types import SimpleNamespace

import pytest

from cppo.progress import SILENT_SECONDS, Heartbeat, Progress, progress_line, say, time_left

pytestmark = pytest.mark.usefixtures("shows_progress")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return SimpleNamespace(now=100.0)


@pytest.fixture
def heartbeat(clock, monkeypatch):
    monkeypatch.setattr("cppo.progress.BEAT_SECONDS", 3600.0)  # this test beats by hand
    return Heartbeat(lambda: clock.now)


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_line_is_printed_after_a_silence_and_no_sooner(heartbeat, clock, capsys):
    with Progress(total=8, desc="check rows.jsonl", unit="rows", heartbeat=heartbeat) as work:
        work.update(2)
        clock.now += SILENT_SECONDS - 0.01
        heartbeat.beat()
        assert lines(capsys) == []
        clock.now += 0.01
        heartbeat.beat()
        heartbeat.beat()
        (line,) = lines(capsys)
        assert line.startswith("check rows.jsonl: 25 %, 2 of 8 rows, 00:0")
        assert line.endswith(" left")
        clock.now += SILENT_SECONDS
        heartbeat.beat()
        assert len(lines(capsys)) == 1
    clock.now += SILENT_SECONDS
    heartbeat.beat()
    assert lines(capsys) == []


def test_the_innermost_work_speaks_and_quiet_work_silences_all_of_it(heartbeat, clock, capsys):
    def said():
        clock.now += SILENT_SECONDS
        heartbeat.beat()
        return [line.partition(":")[0] for line in lines(capsys)]

    with Progress(desc="cppo train", heartbeat=heartbeat):
        with Progress(desc="load micro", heartbeat=heartbeat):
            assert said() == ["load micro"]
        assert said() == ["cppo train"]
        with (
            Progress(desc="train", quiet=True, heartbeat=heartbeat),
            Progress(total=3, desc="before", heartbeat=heartbeat),
        ):
            assert said() == []
        assert said() == ["cppo train"]


def test_a_terminal_has_a_bar_that_is_drawn_anew_without_an_update(heartbeat, clock, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(total=4, desc="unpack", heartbeat=heartbeat) as bar:
        bar.update(2)
        before = len(stream.getvalue())
        heartbeat.beat()
        drawn = stream.getvalue()[before:]
        with Progress(desc="load micro", heartbeat=heartbeat):  # a line inside would break the bar
            clock.now += SILENT_SECONDS
            heartbeat.beat()
    assert "50%|" in drawn
    assert "load micro" not in stream.getvalue()
    assert "\n" not in stream.getvalue()


def test_work_around_a_bar_takes_no_line_of_the_terminal(heartbeat, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(desc="cppo eval", heartbeat=heartbeat), Progress(total=4, desc="clean", heartbeat=heartbeat) as bar:
        bar.update(2)
        heartbeat.beat()
    assert "50%|" in stream.getvalue()
    assert "\n" not in stream.getvalue()


def test_work_that_cannot_be_counted_is_a_line_on_a_terminal_too(heartbeat, clock, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(desc="load micro", heartbeat=heartbeat):
        clock.now += SILENT_SECONDS
        heartbeat.beat()
    assert stream.getvalue() == "load micro: 00:00 so far\n"


def test_the_first_process_of_a_launcher_alone_speaks(heartbeat, clock, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with Progress(total=4, desc="check", heartbeat=heartbeat) as work:
        work.update(2)
        clock.now += SILENT_SECONDS
        heartbeat.beat()
    assert lines(capsys) == []


def test_tqdms_own_variable_hides_it(heartbeat, clock, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with Progress(total=4, desc="check", heartbeat=heartbeat) as work:
        work.update(2)
        clock.now += SILENT_SECONDS
        heartbeat.beat()
        assert time_left(work.format_dict) == ""
    assert lines(capsys) == []


def test_a_line_that_is_said_counts_as_life(clock, monkeypatch, capsys):
    monkeypatch.setattr("cppo.progress.BEAT_SECONDS", 3600.0)
    heartbeat = Heartbeat(lambda: clock.now)
    monkeypatch.setattr("cppo.progress.HEARTBEAT", heartbeat)
    with Progress(desc="train", heartbeat=heartbeat):
        clock.now += SILENT_SECONDS - 1
        say("step 1/2")
        clock.now += SILENT_SECONDS - 1
        heartbeat.beat()
    assert lines(capsys) == ["step 1/2"]


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({"n": 50, "total": 200, "elapsed": 30.0}, "x: 25 %, 50 of 200 rows, 01:30 left"),
        ({"n": 150, "total": 200, "initial": 100, "elapsed": 30.0}, "x: 75 %, 150 of 200 rows, 00:30 left"),
        ({"n": 0, "total": 200, "elapsed": 9.0}, "x: 0 %, 0 of 200 rows, 00:09 so far"),
        ({"n": 64, "total": None, "elapsed": 9.0}, "x: 64 rows, 00:09 so far"),
        ({"n": 0, "total": None, "elapsed": 9.0}, "x: 00:09 so far"),
        ({"n": 1.4, "total": 4, "elapsed": 9.0}, "x: 35 %, 1.4 of 4 rows, 00:16 left"),
        (
            {"n": 2**20, "total": 2**21, "elapsed": 1.0, "unit": "B", "unit_scale": True},
            "x: 50 %, 1.05MB of 2.10MB, 00:01 left",
        ),
    ],
)
def test_a_line_says_how_far_and_how_long(state, line):
    assert progress_line({"prefix": "x: ", "initial": 0, "unit": "rows", "unit_scale": False, **state}) == line


def test_the_thread_beats_by_itself(monkeypatch):
    import threading

    monkeypatch.setattr("cppo.progress.BEAT_SECONDS", 0.0)
    beaten = threading.Event()
    heartbeat = Heartbeat()
    monkeypatch.setattr(heartbeat, "beat", beaten.set)
    with Progress(desc="load", heartbeat=heartbeat):
        assert beaten.wait(30)
