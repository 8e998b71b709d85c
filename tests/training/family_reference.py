"""Token-weighting methods from their formulas in float64: one rollout at a time, lists and loops."""

import math

import torch
from float64_reference import JITTER, best, drawn_rollouts, log_softmax, prompt_text, reference_logits, view_images

from cppo.views import ViewStrengths

STATIC = (JITTER[0], ("static",), ViewStrengths())
VIEWS_OF = {"tor": (JITTER[0], "image_removed"), "vepo": (JITTER[0], "pixel_noise"), "prpo": STATIC}


def scaled(values):
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def completions(processor, rows):
    """Every rollout's row and completion, in order."""
    return [(row, completion) for row in rows for completion, _, _ in drawn_rollouts(processor, row)]


def nucleus_entropies(model, processor, rows, mass):
    """Of every rollout, the entropy of each token's nucleus."""
    found = []
    for row, completion in completions(processor, rows):
        with torch.no_grad():
            images = view_images(row, 0)[0]
            logps = log_softmax(reference_logits(model, processor, row, images, completion).numpy())
        entropies = []
        for place in logps.tolist():
            kept, total = [], 0.0
            for logp in sorted(place, reverse=True):
                if total < mass:
                    kept.append(math.exp(logp))
                total += math.exp(logp)
            shares = [p / math.fsum(kept) for p in kept]
            entropies.append(-math.fsum(p * math.log(p) for p in shares))
        found.append(entropies)
    return found


def cosines(model, processor, rows):
    """Per rollout with images and token, the cosine with the image tokens: the mean over them and the layers, and that
    of the last layer with their mean.
    """
    found = []
    for row, completion in completions(processor, rows):
        if not row["images"]:
            found.append(None)
            continue
        images = view_images(row, 0)[0]
        inputs = dict(processor(text=[prompt_text(row)], images=[images], return_tensors="pt"))
        prompt = inputs["input_ids"].shape[1]
        tail = torch.tensor([completion])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tail)], dim=1)
        with torch.no_grad():
            layers = model(**inputs, output_hidden_states=True).hidden_states[1:]
        seen = [
            place for place, token in enumerate(inputs["input_ids"][0].tolist()) if token == model.config.image_token_id
        ]
        assert max(seen) < prompt
        everywhere, last = [], []
        for t in range(len(completion)):
            own = prompt + min(t, len(completion) - 2)  # no pass runs over the last token
            each = [
                torch.cosine_similarity(layer[0, own], layer[0, place], dim=0).item()
                for layer in layers
                for place in seen
            ]
            everywhere.append(math.fsum(each) / len(each))
            middle = layers[-1][0, seen].mean(dim=0)
            last.append(torch.cosine_similarity(layers[-1][0, own], middle, dim=0).item())
        found.append((everywhere, last))
    return found


def mssr(rollouts, rewards, values):
    """A + min(0.4 H, |A| / 2), with H = -p log p of the sampled token.

    A is a rollout's reward minus its prompt's value, with mean 0 and variance 1 over the batch; text alone counts.
    """
    raw = [reward - value for reward, value in zip(rewards, values, strict=True)]
    mean = math.fsum(raw) / len(raw)
    deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in raw) / len(raw))
    advantages = [(one - mean) / deviation for one in raw]
    return [
        [A + min(0.4 * math.exp(-s) * s, abs(A) / 2) for s in r.surprisals]
        for r, A in zip(rollouts, advantages, strict=True)
    ]


def tor(rollouts, nucleus):
    """Weight 1 for the batch's 30 % of highest entropy, 1/2 for others of the 30 % of largest difference, else 0."""
    tokens = [(i, t) for i, r in enumerate(rollouts) if r.has_images for t in range(r.tokens)]
    count = math.floor(0.3 * len(tokens))
    differences = [abs(rollouts[i].removing["nll"][t] - rollouts[i].surprisals[t]) for i, t in tokens]
    perceiving = {tokens[place] for place in best(differences, count)}
    reasoning = {tokens[place] for place in best([nucleus[i][t] for i, t in tokens], count)}
    assert perceiving - reasoning
    return [
        [1.0 if (i, t) in reasoning else 0.5 if (i, t) in perceiving else 0.0 for t in range(r.tokens)]
        if r.has_images
        else [1.0] * r.tokens
        for i, r in enumerate(rollouts)
    ]


