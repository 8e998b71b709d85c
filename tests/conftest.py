"""What holds for every test and the processes that it starts, set before torch is loaded."""

import os
from pathlib import Path

import pytest
from hub_server import HubServer
from small_model import SMALL

from cppo.verl.versions import installed

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # how long work takes decides no test


INSIDE_VERL = Path(__file__).parent / "verl"


def pytest_ignore_collect(collection_path):
    """tests/verl runs where verl is installed, all else where TRL is; the two never are together."""
    inside = collection_path.is_relative_to(INSIDE_VERL)
    if installed("verl") is None:
        return inside or None
    return not (inside or INSIDE_VERL.is_relative_to(collection_path)) or None


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Folder of an untrained model that answers at once, as text; no test changes it."""
    from cppo.assets.build import build_micro

    return str(build_micro(tmp_path_factory.mktemp("untrained") / "model", **SMALL))


@pytest.fixture
def shows_progress(monkeypatch):
    """Lets this process show its progress."""
    monkeypatch.delenv("TQDM_DISABLE")


@pytest.fixture
def noted_progress(monkeypatch, shows_progress):
    """What every update of counted work would say, as lines."""
    from cppo.progress import Progress, progress_line

    lines, update = [], Progress.update

    def noted(self, n=1):
        shown = update(self, n)
        lines.append(progress_line(self.format_dict))
        return shown

    monkeypatch.setattr(Progress, "update", noted)
    return lines


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


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A hub on the loopback, empty, in place of the real one for this process and those that it starts.

    `hub.add("ORG/NAME", {"data/train.parquet": bytes})` puts a data set on it; see `HubServer`. What is fetched lies in
    `hub.cache`, which no other test shares.
    """
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import _cache_assets

    with HubServer() as server:
        server.cache = tmp_path_factory.mktemp("hub")
        for name, value in server.environment(server.cache).items():
            monkeypatch.setenv(name, value)
        # The libraries read the variables once, as they are imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache / "hub"))
        monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(server.cache / "assets"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", server.cache / "datasets")
        yield server
