"""What works where TRL, or torch with all that stands on it, is not installed: in an environment that has none."""

import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

import cppo

TRL = ("trl",)
TORCH = ("accelerate", "peft", "torch", "torchvision", "transformers", "trl")
ROOMS = ("data", "methods", "options", "perception", "recipes", "rewards", "tasks", "views")
IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
absent, rooms = (words.split() for words in sys.argv[1:])
assert not any(importlib.util.find_spec(name) for name in absent)
for room in rooms:
    package = importlib.import_module(f"cppo.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
"""


@pytest.fixture(scope="module")
def python_without(tmp_path_factory):
    """Runs this Python on ARGV in an environment of the installed packages but some: links to all others."""

    def run(absent, *argv):
        folder = tmp_path_factory.mktemp("packages")
        hidden = {file.parts[0] for name in absent for file in metadata.distribution(name).files or ()}
        for installed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for path in Path(installed).iterdir():
                # A .pth file, such as that of an editable install, leads back to everything.
                if path.name not in hidden and path.suffix != ".pth":
                    (folder / path.name).symlink_to(path)
        environment = {**os.environ, "PYTHONPATH": f"{Path(cppo.__file__).parents[1]}{os.pathsep}{folder}"}
        command = [sys.executable, "-S", *map(str, argv)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(("absent", "rooms"), [(TRL, ROOMS), (TORCH, set(ROOMS) - {"perception"})])
def test_rooms_import(python_without, absent, rooms):
    done = python_without(absent, "-c", IMPORT_ALL, " ".join(absent), " ".join(rooms))
    assert done.returncode == 0, done.stderr


def test_commands_that_need_no_model(python_without, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")
    views = ["views", "--image", tmp_path / "image.png", "--out", tmp_path / "grid.png"]
    for absent, argv in (
        (TORCH, ["methods", "cppo"]),
        (TORCH, ["recipes", "list"]),
        (TORCH, ["data", "check", "tasks:digits?n=2"]),
        (TORCH, ["verl-data", "tasks:digits?n=2", "--out", tmp_path / "data.parquet"]),
        (TRL, views),
    ):
        done = python_without(absent, "-m", "cppo", *argv)
        assert done.returncode == 0, (argv, done.stderr)
        assert done.stdout


def test_training_says_what_is_missing(python_without):
    done = python_without(TRL, "-m", "cppo", "train", "--max_steps", "1")
    assert (done.returncode, done.stdout) == (2, "")
    remedy = "install the versions that docs/reference/versions.md names"
    assert done.stderr == f"cppo: error: No module named 'trl'; {remedy}\n"
