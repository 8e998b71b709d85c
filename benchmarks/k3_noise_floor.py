"""Size of the k3 divergence and of its gradient where two passes differ only by rounding.

The contrastive perception loss compares k3 divergences at tau = 0.1. Synthetic hidden states and an LM head give logits
like a language model's (a mix of confident and open tokens). First, three passes score the same view and differ only in
rounding: every true divergence is 0 and the loss is ln 2. Then views that truly differ a little are scored, and the
direction of the loss gradient is compared with float64. Writes a Markdown table to standard output.

    python benchmarks/k3_noise_floor.py --seeds 0 1 2 --json noise_floor.json
"""

import argparse
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cppo.perception import contrastive_perception_tokens, k3_divergence, kl_divergence

FLOAT32_ROUNDING, BFLOAT16_ROUNDING = 2.0**-24, 2.0**-9


@dataclass(frozen=True)
class Precision:
    """Where a scoring pass rounds: hidden states, logits, output of the log-softmax."""

    name: str
    hidden_rounding: float
    logits_dtype: torch.dtype
    logps_dtype: torch.dtype


FLOAT32 = Precision("float32 throughout", FLOAT32_ROUNDING, torch.float32, torch.float32)
BFLOAT16 = Precision("bf16 throughout", BFLOAT16_ROUNDING, torch.bfloat16, torch.bfloat16)
# (anchor, views): the last two score the anchor in float32 and the views in bf16.
CONDITIONS = [
    (FLOAT32, FLOAT32),
    (Precision("bf16 hidden states, float32 head", BFLOAT16_ROUNDING, torch.float32, torch.float32),) * 2,
    (Precision("bf16 logits, float32 log-softmax", BFLOAT16_ROUNDING, torch.bfloat16, torch.float32),) * 2,
    (BFLOAT16, BFLOAT16),
    (FLOAT32, Precision("views' float32 logits cast to bf16", FLOAT32_ROUNDING, torch.bfloat16, torch.float32)),
    (FLOAT32, BFLOAT16),
]


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [N, D] float64
    head: Tensor  # [V, D] float64
    token: Tensor  # [N] sampled from the anchor's distribution


def make_problem(args: argparse.Namespace, seed: int) -> tuple[Problem, torch.Generator]:
    """Logits with standard deviation 1-2 and one token raised by 8-30: most tokens sure, some open."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(args.vocabulary, args.width, generator=generator, dtype=torch.float64)
    head /= math.sqrt(args.width)
    spread = 1.0 + torch.rand(args.tokens, 1, generator=generator, dtype=torch.float64)
    hidden = spread * torch.randn(args.tokens, args.width, generator=generator, dtype=torch.float64)
    favoured = head[torch.randint(args.vocabulary, (args.tokens,), generator=generator)]
    boost = 8.0 + 22.0 * torch.rand(args.tokens, 1, generator=generator, dtype=torch.float64)
    hidden += boost * favoured / favoured.square().sum(dim=1, keepdim=True)
    token = torch.multinomial(torch.softmax(hidden @ head.T, -1), 1, generator=generator)[:, 0]
    return Problem(hidden, head, token), generator


def one_pass(
    problem: Problem, hidden: Tensor, precision: Precision, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and log-probabilities of the sampled tokens [N] in a pass with its own roundings.

    Two forward passes over one input differ by about a rounding of every activation when batch, padding or kernel
    differ. One relative rounding of the last hidden states models that; a deep network adds more.
    """
    uniform = 2.0 * torch.rand(hidden.shape, generator=generator, dtype=torch.float64) - 1.0
    rounded = (hidden * (1.0 + precision.hidden_rounding * uniform)).float()
    logits = (rounded @ problem.head.float().T).to(precision.logits_dtype)
    logps = torch.log_softmax(logits, -1).to(precision.logps_dtype)
    return logits, logps.gather(1, problem.token[:, None])[:, 0]


def quantiles(values: Tensor) -> dict[str, float]:
    median, high, top = torch.quantile(values.double(), torch.tensor([0.5, 0.99, 1.0], dtype=torch.float64)).tolist()
    return {"mean": values.double().mean().item(), "median": median, "p99": high, "max": top}


def label(anchor: Precision, views: Precision) -> str:
    return anchor.name if anchor is views else f"anchor {anchor.name}; {views.name}"


def measure_floor(problems: list[tuple[Problem, torch.Generator]], temperature: float) -> Iterator[dict]:
    """Three passes over the same view: |difference of log-probabilities|, |k3|, exact KL and |CPL - ln 2|."""
    for anchor, views in CONDITIONS:
        difference, k3, kl, deviation = [], [], [], []
        for problem, generator in problems:
            logits, logps = one_pass(problem, problem.hidden, anchor, generator)
            plus_logits, plus = one_pass(problem, problem.hidden, views, generator)
            _, minus = one_pass(problem, problem.hidden, views, generator)
            d_plus, d_minus = k3_divergence(logps, plus), k3_divergence(logps, minus)
            difference.append((plus.double() - logps.double()).abs())
            k3.append(d_plus.abs())
            kl.append(kl_divergence(logits, plus_logits).abs())
            deviation.append((contrastive_perception_tokens(d_plus, d_minus, temperature) - math.log(2.0)).abs())
        columns = {"logp_difference": difference, "k3": k3, "kl": kl, "cpl_deviation": deviation}
        yield {"condition": label(anchor, views)} | {
            name: quantiles(torch.cat(values)) for name, values in columns.items()
        }


