"""The layout's index tensors against loops over tokens, and both kernels against attention by its formula."""

import functools
import math

import pytest
import torch
from torch import Tensor

from cppo.policy import packed as attention_module
from cppo.policy import varlen as varlen_module
from cppo.policy.packed import attend_packed, packed_attention
from cppo.policy.packing import SharedPromptLayout
from cppo.policy.varlen import no_varlen_reason, probe_varlen_attention
from cppo.probing import failure

CASES = {
    "rectangular": ([4, 4], [3, 3, 3, 3], [0, 0, 1, 1]),
    "ragged": ([4, 1, 6], [3, 1, 5, 2], [0, 0, 2, 1]),
    "equal prompts": ([3, 3], [2, 5, 1], [1, 0, 1]),
    "empty prompt": ([0, 2], [2, 3], [0, 1]),
    "only empty prompts": ([0], [2, 1], [0, 0]),
    "prompt without a rollout": ([2, 3], [4], [1]),
}


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


def sees(prompts: list[int], segments: list[int], owners: list[int]) -> Tensor:
    """Which token sees which: bool [N, N]."""
    owner_of = [("p", q) for q, n in enumerate(prompts) for _ in range(n)]
    owner_of += [("s", s) for s, n in enumerate(segments) for _ in range(n)]
    visible = torch.zeros(len(owner_of), len(owner_of), dtype=torch.bool)
    for i, (kind, number) in enumerate(owner_of):
        for j, other in enumerate(owner_of):
            same = other == (kind, number) and j <= i
            its_prompt = kind == "s" and other == ("p", owners[number])
            visible[i, j] = same or its_prompt
    return visible


def spelled_out(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~visible, -math.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def make_tensors(layout: SharedPromptLayout, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, layout.num_tokens, 8) for h in (heads, key_heads, key_heads)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)


VARLEN = "torch.nn.attention.varlen.varlen_attn"


def varlen_reference(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    scale,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """The contract of variable-length flash attention: if causal, aligned to the last key of each sequence."""
    assert window_size in ((-1, 0), (-1, -1))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    assert cu_seqlens_k[-1] == len(key)
    assert cu_seqlens_q[-1] == len(query)
    outputs = []
    for s in range(len(cu_seqlens_q) - 1):
        q, k, v = (
            tensor[starts[s] : starts[s + 1]].transpose(0, 1)[None]
            for tensor, starts in ((query, cu_seqlens_q), (key, cu_seqlens_k), (value, cu_seqlens_k))
        )
        missing = k.shape[2] - q.shape[2]
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        visible = visible.tril(missing) if window_size == (-1, 0) else visible
        outputs.append(spelled_out(q, k, v, visible, scale)[0])
    return torch.cat(outputs)


def varlen_of_equal_heads(*tensors, scale, window_size=(-1, -1)):
    """The function of torch 2.11, without grouped heads."""
    assert tensors[0].shape[1] == tensors[1].shape[1] == tensors[2].shape[1]
    return varlen_reference(*tensors, scale=scale, window_size=window_size)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["equal heads", "grouped heads"])
