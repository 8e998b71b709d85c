"""The hub of the tests, through the real client: files come whole, and an interrupted download resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download


def test_a_repository_comes_whole_and_once(hub):
    files = {"README.md": b"# Data", "a/b.bin": bytes(range(256)), "c d.json": b"{}"}
    commit = hub.add("org/name", files)
    folder = Path(snapshot_download("org/name", repo_type="dataset"))
    assert folder.name == commit
    assert folder.is_relative_to(hub.cache)
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    snapshot_download("org/name", repo_type="dataset")
    assert [len(hub.downloads(path)) for path in files] == [1, 1, 1]
    sizes = {
        file.rfilename: file.size for file in HfApi(hub.url).dataset_info("org/name", files_metadata=True).siblings
    }
    assert sizes == {path: len(data) for path, data in files.items()}


def test_an_interrupted_download_goes_on(hub):
    data = os.urandom(11_000_000)  # the client keeps what it has by pieces of 10 MiB
    hub.add("org/model", {"model.safetensors": data}, kind="model")
    hub.drop_once("model.safetensors", after=10_600_000)
    assert Path(hf_hub_download("org/model", "model.safetensors")).read_bytes() == data
    assert [request.range for request in hub.downloads("model.safetensors")] == ["", "bytes=10485760-"]


def test_other_processes_use_it_too(hub):
    hub.add("org/name", {"a.json": b"{}"})
    code = "import huggingface_hub; print(huggingface_hub.hf_hub_download('org/name', 'a.json', repo_type='dataset'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(hub.cache)


def test_what_is_not_there(hub):
    hub.add("org/name", {"a.json": b"{}"})
    with pytest.raises(errors.RepositoryNotFoundError):
        snapshot_download("org/other", repo_type="dataset")
    with pytest.raises(errors.RepositoryNotFoundError):
        snapshot_download("org/name")
    with pytest.raises(errors.EntryNotFoundError):
        hf_hub_download("org/name", "b.json", repo_type="dataset")
