"""Each part of another library that CPPO uses, broken: the probe reports it, and the trainer takes the fallback."""

import ast
import copy
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from rollout_stubs import generation_batch, inject, make_rows
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler, split_tensor_dict

import cppo
from cppo import trl_surface, upstream
from cppo.errors import UserError
from cppo.policy import packed
from cppo.policy.families import FAMILIES
from cppo.policy.vision_tower import AT_ONCE
from cppo.probing import failure
from cppo.training import checkpoint, kernels
from cppo.upstream import CHUNKED_HEAD, PACKED_ATTENTION, PARTS, SHARED_PREFILL, TOWER_ATTENTION, TRAINER_STATE

SOURCE = Path(cppo.__file__).parent
OWN_TRAINER_STATE = {
    "_shares_prompts",
    "_kernel_scores",
    "_step_tokens",
    "_rewards",
    "_has_placeholder",
    "_given",
}
"""Private names of our own trainer and configuration that other modules read."""


@pytest.fixture(autouse=True)
def _asked_anew():
    failure.cache_clear()
    yield
    failure.cache_clear()


def other_cache(monkeypatch):
    """`generate` gives the model a cache of another class."""

    class GrowingCache(transformers.DynamicCache):
        pass

    monkeypatch.setattr("transformers.generation.utils.DynamicCache", GrowingCache)


def dropped_keywords(monkeypatch):
    """Attention functions get no keyword argument of ours."""
    plain = packed._attention.__wrapped__

    def made(base):
        function = plain(base)
        return lambda *args, shared_prompt_layout=None, **others: function(*args, **others)

    monkeypatch.setattr(packed, "_attention", made)


def wrong_kernel(monkeypatch):
    """TRL's kernel divides by another temperature."""
    kernel = packed.chunked_head
    monkeypatch.setattr(packed, "chunked_head", lambda *tensors: kernel(*tensors[:-1], 1.1 * tensors[-1]))


def rollouts_of(trainer):
    """Rows of the model's first call, and its greedy tokens."""
    seen = []
    trainer.model.model.language_model.layers[0].register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[0])
    )
    return seen, generation_batch(trainer, make_rows([1, 2]))["completion_ids"]


def test_the_present_versions_have_every_part(make_trainer):
    trainer = make_trainer(make_rows([1, 1]))
    assert trainer.fallbacks == []
    assert (trainer._shares_prompts, trainer._shares_rollouts) == (True, True)


@pytest.mark.parametrize("reason", [None, "the GPU is older than Ampere"])
def test_a_run_on_a_gpu_says_which_attention_each_part_has(tiny_model, monkeypatch, capsys, reason):
    asked, heads, model = [], [], copy.deepcopy(tiny_model)
    monkeypatch.setattr(kernels, "no_varlen_reason", lambda *query: asked.append(query) or reason)
    monkeypatch.setattr(kernels, "CHUNKED_HEAD", replace(CHUNKED_HEAD, probe=heads.append))
    args = SimpleNamespace(bf16=True, fp16=False, require_sharing=False)
    trainer = SimpleNamespace(
        model=model,
        ref_model=None,
        accelerator=SimpleNamespace(device=torch.device("cuda")),
        args=args,
        fallbacks=[],
        use_vllm=False,
        use_transformers_continuous_batching=False,
    )
    line = kernels.choose_kernels(trainer, shares_prompts=True)
    assert asked == [(torch.device("cuda"), torch.bfloat16, size) for size in (16, 8)]
    assert heads == ["cuda"]
    rows = "torch's varlen_attn" if reason is None else f"padded SDPA ({reason})"
    tower = "torch's varlen_attn, one call per layer" if reason is None else f"sdpa, one call per window ({reason})"
    assert line == f"packed rows: {rows}, rollouts: sdpa, vision tower: {tower}"
    assert capsys.readouterr().err == f"cppo: attention of {line}\n"
    assert [reason in line for line in trainer.fallbacks] == ([] if reason is None else [True, True])
    assert model.model.visual.config._attn_implementation == ("sdpa" if reason else AT_ONCE)


