"""The trainer's perception term against a float64 reference: one rollout and view at a time, no padding, loops."""

import math
from dataclasses import dataclass, replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rollout_stubs import (
    build_trainer,
    cut,
    drawn_completions,
    generation_batch,
    make_rows,
    parity_reward,
    term_of,
    token_reward,
)

from cppo.policy import ResponseScores
from cppo.training.perception_term import perception_token_mask
from cppo.views import ViewSampler, load_rgb

TEMPERATURE = 0.9
TAU = 0.3
TOP_FRACTION = 0.6
GROUP = 4
SCORES = ("entropy_shift", "entropy_shift_absolute", "kl", "js", "logp_shift")
DIVERGENCES = ("k3", "kl", "js")


@dataclass
class Rollout:
    """What the reference knows of one rollout: the gates, and a list over tokens for each score and divergence."""

    row: int
    gates: dict
    scores: dict
    preserving: dict
    removing: dict
    entropies: tuple


def reference_logits(model, processor, row, images, completion):
    """[T, V]: one row, one forward, the prompt written by hand."""
    pads = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
    text = f"<|im_start|>user\n{pads}{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    inputs = dict(processor(text=[text], images=[images] if images else None, return_tensors="pt"))
    tail = torch.tensor([completion])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tail)], dim=1)
    return model(**inputs).logits[0, -len(completion) - 1 : -1] / TEMPERATURE


