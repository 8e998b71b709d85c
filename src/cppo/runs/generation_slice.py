"""Number of rollouts that a GPU generates at a time, if the recipe leaves it open: as many as fit by `cppo plan`."""

import torch
from transformers import AutoConfig

from cppo.assets import adapter_base, resolve_model
from cppo.errors import UserError, tell
from cppo.policy import unshared_reason
from cppo.recipes import Recipe
from cppo.runs.memory_plan import RESERVE, largest_slice
from cppo.runs.memory_work import Way, Work
from cppo.runs.model_shapes import ModelShapes, read_shapes
from cppo.runs.prepare import PreparedRun
from cppo.runs.recipe_plan import GIB, launched_way, recipe_work
from cppo.runs.row_limit import probe_rows


def choose_slice(recipe: Recipe, prepared: PreparedRun) -> None:
    """Set a run's `per_device_generation_batch_size` on a GPU if its recipe does not, and print it.

    All processes use the smallest that fits any of them: with sharded weights, each slice gathers them.
    """
    args, options = prepared.args, prepared.options
    chosen = args.use_vllm or args.use_transformers_continuous_batching or args.per_device_generation_batch_size
    if chosen or args.device.type != "cuda":
        return
    base = resolve_model(adapter_base(options.model) or options.model)
    if unshared_reason(AutoConfig.from_pretrained(base)) is not None:
        return
    way, gpus = launched_way(options.use_peft)
    _, lengths = probe_rows(prepared.train, options)
    work = recipe_work(recipe, gpus, prompt_tokens=max(lengths))
    try:
        shapes = read_shapes(options.model)
    except UserError:  # a layout that `cppo plan` does not count
        return
    memory = usable_memory(args.device)
    size = _least(slice_that_fits(shapes, way, work, memory), args.device)
    if size < work.batch_rollouts:
        args.per_device_generation_batch_size = size
    tell(
        f"{size} of a generation batch's {work.batch_rollouts} rollouts are generated at a time: by `cppo "
        f"plan` this many fit in {memory / GIB:.1f} GiB; per_device_generation_batch_size sets another number"
    )


def slice_that_fits(shapes: ModelShapes, way: Way, work: Work, memory: float) -> int:
    """Number of rollouts that fit into `memory` bytes, in whole groups if one fits; 1 if none fits."""
    size = largest_slice(shapes, way, work, memory)
    return size - size % work.num_generations if size >= work.num_generations else max(size, 1)


def usable_memory(device: torch.device) -> float:
    """Bytes of a GPU for this process, without the plan's reserve.

    The same at every start unless another process uses a part: a resumed run must cut its batches as before.
    """
    free, total = torch.cuda.mem_get_info(device)
    return min(total * (1 - RESERVE), free + torch.cuda.memory_reserved(device))


def _least(size: int, device: torch.device) -> int:
    if not torch.distributed.is_initialized():
        return size
    least = torch.tensor(size, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)
