"""The perception term in float64: one rollout and view at a time, no padding, loops."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from inside_reference import hidden_images, replaced_values
from rollout_stubs import drawn_completions, parity_reward, token_reward

from cppo.views import ViewSampler, ViewStrengths, load_rgb, view_generators

TEMPERATURE = 0.9
TAU = 0.3
TOP_FRACTION = 0.6
GROUP = 4
VEPO_NOISE = 6.93
SCORES = ("entropy_shift", "entropy_shift_absolute", "kl", "js", "logp_shift")
DIVERGENCES = ("k1", "k3", "kl", "js", "nll")
JITTER = (("color_jitter", "perspective", "rotation"), ("noise_rectangles", "crop"), ViewStrengths())
"""CPPO's views: families of I+, families of I-, strengths."""


@dataclass
class Rollout:
    """A rollout: its advantage, the gates it passes, and per token the results under all three views."""

    tokens: int
    advantage: float
    gates: dict
    scores: dict
    preserving: dict
    removing: dict
    entropies: tuple

    @property
    def has_images(self):
        return self.gates["none"]

    @property
    def surprisals(self):
        """-log pi of the sampled tokens under the image."""
        return [nll - lost for nll, lost in zip(self.removing["nll"], self.scores["logp_shift"], strict=True)]


class Inside(list):
    """The images of a row under a view of the model's inputs, with a seed for its noise."""

    def __init__(self, view, images, seed):
        super().__init__(images)
        self.view, self.seed = view, seed


def prompt_text(row):
    """The prompt written by hand."""
    pads = "<|vision_start|><|image_pad|><|vision_end|>" * len(row["images"])
    return f"<|im_start|>user\n{pads}{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"


def reference_logits(model, processor, row, images, completion):
    """[T, V]: one row, one forward; `images` may be a view of the model's inputs."""
    inside, text = getattr(images, "view", None), prompt_text(row)
    if inside == "image_removed":
        images, text = [], prompt_text({**row, "images": []})
    inputs = dict(processor(text=[text], images=[list(images)] if images else None, return_tensors="pt"))
    if images and inside == "pixel_noise":
        _, stream = view_generators(images.seed, row["sample_id"], 0, 0)
        drawn = stream.standard_normal(inputs["pixel_values"].numel(), dtype=np.float32)
        inputs["pixel_values"] = inputs["pixel_values"] + VEPO_NOISE * torch.from_numpy(
            drawn.reshape(inputs["pixel_values"].shape)
        )
    prompt = inputs["input_ids"][0] == model.config.image_token_id
    tail = torch.tensor([completion])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tail)], dim=1)
    if images and inside == "attention_masked":
        inputs |= hidden_images(model, **inputs)
    with replaced_values(model, prompt) if inside == "values_replaced" else nullcontext():
        return model(**inputs).logits[0, -len(completion) - 1 : -1] / TEMPERATURE


def drawn_rollouts(processor, row):
    """A row's completions, their advantages, and whether each counts as right."""
    images = [row["images"]] if row["images"] else None
    prompt = processor(text=[prompt_text(row)], images=images)["input_ids"][0]
    completions = drawn_completions([prompt] * GROUP)
    right = parity_reward(completions)
    rewards = [a + b for a, b in zip(token_reward(completions), right, strict=True)]
    mean = sum(rewards) / GROUP
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (GROUP - 1))
    return zip(completions, [(reward - mean) / (deviation + 1e-4) for reward in rewards], right, strict=True)


def view_images(row, seed, views=JITTER, name=None):
    """The row's images, their I+ and their I-, drawn for the row's id or another `name`."""
    images = [load_rgb(image) for image in row["images"]]
    if isinstance(views[1], str):  # a view of the model's inputs
        return images, images, Inside(views[1], images, seed)
    sampler = ViewSampler(seed, *views)
    pairs = [sampler.views(image, name or row["sample_id"], 0, i) for i, image in enumerate(images)]
    return images, [pair[0] for pair in pairs], [pair[1] for pair in pairs]


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
        "k1": [min(max(p[token] - q[token], -10.0), 10.0) for p, q, token in pairs],
        "k3": [k3(p[token], q[token]) for p, q, token in pairs],
        "kl": [kl(p, q) for p, q, _ in pairs],
        "js": [js(p, q) for p, q, _ in pairs],
        "nll": [-q[token] for _, q, token in pairs],
    }