def view_images(row, seed):
    """The row's images, their I+ and their I-."""
    pairs = [ViewSampler(seed).views(load_rgb(image), row["sample_id"], 0, i) for i, image in enumerate(row["images"])]
    return row["images"], [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def log_softmax(logits):
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def entropy(p):
    return -math.fsum(math.exp(a) * a for a in p)


def kl(p, q):
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def js(p, q):
    middle = [math.log((math.exp(a) + math.exp(b)) / 2) for a, b in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def k3(logp, view_logp):
    x = min(max(view_logp - logp, -20.0), 20.0)
    return min(math.exp(x) - x - 1, 10.0)


def divergences(anchor, view, tokens):
    pairs = list(zip(anchor.tolist(), view.tolist(), tokens, strict=True))
    return {
        "k3": [k3(p[token], q[token]) for p, q, token in pairs],
        "kl": [kl(p, q) for p, q, _ in pairs],
        "js": [js(p, q) for p, q, _ in pairs],
    }


def reference_rollouts(model, processor, rows, seed):
    """Every rollout of every row with all that any score, divergence or gate asks for."""
    rollouts = []
    for index, row in enumerate(rows):
        pads = "<|vision_start|><|image_pad|><|vision_end|>" * len(row["images"])
        text = f"<|im_start|>user\n{pads}{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        images = [row["images"]] if row["images"] else None
        prompt = processor(text=[text], images=images)["input_ids"][0]
        completions = drawn_completions([prompt] * GROUP)
        rewards = [a + b for a, b in zip(*(f(completions) for f in (token_reward, parity_reward)), strict=True)]
        for completion, reward in zip(completions, rewards, strict=True):
            gates = {
                "none": bool(row["images"]),
                "advantage": bool(row["images"]) and reward > sum(rewards) / GROUP,
                "correct": bool(row["images"]) and sum(completion) % 2 == 1,
            }
            if not row["images"]:
                rollouts.append(Rollout(index, gates, {}, {}, {}, ()))
                continue
            with torch.no_grad():
                anchor, preserving, removing = (
                    log_softmax(reference_logits(model, processor, row, images, completion).numpy())
                    for images in view_images(row, seed)
                )
            from_removing = divergences(anchor, removing, completion)
            entropies = tuple([entropy(p) for p in view.tolist()] for view in (anchor, preserving, removing))
            shifts = [after - before for after, before in zip(entropies[2], entropies[0], strict=True)]
            falls = [p[t] - q[t] for p, q, t in zip(anchor.tolist(), removing.tolist(), completion, strict=True)]
            relative = [max(s, 0) / (h + 1e-6) for s, h in zip(shifts, entropies[2], strict=True)]
            scores = {"entropy_shift": relative, "entropy_shift_absolute": shifts, "logp_shift": falls}
            scores |= {"kl": from_removing["kl"], "js": from_removing["js"]}
            from_preserving = divergences(anchor, preserving, completion)
            rollouts.append(Rollout(index, gates, scores, from_preserving, from_removing, entropies))
    return rollouts


def chosen_tokens(scores):
    """Places of the best tokens among those with a positive score."""
    candidates = [place for place, score in enumerate(scores) if score > 0]
    ranked = sorted(candidates, key=lambda place: (-scores[place], place))
    return ranked[: max(1, math.floor(TOP_FRACTION * len(candidates)))] if candidates else []


def reference_term(
    rollouts, score="entropy_shift", divergence="k3", gate="advantage", normalization="rollout", parts=1, tau=TAU
):
    """The step's perception term; `parts` says into how many micro-batches it is cut."""
    step = []
    for rollout in rollouts:
        if not rollout.gates[gate]:
            step.append(None)
            continue
        margins = [
            rollout.preserving[divergence][place] - rollout.removing[divergence][place]
            for place in chosen_tokens(rollout.scores[score])
        ]
        step.append([math.log1p(math.exp(margin / tau)) for margin in margins])
    losses = [losses for losses in step if losses is not None]
    if normalization == "rollout":
        return math.fsum(math.fsum(tokens) / len(tokens) for tokens in losses if tokens) / len(losses)
    if normalization == "token":
        return math.fsum(chain(*losses)) / len(list(chain(*losses)))
    size = len(step) // parts
    total = 0.0
    for start in range(0, len(step), size):
        tokens = list(chain(*(tokens for tokens in step[start : start + size] if tokens)))
        total += math.fsum(tokens) / len(tokens) / parts if tokens else 0.0
    return total


OPTIONS = {
    "reward_funcs": [token_reward, parity_reward],
    "temperature": TEMPERATURE,
    "perception_temperature": TAU,
    "perception_top_fraction": TOP_FRACTION,
    "perception_gate_reward": "parity_reward",
}


@pytest.fixture(scope="module")
def rows():
    """One image, two of different size, text only, one."""
    return make_rows([1, 2, 0, 1])


def stub(trainer):
    trainer._generate_single_turn = lambda prompt_ids, *rest, **more: (drawn_completions(prompt_ids), None)
    return trainer


@pytest.fixture(scope="module", params=[False, True], ids=["unshared", "shared"])
def sharing(request):
    """Whether prompts and images are shared over a group; every test here holds for both."""
    return request.param


@pytest.fixture(scope="module")
def exact(tiny, tmp_path_factory, rows, sharing):
    """A trainer in float64, with the plain scorer or with shared prompts."""
    scorer = "shared" if sharing else "plain"
    trainer = build_trainer(tiny, tmp_path_factory.mktemp("exact"), rows, scorer=scorer, **OPTIONS)
    trainer.model.double()
    assert trainer._shares_prompts == sharing
    return stub(trainer)


@pytest.fixture(scope="module")
def quick(tiny, tmp_path_factory, rows, sharing):
    """A trainer in float32, with TRL's kernel or with shared prompts."""
    scorer = "shared" if sharing else "kernel"
    return stub(build_trainer(tiny, tmp_path_factory.mktemp("quick"), rows, scorer=scorer, **OPTIONS))


@pytest.fixture(scope="module")
def reference(exact, processor, rows):
    return reference_rollouts(exact.model, processor, rows, exact.args.seed)


@pytest.fixture(autouse=True)
def _published_options(exact, quick):
    for trainer in (exact, quick):
        trainer.pad_to_multiple_of = None
        for name, value in (("score", "entropy_shift"), ("divergence", "k3"), ("gate", "advantage")):
            setattr(trainer.args, f"perception_{name}", value)
        trainer.args.perception_normalization, trainer.args.perception_temperature = "rollout", TAU
        trainer.args.perception_view_gradients, trainer.args.perception_rollouts_per_group = True, None


def total_term(trainer, batch, parts=1):
    return sum(term_of(trainer, inputs).item() for inputs in cut(trainer, batch, parts))


def test_the_example_is_worth_testing(reference):
    """Every gate lets some rollouts through and stops others; margins and selections are not trivial."""
    for gate in ("advantage", "correct"):
        open_gates = [rollout.gates[gate] for rollout in reference if rollout.scores]
        assert 2 <= sum(open_gates) < len(open_gates)
    for score in SCORES:
        chosen = [chosen_tokens(rollout.scores[score]) for rollout in reference if rollout.scores]
        assert {len(places) for places in chosen} > {1, 2}
        assert any(sorted(places) != list(range(len(places))) for places in chosen)
    terms = {name: reference_term(reference, divergence=name) for name in DIVERGENCES}
    assert all(abs(term - math.log(2)) > 1e-3 for term in terms.values())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("score", SCORES)
def test_scores_and_divergences(exact, reference, rows, score, divergence):
    exact.args.perception_score, exact.args.perception_divergence = score, divergence
    term = total_term(exact, generation_batch(exact, rows))
    assert term == pytest.approx(reference_term(reference, score, divergence), abs=1e-7)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("entropy_shift", [1 / 2, 1 / 3, 0.0]),
        ("entropy_shift_absolute", [1.0, 1.5, 0.0]),
        ("logp_shift", [0.0, 0.25, 2.0]),
    ],
)
def test_scores_that_rank_tokens_differently(score, expected):
    """Entropies 1, 3, 4 become 2, 4.5, 3.5 under I-; the tokens' log-probabilities change by +1, -0.25, -2."""
    anchor = ResponseScores(torch.tensor([[-3.0, -2.0, -1.0]]), torch.tensor([[1.0, 3.0, 4.0]]))
    removing = ResponseScores(torch.tensor([[-2.0, -2.25, -3.0]]), torch.tensor([[2.0, 4.5, 3.5]]))
    args = SimpleNamespace(perception_score=score, perception_top_fraction=0.5)
    scores, mask = perception_token_mask(args, anchor, removing, torch.ones(1, 3))
    assert scores[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert mask[0].tolist() == [value == max(expected) for value in expected]


@pytest.mark.parametrize("gate", ["advantage", "correct", "none"])
@pytest.mark.parametrize("normalization", ["rollout", "token", "microbatch"])
@pytest.mark.parametrize("parts", [1, 8])
def test_gates_and_normalizations(exact, reference, rows, gate, normalization, parts):
    exact.args.perception_gate, exact.args.perception_normalization = gate, normalization
    term = total_term(exact, generation_batch(exact, rows), parts)
    options = {"gate": gate, "normalization": normalization}
    assert term == pytest.approx(reference_term(reference, **options, parts=parts), abs=1e-7)
    if parts == 8 and normalization == "microbatch":
        assert abs(term - reference_term(reference, **options)) > 1e-3


@pytest.mark.parametrize("gate", ["advantage", "none"])
@pytest.mark.parametrize("parts", [1, 8])
def test_a_bounded_number_of_rollouts_a_group(exact, reference, rows, gate, parts):
    """The m drawn of a group's k are scored, each in the place of k / m."""
    exact.args.perception_gate, exact.args.perception_rollouts_per_group = gate, 1
    term_at = {i: reference_term([r], gate="none") for i, r in enumerate(reference) if r.gates["none"]}
    groups = [range(start, start + GROUP) for start in range(0, len(reference), GROUP)]
    gated = [[i for i in group if reference[i].gates[gate]] for group in groups]
    drawn = set()
    for step in range(6):
        exact._step = step * exact.args.steps_per_generation
        batch = generation_batch(exact, rows)
        chosen = [i for i, views in enumerate(batch["perception_views"]) if views is not None]
        expected = 0.0
        for group in gated:
            mine = [i for i in group if i in chosen]
            assert len(mine) == min(1, len(group))
            expected += sum(term_at[i] for i in mine) * len(group) / max(len(mine), 1)
        assert total_term(exact, batch, parts) == pytest.approx(expected / sum(map(len, gated)), abs=1e-7)
        assert exact._metrics["train"]["perception/gated_fraction"][-1] == sum(map(len, gated)) / len(reference)
        drawn.add(tuple(chosen))
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("name", "normalization", "tolerance"),
    [("exact", "rollout", 1e-7), ("exact", "token", 1e-7), ("quick", "rollout", 1e-5), ("quick", "token", 1e-5)],
)
def test_padding_order_and_text_only_rows_change_nothing(request, reference, rows, name, normalization, tolerance):
    trainer = request.getfixturevalue(name)
    trainer.args.perception_normalization, trainer.args.perception_temperature = normalization, 0.1
    term = total_term(trainer, generation_batch(trainer, rows))
    expected = reference_term(reference, normalization=normalization, tau=0.1)
    assert term == pytest.approx(expected, abs=tolerance, rel=1e-5 if name == "quick" else 0)
    changed = {
        "order": total_term(trainer, generation_batch(trainer, [rows[i] for i in (3, 2, 0, 1)])),
        "without text": total_term(trainer, generation_batch(trainer, [rows[i] for i in (0, 1, 3)])),
        "more text": total_term(trainer, generation_batch(trainer, rows + make_rows([0, 0], first=8)), 2),
    }
    trainer.pad_to_multiple_of = 64
    batch = generation_batch(trainer, rows)
    assert batch["completion_ids"].shape[1] == batch["prompt_ids"].shape[1] == 64
    changed["padding"] = total_term(trainer, batch)
    assert changed == pytest.approx(dict.fromkeys(changed, term), abs=tolerance)


