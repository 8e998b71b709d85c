"""The checker process: late, crashing, missing, used from many threads, from forks and scripts, and closed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cppo.errors import UserError
from cppo.rewards import accuracy_reward, answers_match, get_accuracy_reward, worker
from cppo.rewards.checker_process import MEMORY_LIMIT_BYTES
from cppo.rewards.worker import CHECKER, EquivalenceWorker, Unfinished, WorkerPool, shared_pool

PATIENT = 60.0
RUNAWAY = "5^{5^{5^{5^5}}}"

# Says 1 to everything, but would take ten minutes over "hang", dies of "crash", works without end on "spin", takes a
# second without working over "slow", and answers "meet FOLDER" when two of its kind have been asked.
STUB = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    question = json.loads(line)
    given = question["given"]
    signal.setitimer(signal.ITIMER_PROF, question["seconds"])
    if given == "hang":
        time.sleep(600)
    if given == "slow":
        time.sleep(1)
    while given == "spin":
        pass
    if given.startswith("meet "):
        folder = pathlib.Path(given.removeprefix("meet "))
        (folder / str(os.getpid())).touch()
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.01)
    if given == "crash":
        os._exit(3)
    print(1, flush=True)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    path = tmp_path / "a folder" / "stub.py"
    path.parent.mkdir()
    path.write_text(STUB)
    monkeypatch.setattr(worker, "CHECKER", path)
    with_stub = EquivalenceWorker(questions_per_process=5)
    yield with_stub
    with_stub.close()


def is_gone(pid: int) -> bool:
    """No such process, and none of our children waits to be reaped (a zombie would still take the signal)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("fatal", "timeout"), [("hang", 0.03), ("spin", 0.3), ("crash", PATIENT)])
def test_a_late_or_crashing_checker_is_told_and_replaced(stub, fatal, timeout):
    assert stub.equivalent("fine", "x", PATIENT) is True
    first = stub.pid
    with pytest.raises(Unfinished):
        stub.equivalent(fatal, "x", timeout)
    assert is_gone(first)
    assert stub.pid is None
    assert stub.equivalent("fine", "x", PATIENT) is True
    assert stub.pid != first


def test_a_checker_killed_between_two_questions_is_replaced(stub):
    assert stub.equivalent("fine", "x", PATIENT) is True
    os.kill(stub.pid, signal.SIGKILL)
    os.waitid(os.P_PID, stub.pid, os.WEXITED | os.WNOWAIT)
    assert stub.equivalent("fine", "x", PATIENT) is True


def test_close_leaves_no_child_and_may_be_followed_by_a_question(stub):
    stub.close()
    assert stub.equivalent("fine", "x", PATIENT) is True
    pid = stub.pid
    stub.close()
    stub.close()
    assert is_gone(pid)
    assert stub.equivalent("fine", "x", PATIENT) is True


def test_a_checker_is_renewed_after_its_share_of_questions(stub):
    pids = []
    for _ in range(11):
        assert stub.equivalent("fine", "x", PATIENT) is True
        pids.append(stub.pid)
    assert [pid is None for pid in pids] == [number % 5 == 0 for number in range(1, 12)]
    assert len({pid for pid in pids if pid is not None}) == 3


def test_time_in_which_the_checker_does_not_work_is_not_counted(stub):
    """A second by the clock with 0.2 seconds of processor time allowed, as on a busy machine."""
    assert stub.equivalent("slow", "x", 0.2) is True


def test_after_the_deadline_nothing_is_awaited(stub):
    with pytest.raises(Unfinished):
        stub.equivalent("fine", "x", PATIENT, deadline=time.monotonic())
    with pytest.raises(Unfinished):
        stub.equivalent("hang", "x", PATIENT, deadline=time.monotonic() + 0.2)


@pytest.fixture
def pool(stub, monkeypatch):
    """Of two stubs, and the pool that rewards share."""
    with_stubs = WorkerPool(2)
    monkeypatch.setattr(worker, "_shared_pool", with_stubs)
    yield with_stubs
    with_stubs.close()


def test_many_threads_share_the_workers(pool):
    questions = ["fine", "crash"] * 8
    verdicts: dict[int, bool] = {}

    def ask(number: int) -> None:
        try:
            verdicts[number] = pool.equivalent(questions[number], "x", PATIENT)
        except Unfinished:
            verdicts[number] = False

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: question == "fine" for number, question in enumerate(questions)}


def test_two_checkers_work_at_once(pool, tmp_path):
    """Each of two questions is answered once the other is asked too."""
    folder = tmp_path / "met"
    folder.mkdir()
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(pool.equivalent, f"meet {folder}", "x", PATIENT) for _ in range(2)]
        assert [question.result() for question in asked] == [True, True]
    assert len(pool.pids) == 2


def test_a_checker_that_is_free_is_asked_again(pool):
    for _ in range(4):
        assert pool.equivalent("fine", "x", PATIENT) is True
    assert len(pool.pids) == 1


