"""`cppo doctor`: ten lines at most, with a line for each thing, whatever library is missing or broken."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from cppo.cli import doctor
from cppo.cli.main import main

NAMES = ["cppo", "libraries", "trainer", "devices", "kernels", "sharing", "extras", "missing", "settings"]


def test_ten_lines_say_what_is_here(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    text = dict(zip(NAMES, lines, strict=True))
    assert f"torch {importlib.metadata.version('torch')}" in text["libraries"]
    assert "loads" in text["trainer"]
    assert ("no GPU" in text["devices"]) is not torch.cuda.is_available()
    assert "prompts are shared in rollouts and updates" in text["sharing"]
    assert "vllm (use_vllm)" in text["missing"]
    assert "unknown" not in "".join(lines)


@pytest.mark.parametrize("broken", ["torch", "yaml"])
def test_a_broken_library_costs_its_lines_alone(broken, tmp_path):
    """In a process of its own, where the library fails in a way of its own as it is imported."""
    folder = tmp_path / broken
    folder.mkdir()
    (folder / "__init__.py").write_text("raise OSError('libgone.so: cannot open\\nshared object file')\n")
    run = subprocess.run(
        [sys.executable, "-c", "import sys; from cppo.cli.main import main; sys.exit(main(['doctor']))"],
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, "Traceback" in run.stderr) == (0, False), run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert "unknown: " in run.stdout
    assert "libgone.so: cannot open shared object file (OSError)" in run.stdout


def test_a_library_that_is_missing_is_named(monkeypatch):
    def gone(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", gone)
    text = "\n".join(doctor.report())
    assert "torch missing, transformers missing" in text


def test_it_takes_no_arguments(refused):
    assert "unknown option `--verbose`" in refused("doctor", "--verbose")
