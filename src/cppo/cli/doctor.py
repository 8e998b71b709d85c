"""`cppo doctor`: versions, devices, kernels and what is missing for what, in ten lines for a report of a fault.

Every line is made on its own, and one that cannot be made says why: a library may be missing or broken.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version

from cppo import __version__
from cppo.errors import one_line

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers")
FAMILY = "qwen2_5_vl"
"""The family on which shared prompts are tried: that of the published runs."""
WORDS = 40
"""Number of words of an error that a line shows."""


def run(argv: Sequence[str]) -> None:
    """Print the lines. Raises UserError for any argument."""
    with suppress(OSError, ImportError, RuntimeError):  # a library that the parser needs is broken: the lines say so
        from cppo.cli.parser import Parser

        parser = Parser(
            prog="cppo doctor",
            description="Prints versions, devices, kernels and what is missing for what, in at most ten lines to paste "
            "into an issue.",
        )
        parser.parse_all(argv)
    for line in report():
        print(line)


def report() -> Iterator[str]:
    """The lines, one after the other."""
    lines: dict[str, Callable[[], str]] = {
        "cppo": _system,
        "libraries": _libraries,
        "trainer": _trainer,
        "devices": _devices,
        "kernels": _kernels,
        "sharing": _sharing,
        "extras": _extras,
        "missing": _missing,
        "settings": _settings,
    }
    for name, line in lines.items():
        yield f"{name:<10} {_tried(line)}"


def _tried(line: Callable[[], str]) -> str:
    try:
        with redirect_stdout(sys.stderr):  # some libraries print as they are imported
            return line()
    except (Exception, SystemExit) as error:  # whatever a broken library raises as it is imported
        return f"unknown: {' '.join(one_line(error).split()[:WORDS])} ({type(error).__name__})"


def _system() -> str:
    return f"{__version__}, Python {platform.python_version()}, {platform.platform()}"


def _libraries() -> str:
    return ", ".join(f"{name} {_version(name) or 'missing'}" for name in LIBRARIES)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _trainer() -> str:
    """Whether the trainer loads with these versions."""
    from cppo.training import check_versions
    from cppo.upstream import check_needed_parts

    check_versions(version("trl"), version("transformers"))
    check_needed_parts()
    return "loads, and the parts of TRL and transformers that it needs pass their checks"


def _devices() -> str:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores} CPU cores (threads: {torch.get_num_threads()})"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        parts.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB of memory")
    if not torch.cuda.is_available():
        built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
        known = next((f"{name} {number}" for name, number in built.items() if number), "the CPU")
        return ", ".join([*parts, f"no GPU (torch is built for {known})"])
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        parts.append(f"GPU {number}: {found.name}, {found.total_memory / 2**30:.0f} GiB, {found.major}.{found.minor}")
    return ", ".join([*parts, f"CUDA {torch.version.cuda}"])


def _kernels() -> str:
    """Which attention packed rows and vision towers compute, where heads have the published sizes."""
    import torch

    from cppo.policy.varlen import no_varlen_reason

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = no_varlen_reason(device, torch.bfloat16, 128)
    if reason is None:
        return "torch's varlen_attn in bfloat16 for packed rows and vision towers"
    return f"SDPA for packed rows and vision towers: {reason}"


def _sharing() -> str:
    from cppo.upstream import PACKED_ATTENTION, SHARED_PREFILL

    lost = [SHARED_PREFILL.missing(FAMILY), PACKED_ATTENTION.missing(FAMILY, "sdpa")]
    return "; ".join(line for line in lost if line) or f"prompts are shared in rollouts and updates ({FAMILY})"


def _optional() -> dict[str, str]:
    """Packages that are installed apart, and the options that need them."""
    from cppo.runs.checks import OPTIONAL_PACKAGES
    from cppo.runs.loggers import LOGGERS

    needed: dict[str, list[str]] = {}
    for option, package in OPTIONAL_PACKAGES.items():
        needed.setdefault(package, []).append(option)
    found = {package: " or ".join(options) for package, options in needed.items()}
    return found | {logger: f"report_to {logger}" for logger in LOGGERS} | {"num2words": "SmolVLM2"}


def _extras() -> str:
    there = [f"{name} {_version(name) or ''}".strip() for name in _optional() if _found(name)]
    return ", ".join(there) or "none of the optional packages"


def _missing() -> str:
    lacking = [f"{name} ({needed})" for name, needed in _optional().items() if not _found(name)]
    return ", ".join(lacking) or "nothing"


def _found(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def _settings() -> str:
    """Variables that change how libraries run; their names and values hold no keys."""
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTORCH_ALLOC_CONF", "ACCELERATE_USE_FSDP")
    given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return ", ".join(given) or "no variable of torch or the hub is set"