def logp_gradient(anchor: Tensor, plus: Tensor, minus: Tensor, temperature: float) -> Tensor:
    """Gradient of the mean loss with respect to the three passes' log-probabilities, as one float64 vector."""
    leaves = [logps.double().requires_grad_() for logps in (anchor, plus, minus)]
    d_plus, d_minus = k3_divergence(leaves[0], leaves[1]), k3_divergence(leaves[0], leaves[2])
    loss = contrastive_perception_tokens(d_plus, d_minus, temperature).mean()
    return torch.cat(torch.autograd.grad(loss, leaves))


def measure_gradient(
    problems: list[tuple[Problem, torch.Generator]], temperature: float, shifts: list[float]
) -> Iterator[dict]:
    """Cosine between the loss gradients of rounded and exact passes, for views that truly differ a little.

    A view adds noise to the hidden states: I- of the given relative size, I+ of a quarter of it.
    """
    for shift in shifts:
        exact_gradients: list[Tensor] = []
        rounded_gradients: dict[str, list[Tensor]] = {label(*condition): [] for condition in CONDITIONS}
        true_k3 = []
        for problem, generator in problems:
            hidden = [problem.hidden]
            for size in (0.25 * shift, shift):
                noise = torch.randn(problem.hidden.shape, generator=generator, dtype=torch.float64)
                hidden.append(problem.hidden + size * problem.hidden.abs() * noise)
            exact = [
                torch.log_softmax(part @ problem.head.T, -1).gather(1, problem.token[:, None])[:, 0] for part in hidden
            ]
            true_k3.append(k3_divergence(exact[0], exact[2]))
            exact_gradients.append(logp_gradient(*exact, temperature))
            for anchor, views in CONDITIONS:
                precisions = (anchor, views, views)
                logps = [
                    one_pass(problem, part, precision, generator)[1]
                    for part, precision in zip(hidden, precisions, strict=True)
                ]
                rounded_gradients[label(anchor, views)].append(logp_gradient(*logps, temperature))
        expected = torch.cat(exact_gradients)
        yield {
            "relative_shift": shift,
            "true_k3_removing": quantiles(torch.cat(true_k3)),
            "cosine": {
                name: torch.cosine_similarity(torch.cat(parts), expected, dim=0).item()
                for name, parts in rounded_gradients.items()
            },
        }


def markdown(result: dict) -> str:
    lines = [
        "| identical views, scored in | log-prob difference, mean / p99 | k3, mean / p99 / max "
        "| exact KL, mean / p99 | abs(CPL - ln 2), mean / p99 / max |",
        "|---|---|---|---|---|",
    ]
    for row in result["floor"]:
        cells = [row["condition"]]
        for name, keys in (
            ("logp_difference", ("mean", "p99")),
            ("k3", ("mean", "p99", "max")),
            ("kl", ("mean", "p99")),
            ("cpl_deviation", ("mean", "p99", "max")),
        ):
            cells.append(" / ".join(f"{row[name][key]:.1e}" for key in keys))
        lines.append("| " + " | ".join(cells) + " |")
    shifts = result["gradient"]
    header = [f"{row['true_k3_removing']['mean']:.0e}" for row in shifts]
    lines += [
        "",
        f"| gradient cosine at a mean true k3(I, I-) of | {' | '.join(header)} |",
        "|---" * (len(shifts) + 1) + "|",
    ]
    for name in shifts[0]["cosine"]:
        lines.append(f"| {name} | " + " | ".join(f"{row['cosine'][name]:.3f}" for row in shifts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one synthetic problem a seed")
    parser.add_argument("--tokens", type=int, default=256, help="response tokens per seed")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=256, help="size of a hidden state")
    parser.add_argument("--temperature", type=float, default=0.1, help="tau of the contrastive perception loss")
    parser.add_argument("--shifts", type=float, nargs="+", default=[1e-3, 1e-2, 3e-2, 1e-1, 3e-1], help="relative")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    args = parser.parse_args()

    problems = [make_problem(args, seed) for seed in args.seeds]
    logps = [torch.log_softmax(problem.hidden @ problem.head.T, -1) for problem, _ in problems]
    result = {
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "entropy": quantiles(torch.cat([-(part.exp() * part).sum(-1) for part in logps])),
        "floor": list(measure_floor(problems, args.temperature)),
        "gradient": list(measure_gradient(problems, args.temperature, args.shifts)),
    }
    entropy = ", ".join(f"{name} {value:.3g}" for name, value in result["entropy"].items())
    print(f"Python {platform.python_version()}, torch {torch.__version__}; entropy of the tokens in nats: {entropy}\n")
    print(markdown(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