@pytest.mark.parametrize("view_gradients", [True, False])
def test_metrics(exact, reference, rows, view_gradients):
    exact.args.perception_view_gradients = view_gradients
    exact._metrics["train"].clear()
    (inputs,) = cut(exact, generation_batch(exact, rows), 1)
    exact._compute_loss(exact.model, inputs)
    gated = [rollout for rollout in reference if rollout.gates["advantage"]]
    tokens = sum(len(rollout.scores["kl"]) for rollout in gated)
    chosen = [(rollout, place) for rollout in gated for place in chosen_tokens(rollout.scores["entropy_shift"])]
    preserving = [rollout.preserving["k3"][place] for rollout, place in chosen]
    removing = [rollout.removing["k3"][place] for rollout, place in chosen]
    losses = [math.log1p(math.exp((a - b) / TAU)) for a, b in zip(preserving, removing, strict=True)]
    entropies = [
        math.fsum(rollout.entropies[view][place] for rollout, place in chosen) / len(chosen) for view in range(3)
    ]
    expected = {
        "gated_fraction": len(gated) / len(reference),
        "selected_fraction": len(chosen) / tokens,
        "cpl": math.fsum(losses) / len(chosen),
        "d_preserving": math.fsum(preserving) / len(chosen),
        "d_removing": math.fsum(removing) / len(chosen),
        "entropy": entropies[0],
        "entropy_preserving": entropies[1],
        "entropy_removing": entropies[2],
    }
    for name, value in expected.items():
        assert exact._metrics["train"][f"perception/{name}"] == [pytest.approx(value, rel=1e-6)], name