def reference_rollouts(model, processor, rows, seed, views=JITTER, own_views=False):
    """Every rollout of every row with the inputs of all scores, divergences and gates.

    With `own_views`, each rollout has its own views.
    """
    rollouts = []
    for row in rows:
        shown = view_images(row, seed, views)
        for copy, (completion, advantage, right) in enumerate(drawn_rollouts(processor, row)):
            if own_views:
                shown = view_images(row, seed, views, f"{row['sample_id']}/rollout-{copy}")
            with torch.no_grad():
                anchor, preserving, removing = (
                    log_softmax(reference_logits(model, processor, row, images, completion).numpy()) for images in shown
                )
            gates = {"none": True, "advantage": advantage > 0, "correct": bool(right)}
            if not row["images"]:
                gates = dict.fromkeys(gates, False)
            from_removing = divergences(anchor, removing, completion)
            entropies = tuple([entropy(p) for p in view.tolist()] for view in (anchor, preserving, removing))
            shifts = [after - before for after, before in zip(entropies[2], entropies[0], strict=True)]
            scores = {
                "entropy": entropies[0],
                "entropy_shift": [max(s, 0) / (h + 1e-6) for s, h in zip(shifts, entropies[2], strict=True)],
                "entropy_shift_absolute": shifts,
                "logp_shift": [
                    p[t] - q[t] for p, q, t in zip(anchor.tolist(), removing.tolist(), completion, strict=True)
                ],
                **from_removing,
            }
            from_preserving = divergences(anchor, preserving, completion)
            found = (gates, scores, from_preserving, from_removing, entropies)
            rollouts.append(Rollout(len(completion), advantage, *found))
    return rollouts


def best(scores, count):
    """Indices of the highest scores; of equal ones the earlier."""
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


def chosen_tokens(scores, fraction=TOP_FRACTION, rounded=math.floor):
    """Indices of the best tokens among those with a positive score."""
    candidates = sum(score > 0 for score in scores)
    return best(scores, max(1, rounded(fraction * candidates))) if candidates else []


def contrast(difference, tau):
    """softplus(difference / tau)."""
    x = difference / tau
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def reference_term(
    rollouts,
    score="entropy_shift",
    divergence="k3",
    gate="advantage",
    normalization="rollout",
    parts=1,
    tau=TAU,
    fraction=TOP_FRACTION,
    places=None,
    loss=None,
):
    """The step's perception term; `parts` is its number of micro-batches.

    `places` and `loss` replace the selection of a rollout's tokens and the loss of one of them.
    """
    places = places or (lambda r: chosen_tokens(r.scores[score], fraction))
    loss = loss or (lambda r, t: contrast(r.preserving[divergence][t] - r.removing[divergence][t], tau))
    step = [[loss(r, place) for place in places(r)] if r.gates[gate] else None for r in rollouts]
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


def reference_gradient(model, processor, rows, seed, anchor_gradients, view_gradients):
    """Gradient of the published term (k3, relative shift, A > 0), rollout by rollout, by autograd in float64."""
    terms = []
    for row in rows:
        for completion, advantage, _ in drawn_rollouts(processor, row):
            if not row["images"] or advantage <= 0:
                continue
            logps, entropies = [], []
            for images in view_images(row, seed):
                all_logps = reference_logits(model, processor, row, images, completion).log_softmax(-1)
                picked = torch.stack([all_logps[place, token] for place, token in enumerate(completion)])
                logps.append(picked if (view_gradients if logps else anchor_gradients) else picked.detach())
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
