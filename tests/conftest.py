"""What holds for every test and the processes that it starts, set before torch is loaded."""

import os

import pytest
from small_model import SMALL

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Folder of an untrained model that answers at once, as text; no test changes it."""
    from cppo.assets.build import build_micro

    return str(build_micro(tmp_path_factory.mktemp("untrained") / "model", **SMALL))


@pytest.fixture
def refused(capsys):
    """Runs `cppo ARGV`, which must end with status 2 and one line on stderr alone; what the line says."""
    from cppo.cli.main import main

    def run(*argv):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("cppo: error: ")
        assert captured.err.count("\n") == 1
        return captured.err.removeprefix("cppo: error: ").strip()

    return run
