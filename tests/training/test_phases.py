"""The seconds of a step by phase: each second counts once, in the innermost phase."""

import ast
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from rollout_stubs import inject, make_rows

from cppo.training.telemetry import PHASES, StepCosts, peak_memory_mib, phase_seconds


@pytest.fixture
def watch(monkeypatch):
    """A step's costs under a clock set by hand: `watch.time`."""
    clock = SimpleNamespace(time=100.0)
    monkeypatch.setattr("cppo.training.telemetry.time.perf_counter", lambda: clock.time)
    clock.reported = {}
    clock.costs = StepCosts(torch.device("cpu"), clock.reported.__setitem__)
    clock.begin, clock.phase = clock.costs.begin, clock.costs.phase
    return clock


def end_step(watch):
    """The reported seconds of the step."""
    watch.costs.on_step_end(None, None, None)
    return {phase: watch.reported[f"time/{phase}"] for phase in PHASES}


def test_nested_phases_count_once(watch):
    watch.begin()
    watch.time += 1  # update
    with watch.phase("rollout"):
        watch.time += 2
        with watch.phase("reward"):
            watch.time += 4
            with watch.phase("reward"):
                watch.time += 8
        watch.time += 16
        with watch.phase("views"):
            watch.time += 32
    with watch.phase("scoring"):
        watch.time += 64
    watch.begin()  # the second micro-batch of the same step
    watch.time += 128
    found = end_step(watch)
    assert found == {"rollout": 18, "reward": 12, "views": 32, "scoring": 64, "update": 129}
    assert sum(found.values()) == watch.time - 100


def test_time_between_steps_is_not_counted(watch):
    with watch.phase("rollout"):
        watch.time += 1
    watch.begin()
    watch.time += 2
    assert end_step(watch)["update"] == 2
    with watch.phase("scoring"):
        watch.time += 4
    watch.begin()
    watch.time += 8
    assert end_step(watch) == {**dict.fromkeys(PHASES, 0.0), "update": 8.0}


def test_a_phase_that_fails_ends(watch):
    watch.begin()

    def fail():
        watch.time += 1
        raise KeyError

    with pytest.raises(KeyError), watch.phase("reward"):
        fail()
    watch.time += 2
    found = end_step(watch)
    assert (found["reward"], found["update"]) == (1, 2)


def test_marks_of_no_step_are_no_seconds():
    assert phase_seconds([]) == phase_seconds([(5.0, None)]) == dict.fromkeys(PHASES, 0.0)


def test_a_gpu_is_waited_for_once_a_step(monkeypatch):
    """Its events come when the GPU reaches them, in milliseconds here; the host recorded all of them long before."""
    reaches, waited = iter([10.0, 15.0, 40.0, 41.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at, self.come = None, False

        def record(self, stream):
            assert stream == "its stream"
            self.at = next(reaches)

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, later):
            assert later.at <= waited[0]
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "its stream")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    reported = {}
    costs = StepCosts(torch.device("cuda"), reported.__setitem__)
    costs.begin()
    with costs.phase("scoring"):
        pass
    costs.on_step_end(None, None, None)
    found = {phase: reported[f"time/{phase}"] for phase in PHASES}
    assert {phase: seconds for phase, seconds in found.items() if seconds} == pytest.approx(
        {"update": 0.006, "scoring": 0.025}
    )
    assert waited == [41.0]


@pytest.mark.parametrize("options", [{}, {"method": "grpo"}])
def test_a_step_logs_its_phases_and_memory(make_trainer, options):
    trainer = inject(make_trainer(make_rows([1, 1, 1, 1]), gradient_accumulation_steps=2, max_steps=2, **options))
    trainer.train()
    steps = [log for log in trainer.state.log_history if "reward" in log]
    assert len(steps) == 2
    for log in steps:
        assert {name for name in log if name.startswith("time/")} == {f"time/{phase}" for phase in PHASES}
        assert all(log[f"time/{phase}"] > 0 for phase in PHASES if phase != "views" or not options)
        assert log["memory/peak_rss_mib"] > 100  # torch alone takes as much
    if options:
        assert steps[0]["time/views"] == 0


def test_memory_of_a_cpu_run_is_this_processs_peak_and_names_no_gpu():
    """Not the peak of its parent process, where Linux starts the count."""
    rss, ballast = psutil.Process().memory_info().rss / 2**20, bytearray(b"1") * 2**31
    assert peak_memory_mib(torch.device("cpu"))["memory/peak_rss_mib"] > 0.999 * (rss + len(ballast) / 2**20)
    program = (
        "import psutil, torch; from cppo.training.telemetry import peak_memory_mib\n"
        "print(psutil.Process().memory_info().rss / 2**20, peak_memory_mib(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rss, _, found = child.stdout.partition(" ")
    (peak,) = ast.literal_eval(found.strip()).values()
    assert found.strip() == str({"memory/peak_rss_mib": peak})
    assert 0.999 * float(rss) < peak < len(ballast) / 2**20
