"""The CPU as a platform of verl. `VERL_USE_EXTERNAL_MODULES=cpu_bed.platform VERL_PLATFORM=cpu` chooses it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

MEMORY_BYTES = 8 << 30
"""What the pretended device holds; verl only reports it."""


class CPUDevice:
    """What verl asks of `torch.cuda`: memory counts are 0, and what has no meaning on a CPU does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "memory_" in name:
            return lambda *args, **kwargs: 0
        return getattr(torch.cpu, name, lambda *args, **kwargs: None)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY_BYTES, MEMORY_BYTES

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """One CPU device a process; Ray counts it as the "GPU" that `ray.init(num_gpus=...)` declares."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CPUDevice()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def one_backend_a_device(init_process_group: Any) -> Any:
    """verl asks for the CPU's backend and the device's, here "cpu:gloo,cpu:gloo", and torch refuses a device twice."""

    @functools.wraps(init_process_group)
    def init(backend: str | None = None, **options: Any) -> None:
        init_process_group(",".join(dict.fromkeys((backend or "gloo").split(","))), **options)

    return init


torch.distributed.init_process_group = one_backend_a_device(torch.distributed.init_process_group)
