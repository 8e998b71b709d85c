"""The seconds of a step by phase: each second counts once, in the innermost phase."""

import ast
import subprocess
import sys

import psutil
import pytest
import torch
from rollout_stubs import inject, make_rows

from cppo.training.phases import PHASES, PhaseClock, peak_memory_mib


class Watch:
    """A clock that is set by hand."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


@pytest.fixture
def watch():
    return Watch()


def test_nested_phases_count_once(watch):
    clock = PhaseClock(now=watch)
    clock.begin_step()
    watch.time += 1  # update
    with clock.phase("rollout"):
        watch.time += 2
        with clock.phase("reward"):
            watch.time += 4
            with clock.phase("reward"):
                watch.time += 8
        watch.time += 16
        with clock.phase("views"):
            watch.time += 32
    with clock.phase("scoring"):
        watch.time += 64
    clock.begin_step()  # the second micro-batch of the same step
    watch.time += 128
    found = clock.end_step()
    assert found == {"rollout": 18, "reward": 12, "views": 32, "scoring": 64, "update": 129}
    assert sum(found.values()) == watch.time - 100


def test_what_lies_between_steps_is_not_counted(watch):
    clock = PhaseClock(now=watch)
    with clock.phase("rollout"):
        watch.time += 1
    clock.begin_step()
    watch.time += 2
    clock.end_step()
    with clock.phase("scoring"):
        watch.time += 4
    clock.begin_step()
    watch.time += 8
    assert clock.end_step() == {**dict.fromkeys(PHASES, 0.0), "update": 8.0}


def test_a_phase_that_fails_ends(watch):
    clock = PhaseClock(now=watch)
    clock.begin_step()

    def fail():
        watch.time += 1
        raise KeyError

    with pytest.raises(KeyError), clock.phase("reward"):
        fail()
    watch.time += 2
    found = clock.end_step()
    assert (found["reward"], found["update"]) == (1, 2)


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
    """Not the peak of the process that started it, from which Linux counts on."""
    rss, ballast = psutil.Process().memory_info().rss / 2**20, bytearray(b"1") * 2**31
    assert peak_memory_mib(torch.device("cpu"))["memory/peak_rss_mib"] > 0.999 * (rss + len(ballast) / 2**20)
    program = (
        "import psutil, torch; from cppo.training.phases import peak_memory_mib\n"
        "print(psutil.Process().memory_info().rss / 2**20, peak_memory_mib(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rss, _, found = child.stdout.partition(" ")
    (peak,) = ast.literal_eval(found.strip()).values()
    assert found.strip() == str({"memory/peak_rss_mib": peak})
    assert 0.999 * float(rss) < peak < len(ballast) / 2**20
