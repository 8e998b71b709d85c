"""Two processes, one without a rollout to score under a view: no hang, and the gradients are the average."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import make_batch, make_model
from torch.nn.parallel import DistributedDataParallel

from cppo.policy import add_shared_prompt_forward, pack


def backward(model, inner, rank: int, sequential: bool) -> None:
    batch = make_batch("qwen2_5_vl", seed=rank)
    groups = batch.groups(inner.config)
    views = {"anchor": groups, "removing": groups[1:3] if rank == 0 else []}
    packed = pack(inner, batch.input_ids, batch.attention_mask, batch.num_response_tokens, views, sequential)

    def readout(hidden, head):
        logps, entropies = head.scores(hidden, packed.targets)
        return {"loss": logps.mean() + entropies[packed.tokens["removing"]].sum()}

    model(shared_prompt=packed, readout=readout)["loss"].backward()


def work(rank: int, folder: str, sequential: bool) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    model = make_model("qwen2_5_vl")
    add_shared_prompt_forward(model)
    backward(DistributedDataParallel(model), model, rank, sequential)
    if rank == 0:
        torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("sequential", [False, True])
def test_gradients_of_two_processes(tmp_path, sequential):
    mp.spawn(work, (str(tmp_path), sequential), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    model = make_model("qwen2_5_vl")
    add_shared_prompt_forward(model)
    for rank in range(2):
        backward(model, model, rank, sequential)
    scale = max(parameter.grad.norm() for parameter in model.parameters())
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert (gradient - parameter.grad / 2).norm() <= 1e-6 * scale