def vepo(rollouts):
    """The best fifth of each rollout by E (1 - (1 - J)^0.7 (1 - D)^0.3), times all tokens over the selected ones."""
    weights = []
    for r in rollouts:
        if not r.has_images:
            weights.append([1.0] * r.tokens)
            continue
        shift = [abs(a - b) for a, b in zip(r.entropies[0], r.entropies[2], strict=True)]
        signals = zip(scaled(r.removing["js"]), scaled(shift), scaled(r.entropies[0]), strict=True)
        scores = [e * (1 - (1 - j) ** 0.7 * (1 - d) ** 0.3) for j, d, e in signals]
        kept = best(scores, max(1, math.floor(0.2 * r.tokens)))
        weights.append([float(t in kept) for t in range(r.tokens)])
    share = sum(map(sum, weights)) / sum(map(len, weights))
    return [[weight / share for weight in row] for row in weights]


def pepo(rollouts, near, part):
    """The part in use of T softmax(s (1 + 0.05 tanh(u - mean u)) / 1.8)."""
    weights = []
    for r, cosine in zip(rollouts, near, strict=True):
        if not r.has_images:
            weights.append([1.0] * r.tokens)
            continue
        s = cosine[0]
        u = [a + b for a, b in zip(scaled(s), scaled(r.entropies[0]), strict=True)]
        middle = math.fsum(u) / len(u)
        exps = [math.exp(a * (1 + 0.05 * math.tanh(b - middle)) / 1.8) for a, b in zip(s, u, strict=True)]
        weights.append([1 - part + part * len(s) * value / math.fsum(exps) for value in exps])
    return weights


def vgpo(rollouts, near):
    """Factors of token and rollout; the rollouts of a row are a group."""
    factors, sums = [], []
    for r, cosine in zip(rollouts, near, strict=True):
        if not r.has_images:
            factors.append([1.0] * r.tokens)
            sums.append(None)
            continue
        s = [(1 + value) / 2 for value in cosine[1]]
        late = range(len(s) // 2, len(s))
        least = sorted((s[t] for t in late), reverse=True)[max(1, math.floor(0.2 * len(late))) - 1]
        s = [v * (1 + 0.3 * t / (len(s) - 1)) if t in late and v >= least else v for t, v in enumerate(s)]
        w = scaled(s)
        factors.append([min(max(1 + value - math.fsum(w) / len(w), 0.1), 2.0) for value in w])
        sums.append(math.fsum(w))
    for first in range(0, len(rollouts), 4):
        if sums[first] is None:
            continue
        u = scaled(sums[first : first + 4])
        for i, value in enumerate(u, start=first):
            own = min(max(1 + value - math.fsum(u) / 4, 0.9), 2.0)
            factors[i] = [own * factor for factor in factors[i]]
    return factors


def prpo(rollouts):
    """PGPO's weights of J(I-) (1 - J(I+) / ln 2)."""
    weights = []
    for r in rollouts:
        if not r.has_images:
            weights.append([1.0] * r.tokens)
            continue
        pairs = zip(r.removing["js"], r.preserving["js"], strict=True)
        u = scaled([math.log(1 + minus * (1 - plus / math.log(2))) for minus, plus in pairs])
        raw = [value / 0.4 if value < 0.4 else 1 + 2 * (value - 0.4) / 0.6 for value in u]
        weights.append([value * len(raw) / math.fsum(raw) for value in raw])
    return weights


def sent_penalty(rollouts, old_logps):
    """0.1 x 2 |log p - log p_old| on the token of largest covariance among the 80 % of lowest entropy, and 0.1 x 1/2 on
    the token of smallest: one token each, because there are few. A mean over all tokens.
    """
    tokens = [(i, t) for i, r in enumerate(rollouts) for t in range(r.tokens)]
    lowest = best([-rollouts[i].entropies[0][t] for i, t in tokens], math.floor(0.8 * len(tokens)))
    low = [tokens[place] for place in lowest]
    logps = [-rollouts[i].surprisals[t] for i, t in low]
    advantages = [rollouts[i].advantage for i, _ in low]
    means = [math.fsum(values) / len(low) for values in (logps, advantages)]
    covariances = [(p - means[0]) * (a - means[1]) for p, a in zip(logps, advantages, strict=True)]
    high, least = best(covariances, 1)[0], best([-value for value in covariances], 1)[0]
    costs = [abs(logps[place] - old_logps[low[place][0]][low[place][1]]) for place in (high, least)]
    return 0.1 * (2.0 * costs[0] + 0.5 * costs[1]) / len(tokens)