@pytest.mark.parametrize("kernel", ["padded", "varlen", "varlen of equal heads"])
def test_attention_and_its_gradients(case, heads, kernel, monkeypatch):
    if kernel != "padded":
        function = varlen_reference if kernel == "varlen" else varlen_of_equal_heads
        monkeypatch.setattr(VARLEN, function)
        monkeypatch.setattr(attention_module, "no_varlen_reason", lambda *query: None)
    layout = SharedPromptLayout.of(*case)
    tensors = make_tensors(layout, *heads)
    outputs = packed_attention(*tensors, layout, 0.3)
    expected = spelled_out(*tensors, sees(*case), 0.3)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((outputs * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_padding_makes_the_round_trip(case):
    prompts, segments, owners = case
    layout = SharedPromptLayout.of(prompts, segments, owners)
    tokens = torch.arange(sum(prompts) + sum(segments))
    assert layout.num_tokens == len(tokens)
    assert layout.num_prompt_tokens == sum(prompts)
    assert torch.equal(layout.packed(layout.padded_prompts(tokens), layout.padded_segments(tokens)), tokens)


def test_equal_prompts_share_one_small_mask():
    layout = SharedPromptLayout.of([3, 3], [2, 5, 1], [1, 0, 1])
    assert layout.bias(torch.float32).shape == (1, 1, 5, 8)
    assert layout.bias(torch.float64) is layout.bias(torch.float64)


def test_the_original_implementation_sees_its_own_name():
    """Flash attention finds its kernel by the name in the module's config."""
    from tiny_models import make_model
    from transformers import AttentionInterface

    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.is_causal, module.layer_idx))
        return query.transpose(1, 2), None

    AttentionInterface.register("flash_stand_in", flash)
    model = make_model("llava")
    config = model.config.get_text_config()
    config._attn_implementation = "flash_stand_in"
    attend_packed(model)
    attend_packed(model)
    assert config._attn_implementation == "flash_stand_in_shared_prompt"
    assert model.config.vision_config._attn_implementation == "sdpa"
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert seen == [("flash_stand_in", True, 0), ("flash_stand_in", True, 1)]


def test_the_probe_holds_varlen_against_one_call_a_sequence(monkeypatch):
    monkeypatch.setattr(VARLEN, varlen_reference)
    assert failure(probe_varlen_attention, "cpu") is None
    failure.cache_clear()
    always_causal = functools.partial(varlen_reference, window_size=(-1, 0))
    monkeypatch.setattr(VARLEN, lambda *tensors, window_size=None, **options: always_causal(*tensors, **options))
    assert "varlen_attn differs from attention by" in failure(probe_varlen_attention, "cpu")
    failure.cache_clear()
    monkeypatch.setattr(VARLEN, lambda *tensors, window_size=None, **options: varlen_reference(*tensors, **options))
    assert "varlen_attn differs from causal attention by" in failure(probe_varlen_attention, "cpu")
    failure.cache_clear()


@pytest.mark.parametrize(
    ("query", "machine", "usable"),
    [
        ({}, {}, True),
        ({"dtype": torch.float16, "head_size": 256}, {"capability": (9, 0)}, True),
        ({"device": "cpu"}, {}, False),
        ({"dtype": torch.float32}, {}, False),
        ({"head_size": 60}, {}, False),
        ({"head_size": 264}, {}, False),
        ({}, {"capability": (7, 5)}, False),
        ({}, {"hip": "6.4"}, False),
        ({}, {"failure": "gone"}, False),
    ],
)
def test_what_flash_attention_of_variable_length_takes(monkeypatch, query, machine, usable):
    """Half precision, heads of at most 256 numbers in eights, on an NVIDIA GPU since Ampere, by a torch that has it."""
    query = {"device": "cuda", "dtype": torch.bfloat16, "head_size": 64, **query}
    there = {"capability": (8, 0), "hip": None, "failure": None, **machine}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: there["capability"])
    monkeypatch.setattr(torch.version, "hip", there["hip"])
    monkeypatch.setattr(varlen_module, "failure", lambda *probe: there["failure"])
    query["device"] = torch.device(query["device"])
    assert (no_varlen_reason.__wrapped__(**query) is None) is usable


@pytest.mark.parametrize(
    ("dtype", "enabled", "expected"),
    [
        (torch.float32, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
        (torch.float64, True, torch.float64),
    ],
)
def test_the_kernel_is_chosen_at_the_precision_of_autocast(monkeypatch, dtype, enabled, expected):
    layout = SharedPromptLayout.of([2], [1, 1], [0, 0], "cpu")
    tensors = [torch.ones(1, 2, 4, 8, dtype=dtype) for _ in range(3)]
    chosen = []
    monkeypatch.setattr(attention_module, "no_varlen_reason", lambda _, dtype, __: chosen.append(dtype) or "noted")
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        packed_attention(*tensors, layout, None)
    assert chosen == [expected]
