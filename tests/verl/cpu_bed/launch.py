"""Runs `python -m cppo.verl` on the CPU, in processes of its own, and reads what it left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cppo
from cppo.assets import MICRO_DIR

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "0,1",  # Ray starts no more devices than it names; none is looked for
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",  # by default the workers yield to everything else on the machine
    "TOKENIZERS_PARALLELISM": "false",
    "VERL_ENGINE_DEVICE": "cuda",  # the engines that the CPU's process looks for are registered for it
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "cpu_bed.platform",
    "VERL_USE_EXTERNAL_PLUGINS": "none",
}
OPTIONS: dict[str, Any] = {
    "actor_rollout_ref.model.path": MICRO_DIR,
    "actor_rollout_ref.model.external_lib": "cpu_bed.rollout",
    "actor_rollout_ref.model.use_remove_padding": False,  # packed rows need flash-attn
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype": "fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype": "fp32",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 8192,
    "actor_rollout_ref.rollout.name": "cpu",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.agent.num_workers": 1,
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module": "cpu_bed.weights",
    "data.max_prompt_length": 64,
    "data.max_response_length": 80,
    "data.dataloader_num_workers": 0,
    "data.seed": 0,
    "reward.num_workers": 1,
    "trainer.device": "cpu",
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 1,
    "trainer.logger": "[file]",
    "trainer.val_before_train": False,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "ray_kwargs.ray_init.num_cpus": 16,  # logical: every actor takes one
    "+ray_kwargs.ray_init.num_gpus": 1,
    "+ray_kwargs.ray_init.include_dashboard": False,
}
MODES: dict[str, dict[str, Any]] = {
    "sync": {},
    "colocate_async": {},
    "separate_async": {
        "actor_rollout_ref.rollout.nnodes": 1,
        "actor_rollout_ref.rollout.n_gpus_per_node": 1,
        "actor_rollout_ref.rollout.checkpoint_engine.backend": "mailbox",
        "trainer.v1.separate_async.parameter_sync_step": 1,
        "+ray_kwargs.ray_init.num_gpus": 2,
    },
}
"""verl's modes, and what each needs beside `OPTIONS`: rollouts apart from training need a device of their own."""


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        folder: has its checkpoints, and `log.txt`: all that the processes printed.
        status: exit status.
        seconds: it took, from start to end.
        metrics: of each step, by verl's names.
        rollouts: of each step, `trainer.rollout_data_dir`'s rows: input, output, score, uid and others.
    """

    folder: Path
    status: int
    seconds: float
    metrics: list[dict[str, Any]]
    rollouts: list[list[dict[str, Any]]]

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")


def launch(folder: Path, mode: str, options: dict[str, Any], *, seconds: float) -> Run:
    """Train on the CPU with `OPTIONS`, the mode's and `options` until the end, or for `seconds` at most.

    No process is left.

    Raises subprocess.TimeoutExpired.
    """
    folder.mkdir(parents=True, exist_ok=True)
    since = time.monotonic()
    # The names of Ray's sockets lie below this folder, and may have 107 bytes.
    ray_folder = Path(tempfile.mkdtemp(prefix="cppo-ray-", dir="/tmp"))
    own = {
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.rollout_data_dir": folder / "rollouts",
        "+ray_kwargs.ray_init._temp_dir": ray_folder,
    }
    chosen = {**OPTIONS, **MODES[mode], "trainer.v1.trainer_mode": mode, **own, **options}
    words = [f"{name}={'null' if value is None else value}" for name, value in chosen.items()]
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(Path(cppo.__file__).parents[1])]),
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
    }
    try:
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cppo.verl", *words],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                status = process.wait(seconds)
            finally:
                process.kill()
                process.wait()
    finally:
        end_ray(ray_folder)
        shutil.rmtree(ray_folder, ignore_errors=True)
    rows = [json.loads(line) for line in _lines(folder / "metrics.jsonl")]
    files = sorted((folder / "rollouts").glob("*.jsonl"), key=lambda file: int(file.stem))
    rollouts = [[json.loads(line) for line in _lines(file)] for file in files]
    return Run(folder, status, time.monotonic() - since, [row["data"] for row in rows], rollouts)


def end_ray(folder: Path) -> None:
    """End the processes of the Ray session in `folder`, should some have outlived their driver."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            if str(folder).encode() in command:
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
