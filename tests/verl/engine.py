"""Starts `engine_job.py` under torchrun, in the requested number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cppo

TESTS = Path(__file__).parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{Path(cppo.__file__).parents[1]}{os.pathsep}{TESTS}",
    "PYTHONWARNINGS": "ignore",
    "VERL_ENGINE_DEVICE": "cuda",  # for which verl registers the engines
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "cpu_bed.platform",
}


def run(folder: Path, cases: dict[str, dict[str, Any]], processes: int) -> dict[str, Any]:
    """The result of each case, by name; see `engine_job`."""
    given, out = folder / "cases.json", folder / "out.json"
    given.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    job = subprocess.run(
        [*command, str(TESTS / "engine_job.py"), str(given), str(out)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-6000:]
    return json.loads(out.read_text())