@pytest.fixture
def spinning(pool, monkeypatch):
    """Every comparison by math-verify of `2x` with anything runs away."""
    asked = pool.equivalent
    monkeypatch.setattr(pool, "equivalent", lambda given, *rest: asked("spin" if given == "2x" else "fine", *rest))


def test_a_batch_of_runaway_answers_ends_within_its_budget(spinning, caplog):
    """Sixteen answers of up to 3 seconds each have 0.3 seconds together; the others stay right or wrong as they are."""
    texts = [r"\boxed{5}", r"\boxed{6}"] + [r"\boxed{2x}"] * 16
    answers = ["5", "5"] + [f"{number}x" for number in range(3, 19)]
    logged = {}
    reward = get_accuracy_reward(budget=0.3)
    assert reward(texts, answers, log_metric=logged.__setitem__) == [1.0] + [0.0] * 17
    assert logged == {"rewards/accuracy_reward/unfinished": 16.0}
    assert caplog.messages == ["accuracy_reward: 16 of 18 answers took too long to compare, and count as wrong"]


def test_answers_that_are_compared_in_time_are_no_trouble(pool, caplog):
    logged = {}
    texts = [rf"\boxed{{{number}x}}" for number in range(4)]
    assert accuracy_reward(texts, ["9x"] * 4, log_metric=logged.__setitem__) == [1.0] * 4
    assert logged == {"rewards/accuracy_reward/unfinished": 0.0}
    assert not caplog.messages


@pytest.mark.parametrize("script", ["raise SystemExit(1)", "import time; time.sleep(600)", "print('hello')"])
def test_a_checker_that_cannot_start_is_one_clear_error(tmp_path, monkeypatch, script):
    path = tmp_path / "broken.py"
    path.write_text(script)
    monkeypatch.setattr(worker, "CHECKER", path)
    monkeypatch.setattr(worker, "START_TIMEOUT_SECONDS", 1.0)
    broken = EquivalenceWorker()
    with pytest.raises(UserError, match="rewards: the answer checker does not start; install math-verify"):
        broken.equivalent("1", "1", PATIENT)
    assert broken.pid is None


def test_real_runaway_answers_are_stopped_and_the_next_answer_is_right():
    real = EquivalenceWorker()
    assert real.equivalent("2x+1", "1+2x", PATIENT) is True
    first = real.pid
    with pytest.raises(Unfinished):
        real.equivalent(RUNAWAY, "2^{x}", 0.5)
    assert is_gone(first)
    for text in ("5^5^5^5^5", "(" * 900):
        with contextlib.suppress(Unfinished):
            assert real.equivalent(text, "5", 0.5) is False
    assert real.equivalent("2x+1", "1+2x", PATIENT) is True
    last = real.pid
    real.close()
    assert is_gone(last)


def test_text_that_is_no_valid_unicode_is_no_error():
    assert answers_match("5\ud800^2", "25", PATIENT) is False
    assert answers_match("5\x00^2", "26", PATIENT) is False
    shared_pool().close()


def run_script(script: str) -> list[str]:
    return subprocess.check_output([sys.executable, "-c", script], text=True, timeout=300).split()


def test_works_from_a_command_line_script_and_ends_with_it():
    verdict, pid = run_script(
        "from cppo.rewards import answers_match\n"
        "from cppo.rewards.worker import shared_pool\n"
        "print(answers_match('2x+1', '1+2x', 60.0), *shared_pool().pids)"
    )
    assert verdict == "True"
    assert is_gone(int(pid))


def test_a_forked_child_has_its_own_checker():
    lines = run_script(
        "import os\n"
        "from cppo.rewards import answers_match\n"
        "from cppo.rewards.worker import shared_pool\n"
        "def ask():\n"
        "    print(answers_match('2x+1', '1+2x', 60.0), *shared_pool().pids, flush=True)\n"
        "ask()\n"
        "if os.fork() == 0:\n"
        "    ask()\n"
        "    shared_pool().close()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "ask()"
    )
    assert lines[0::2] == ["True"] * 3
    parent, child, parent_again = lines[1::2]
    assert parent == parent_again != child


@pytest.fixture
def checker():
    process = subprocess.Popen([sys.executable, "-P", str(CHECKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_the_checker_ends_when_its_parent_is_gone(checker):
    checker.stdin.close()
    assert checker.wait(timeout=120) == 0


def test_the_checker_limits_its_own_memory_and_processor_time(checker):
    limits = Path(f"/proc/{checker.pid}/limits").read_text()
    (address_space,) = [line.split()[3] for line in limits.splitlines() if line.startswith("Max address space")]
    assert int(address_space) == MEMORY_LIMIT_BYTES
    question = {"given": RUNAWAY, "expected": "2^{x}", "seconds": 0.5, "tolerance": 0.0}
    checker.stdin.write(json.dumps(question).encode() + b"\n")
    checker.stdin.flush()
    assert checker.wait(timeout=300) == -signal.SIGPROF
