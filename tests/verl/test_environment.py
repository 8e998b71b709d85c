"""The environment of the documents' two lines: the promised modules import; others report that they need TRL."""

import importlib
import pkgutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.version import Version
from test_without_trl import ROOMS

from cppo.verl.versions import check_versions


@pytest.mark.parametrize("room", [*ROOMS, "verl"])
def test_rooms_import_beside_verl(room):
    package = importlib.import_module(f"cppo.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name != "cppo.verl.__main__":
            importlib.import_module(module.name)
    assert "trl" not in sys.modules


def test_the_versions_go_together():
    check_versions()
    assert Version(version("transformers")) < Version("5.11")
    with pytest.raises(PackageNotFoundError):
        version("trl")


def test_a_command_that_needs_trl_reports_where_it_runs(tmp_path):
    command = [sys.executable, "-m", "cppo", "train", "--max_steps", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "No module named 'trl'; in this environment `python -m cppo.verl` trains" in done.stderr
    assert "pip install -c constraints.txt -e ." in done.stderr
