"""Rebuild the embedded micro VLM from nothing: `python -m cppo.assets.rebuild` (`make micro` runs it).

It writes the untrained model, trains it with `cppo sft` stage by stage, and replaces the packaged files with the
trained weights and the untrained model's other files. The stages are the packaged recipes in STAGES; each starts from
the previous stage's folder, below the current directory.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cppo.assets import MICRO_DIR
from cppo.progress import Progress
from cppo.recipes import load_recipe

STAGES = ("micro-warmup", "micro-sft", "micro-balance")
WEIGHTS = "model.safetensors"


def rebuild(destination: Path, extra_options: Sequence[str] = ()) -> None:
    """Build, train and install into `destination`; `extra_options` go to every stage's `cppo sft`.

    Raises subprocess.CalledProcessError at the first failed stage; `destination` is then unchanged.
    """
    recipes = [load_recipe("sft", name) for name in STAGES]
    with Progress(desc="build the untrained model"):
        from cppo.assets.build import build_micro  # imports torch, which can take long

        untrained = build_micro(recipes[0].options.model, seed=0)
    for number, name in enumerate(STAGES, 1):
        print(f"stage {name} ({number} of {len(STAGES)})", flush=True)
        command = [sys.executable, "-m", "cppo", "sft", "--config", name, "--overwrite", "true"]
        subprocess.run([*command, *extra_options], check=True)
    destination.mkdir(parents=True, exist_ok=True)
    for file in untrained.iterdir():
        source = Path(recipes[-1].output_dir) if file.name == WEIGHTS else untrained
        shutil.copyfile(source / file.name, destination / file.name)


if __name__ == "__main__":
    rebuild(MICRO_DIR)