def test_tokens_of_a_tool_are_never_selected(exact, reference, rows):
    batch = generation_batch(exact, rows)
    batch["tool_mask"] = torch.zeros_like(batch["completion_mask"])
    batch["tool_mask"][:, 1::2] = 1
    own = [
        replace(
            rollout,
            scores={
                name: [score if place % 2 else 0.0 for place, score in enumerate(scores)]
                for name, scores in rollout.scores.items()
            },
        )
        for rollout in reference
    ]
    term = total_term(exact, batch)
    assert term == pytest.approx(reference_term(own), abs=1e-7)
    assert abs(term - reference_term(reference)) > 1e-3


def reference_gradient(model, processor, rows, seed, view_gradients):
    """Gradient of the published term (k3, relative shift, A > 0), rollout by rollout, by autograd in float64."""
    terms = []
    for row in rows:
        if not row["images"]:
            continue
        pads = "<|vision_start|><|image_pad|><|vision_end|>" * len(row["images"])
        text = f"<|im_start|>user\n{pads}{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        completions = drawn_completions([processor(text=[text], images=[row["images"]])["input_ids"][0]] * GROUP)
        rewards = [a + b for a, b in zip(*(f(completions) for f in (token_reward, parity_reward)), strict=True)]
        for completion, reward in zip(completions, rewards, strict=True):
            if reward <= sum(rewards) / GROUP:
                continue
            logps, entropies = [], []
            for images in view_images(row, seed):
                all_logps = reference_logits(model, processor, row, images, completion).log_softmax(-1)
                picked = torch.stack([all_logps[place, token] for place, token in enumerate(completion)])
                logps.append(picked if view_gradients or not logps else picked.detach())
                entropies.append(-(all_logps.exp() * all_logps).sum(-1).detach())
            score = ((entropies[2] - entropies[0]).clamp(min=0) / (entropies[2] + 1e-6)).tolist()
            tokens = [
                torch.log1p(torch.exp((_k3(logps[0][i], logps[1][i]) - _k3(logps[0][i], logps[2][i])) / TAU))
                for i in chosen_tokens(score)
            ]
            terms.append(sum(tokens) / max(len(tokens), 1))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(sum(terms) / len(terms), parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None]), [g is not None for g in grads]


def _k3(logp, view_logp):
    return torch.exp(view_logp - logp) - (view_logp - logp) - 1


@pytest.mark.parametrize(("name", "tolerance"), [("exact", 1e-6), ("quick", 1e-4)])
def test_gradients_with_and_without_the_views(request, exact, processor, rows, name, tolerance):
    trainer = request.getfixturevalue(name)
    gradients = []
    for view_gradients in (True, False):
        expected, used = reference_gradient(exact.model, processor, rows, exact.args.seed, view_gradients)
        trainer.args.perception_view_gradients = view_gradients
        (inputs,) = cut(trainer, generation_batch(trainer, rows), 1)
        parameters = [p for p, use in zip(trainer.model.parameters(), used, strict=True) if use]
        grads = torch.autograd.grad(term_of(trainer, inputs), parameters)
        gradient = torch.cat([grad.flatten() for grad in grads]).double()
        assert (gradient - expected).norm() <= tolerance * expected.norm()
        gradients.append(gradient)
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[1].norm()
