"""Rollouts that a GPU generates at a time, where the recipe leaves it open, by an injected size of its memory."""

from types import SimpleNamespace

import pytest
import torch

from cppo.data import load_records
from cppo.recipes import load_recipe
from cppo.runs import generation_slice
from cppo.runs.generation_slice import choose_slice, slice_that_fits, usable_memory
from cppo.runs.memory_plan import need
from cppo.runs.memory_work import DDP, Work
from cppo.runs.model_shapes import read_shapes

MIB, GIB = 2**20, 2**30
SIZES = {"per_device_train_batch_size": 16, "steps_per_generation": 4, "num_generations": 8, "beta": 0.0}


@pytest.fixture
def chosen(monkeypatch):
    """The option's value after a run on a GPU with so much memory was prepared, by micro and the digits."""
    rows = load_records("tasks:digits?n=8", split="train")

    def choose(memory, device="cuda", **options):
        monkeypatch.setattr(generation_slice, "usable_memory", lambda device: memory)
        recipe = load_recipe("train", "micro", {**SIZES, **options})
        args = SimpleNamespace(
            device=torch.device(device),
            per_device_generation_batch_size=options.get("per_device_generation_batch_size"),
            use_vllm=options.get("use_vllm", False),
            use_transformers_continuous_batching=False,
        )
        choose_slice(recipe, SimpleNamespace(args=args, options=recipe.options, train=rows))
        return args.per_device_generation_batch_size

    return choose


def test_as_many_as_fit_in_whole_groups(chosen, capsys):
    size = chosen(25 * MIB)
    assert 0 < size < 64
    assert size % 8 == 0
    said = capsys.readouterr().err
    assert (
        f"{size} of a generation batch's 64 rollouts are generated at a time: by `cppo plan` this many fit in" in said
    )
    assert chosen(20 * MIB) < size


def test_all_at_once_where_they_fit(chosen, capsys):
    assert chosen(80 * GIB) is None
    assert "64 of a generation batch's 64 rollouts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked",
    [{"device": "cpu"}, {"use_vllm": True}, {"per_device_generation_batch_size": 3}],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_said_elsewhere_holds(chosen, asked, capsys):
    assert chosen(25 * MIB, **asked) == asked.get("per_device_generation_batch_size")
    assert "generation batch" not in capsys.readouterr().err


@pytest.mark.parametrize("fitting", [1, 7, 8, 20, 64])
def test_a_slice_by_the_plans_own_sum(fitting):
    """Memory for exactly so many rollouts: one less than a group is no group."""
    shapes = read_shapes("micro")
    work = Work(1, 80, 64, 600, 8, 16, 64, 64, fitting, 2)
    assert slice_that_fits(shapes, DDP, work, need(shapes, DDP, work).rollouts) == {20: 16}.get(fitting, fitting)
    assert slice_that_fits(shapes, DDP, work, 0) == 1


@pytest.mark.parametrize(("free", "expected"), [(79, 72), (50, 51)], ids=["alone", "beside another process"])
def test_memory_that_may_be_filled(monkeypatch, free, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 * GIB)
    assert usable_memory(torch.device("cuda")) == pytest.approx(expected * GIB)