def test_a_tower_without_one_flash_call_per_layer_is_reported(monkeypatch):
    """transformers recognizes flash attention by something else than "flash" in its name."""
    assert TOWER_ATTENTION.missing("qwen2_5_vl") is None
    failure.cache_clear()
    for module in ("qwen2_5_vl.modeling_qwen2_5_vl", "qwen3_vl.modeling_qwen3_vl"):
        monkeypatch.setattr(f"transformers.models.{module}.is_flash_attention_requested", lambda config: False)
    for family in ("qwen2_5_vl", "qwen3_vl"):
        assert "the vision tower makes one attention call per window: the single call" in TOWER_ATTENTION.missing(
            family
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_its_probes(family):
    state = torch.get_rng_state()
    assert SHARED_PREFILL.missing(family) is None
    assert PACKED_ATTENTION.missing(family, "eager") is None
    assert FAMILIES[family].images != "patches" or TOWER_ATTENTION.missing(family) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_probe_is_right_under_autocast_and_without_gradients():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert CHUNKED_HEAD.missing() is None


def test_without_the_prefill_rollouts_are_the_same_and_one_line_tells(make_trainer, monkeypatch, caplog):
    options = {"top_k": 1, "num_generations": 4}
    sharing = make_trainer(make_rows([1, 2]), **options)
    sharing.model.double()
    first, expected = rollouts_of(sharing)
    other_cache(monkeypatch)
    failure.cache_clear()
    with caplog.at_level(logging.WARNING, logger="cppo.training.setup"):
        trainer = make_trainer(make_rows([1, 2]), **options)
    (line,) = trainer.fallbacks
    assert [record.getMessage() for record in caplog.records] == [line]
    assert "\n" not in line
    assert line.startswith("rollouts do not share their prompt, and a generation costs about num_generations times")
    assert f"transformers {transformers.__version__}" in line
    assert (trainer._shares_prompts, trainer._shares_rollouts) == (True, False)
    trainer.model.double()
    plain, found = rollouts_of(trainer)
    assert (first[0], plain[0]) == (2, 8)
    assert torch.equal(found, expected)
    with pytest.raises(UserError, match="require_sharing = true, but rollouts do not share"):
        make_trainer(make_rows([1, 2]), require_sharing=True, **options)


def test_a_generation_that_cannot_share_is_reported_once(make_trainer):
    trainer = make_trainer(make_rows([1, 2]), generation_kwargs={"use_cache": False})
    assert trainer.fallbacks == []
    for _ in range(2):
        rollouts_of(trainer)
    (line,) = trainer.fallbacks
    assert "this call of `generate` cannot share" in line


def losses_of(trainer, rows):
    trainer = inject(trainer)
    batch = generation_batch(trainer, rows)
    return trainer._compute_loss(trainer.model, batch).item()


@pytest.mark.parametrize(
    ("broken", "part", "shares"), [(dropped_keywords, PACKED_ATTENTION, False), (wrong_kernel, CHUNKED_HEAD, True)]
)
def test_without_a_part_of_the_scorer_the_loss_is_the_same(make_trainer, monkeypatch, broken, part, shares):
    rows = make_rows([1, 2])
    options = {"perception_weight": 1.0, "perception_normalization": "microbatch"}
    expected = losses_of(make_trainer(rows, **options), rows)
    broken(monkeypatch)
    failure.cache_clear()
    trainer = make_trainer(rows, **options)
    (line,) = trainer.fallbacks
    assert line.startswith(f"{part.lost}: {part.what} ({part.library} ")
    assert trainer._shares_prompts is shares
    assert trainer._shares_rollouts
    assert losses_of(trainer, rows) == pytest.approx(expected, abs=2e-5)


def test_without_the_samplers_order_a_run_takes_trls(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(RepeatSampler, "__iter__", lambda self: iter(torch.randperm(2).repeat_interleave(4).tolist()))
    trainer = make_trainer(make_rows([1, 1]), save_strategy="steps", save_steps=1)
    (line,) = trainer.fallbacks
    assert line.startswith("a run resumed after its first epoch repeats the first epoch's order: ")
    trainer.train()
    monkeypatch.setattr(checkpoint, "pass_over", lambda sampler, epochs: pytest.fail("the order is changed"))
    resumed = make_trainer(make_rows([1, 1]), max_steps=2, folder="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert resumed.state.global_step == 2


def test_a_schedule_that_keeps_its_rate_is_named(make_trainer, monkeypatch):
    monkeypatch.setattr(upstream.LambdaLR, "get_last_lr", lambda self: [1.0])
    (line,) = make_trainer(make_rows([1, 1])).fallbacks
    assert line.startswith("a learning rate given at a resume does not last")


def test_a_trainer_whose_hook_is_gone_is_not_built(make_trainer, monkeypatch):
    """If another method of TRL's made rollouts, views and gate would silently be left out."""
    monkeypatch.setattr(GRPOTrainer, "_prepare_inputs", lambda self, batch: batch)
    with pytest.raises(UserError, match=r"no longer uses _generate_and_score_completions \(all images") as caught:
        make_trainer(make_rows([1, 1]))
    assert "\n" not in str(caught.value)


def generated_each_time(trainer, batch):
    trainer._buffered_inputs = [trainer._generate_and_score_completions(batch)] * trainer.args.steps_per_generation
    return trainer._buffered_inputs[trainer._step % trainer.args.steps_per_generation]


def used_backwards(trainer, batch):
    if trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) == 0:
        trainer._buffered_inputs = split_tensor_dict(trainer._generate_and_score_completions(batch), 2)
    return trainer._buffered_inputs[-1 - trainer._step % 2]


def logged_anew(trainer, logs):
    return super(GRPOTrainer, trainer).log(logs)


@pytest.mark.parametrize(
    ("method", "other", "said"),
    [
        ("_prepare_inputs", generated_each_time, "rollouts are made at another time"),
        ("_prepare_inputs", used_backwards, "another micro-batch than the buffer's next one is trained on"),
        ("log", logged_anew, "a metric is not logged"),
    ],
)
def test_a_trainer_whose_buffer_acts_otherwise_is_not_built(make_trainer, monkeypatch, method, other, said):
    monkeypatch.setattr(GRPOTrainer, method, other)
    found = TRAINER_STATE.missing()
    assert found.startswith("rollouts would be trained on in another order than planned: the buffer of GRPOTrainer")
    assert found.endswith(said)
    if method == "_prepare_inputs":
        with pytest.raises(UserError, match=said):
            make_trainer(make_rows([1, 1]))


def test_a_cut_that_mixes_up_rows_is_noticed(make_trainer, monkeypatch):
    monkeypatch.setattr(trl_surface, "split_tensor_dict", lambda rows, parts: [rows] * parts)
    with pytest.raises(UserError, match="rollouts would be trained with other rollouts' images"):
        make_trainer(make_rows([1, 1]))


def test_unsettable_fsdp_output_precision_is_reported(monkeypatch):
    monkeypatch.setattr(upstream, "FullyShardedDataParallelPlugin", lambda **given: type("Plugin", (), given)())
    assert upstream.FSDP_OUTPUTS.missing() is None
    failure.cache_clear()
    monkeypatch.setattr(upstream, "MixedPrecisionPolicy", lambda param_dtype, output_dtype: "bf16")
    assert upstream.FSDP_OUTPUTS.missing().startswith("FSDP2 rounds log-probabilities")


def private_names(file):
    """Private names that a file uses on something other than `self`, `cls` or `super()`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            holder = node.value
            own = isinstance(holder, ast.Name) and holder.id in ("self", "cls")
            above = isinstance(holder, ast.Call) and isinstance(holder.func, ast.Name) and holder.func.id == "super"
            if not (own or above):
                yield node.attr


def test_the_list_names_every_private_part():
    """In the files that use transformers, TRL, accelerate and torch; and each listed file exists."""
    listed = {name for part in PARTS for name in part.private}
    found = {}
    for room in ("policy", "training", "runs", "evaluation"):
        for file in (SOURCE / room).rglob("*.py"):
            for name in set(private_names(file)) - listed - OWN_TRAINER_STATE:
                found.setdefault(name, []).append(file.name)
    assert found == {}
    assert all((SOURCE / file).is_file() for part in PARTS for file in part.used_by)
