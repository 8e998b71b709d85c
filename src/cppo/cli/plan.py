"""`cppo plan`: estimate the memory of training, and what fits, from a model's configuration alone."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cppo.cli.console import quiet_libraries
from cppo.cli.parser import COUNT, Parser, check_output_file, number_in
from cppo.errors import UserError
from cppo.files import replace_text
from cppo.methods import get_method
from cppo.recipes import load_recipe
from cppo.runs.memory_work import DEFAULT_PROMPT_TOKENS

if TYPE_CHECKING:
    from cppo.runs.memory_plan import Need
    from cppo.runs.memory_work import Work

GIB = 2**30
DEFAULT_RECIPE = "cppo-3b"
ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference model",
    "buffers": "communication",
    "pixels": "pixels",
    "activations": "activations",
    "update": "update",
    "keys_and_values": "keys and values",
    "generation": "rest of generation",
    "scoring": "or: scoring",
    "rollouts": "rollouts",
}
"""The rows of the table: parts of `Need`, each followed by its sum."""
SUMS = ("update", "rollouts")


def run(argv: Sequence[str]) -> None:
    """Print the table and what fits. Raises UserError for a user's mistake, and if nothing fits."""
    arguments = _parser().parse_all(argv)
    check_output_file("--json", arguments.json)
    overrides = {name: getattr(arguments, name) for name in ("method", "num_generations")}
    if arguments.method is not None:
        get_method(arguments.method)
    recipe = load_recipe("train", arguments.config, {name: value for name, value in overrides.items() if value})
    model = recipe.options.model if arguments.model is None else arguments.model
    quiet_libraries()

    from cppo.runs.memory_plan import ASSUMPTIONS, RESERVE, largest_micro_batch, largest_slice, need
    from cppo.runs.memory_work import WAYS
    from cppo.runs.model_shapes import read_shapes
    from cppo.runs.recipe_plan import recipe_work

    shapes = read_shapes(model)
    given = ("prompt_tokens", "image_tokens", "response_tokens", "micro_batch", "lora_r")
    work = recipe_work(recipe, arguments.gpus, **{name: getattr(arguments, name) for name in given})
    budget = arguments.memory * GIB * (1 - RESERVE)
    needs = {way.name: need(shapes, way, work) for way in WAYS}
    fits = {way.name: {"micro_batch": largest_micro_batch(shapes, way, work, budget)} for way in WAYS}
    generated = "rollouts by vLLM; its memory is not counted"
    if work.generation_slice:
        generated = f"generation slice {work.generation_slice}"
        for way in WAYS:
            # A reference scores the rollouts by micro-batches too.
            fitting = replace(work, micro_batch=min(work.micro_batch, fits[way.name]["micro_batch"] or 1))
            fits[way.name]["generation_slice"] = largest_slice(shapes, way, fitting, budget)
    print(f"{model}: {shapes.weights:,} weights; GPUs: {arguments.gpus} of {arguments.memory:g} GiB; GiB on each")
    print(
        f"rollouts of {work.prompt_tokens} + {work.response_tokens} tokens ({work.image_tokens} of an image), "
        f"{work.views} views, micro-batch {work.micro_batch}, {generated}"
    )
    for line in _table(needs, fits, work):
        print(line)
    for line in ASSUMPTIONS:
        print(f"- {line}")
    if arguments.json is not None:
        found = {name: {**_bytes(one), "fits": fits[name]} for name, one in needs.items()}
        written = {"model": model, "gpus": arguments.gpus, "memory_gib": arguments.memory, "work": asdict(work)}
        written |= {"shapes": asdict(shapes), "bytes": found, "assumptions": list(ASSUMPTIONS)}
        replace_text(Path(arguments.json), json.dumps(written, indent=2) + "\n")
    if not any(all(fit.values()) for fit in fits.values()):
        raise UserError(
            f"{model} does not fit in {arguments.memory:g} GiB on each of {arguments.gpus} GPUs, even with "
            "one rollout at a time: use more GPUs, shorter rollouts or smaller images"
        )


def _bytes(one: "Need") -> dict[str, int]:
    return {**asdict(one), "update": one.update, "rollouts": one.rollouts}


def _table(needs: "dict[str, Need]", fits: dict[str, dict[str, int]], work: "Work") -> list[str]:
    limits = {"micro_batch": work.step_rollouts, "generation_slice": work.batch_rollouts}
    fitting = {name: f"{name}, at most".replace("_", " ") for name in limits}
    width = max(map(len, (*ROWS.values(), *fitting.values())))
    lines = [" " * width + "".join(f"{name:>10}" for name in needs)]
    for row, title in ROWS.items():
        figures = "".join(f"{getattr(one, row) / GIB:>10.1f}" for one in needs.values())
        lines.append(f"{'= ' * (row in SUMS) + title:<{width}}{figures}")
    for name in next(iter(fits.values())):
        largest = "".join(f"{fit[name] or 'none':>10}" for fit in fits.values())
        lines.append(f"{fitting[name]:<{width}}{largest}   of {limits[name]}")
    return lines


def _parser() -> Parser:
    parser = Parser(
        prog="cppo plan",
        description="Estimates the memory of training on each GPU, in four ways, and says what fits. It needs the "
        "model's config.json, but neither its weights nor a GPU.",
    )
    parser.add_argument("--model", metavar="DIR|NAME", help="a folder, a config.json or a name (default: the recipe's)")
    parser.add_argument("--gpus", type=COUNT, default=8, metavar="N", help="GPUs that train together (default: 8)")
    parser.add_argument(
        "--memory", type=number_in("(0, inf)"), default=80.0, metavar="X", help="GiB of each GPU (default: 80)"
    )
    parser.add_argument(
        "--config",
        default=DEFAULT_RECIPE,
        metavar="NAME|FILE",
        help=f"the recipe for values that are not given here (default: {DEFAULT_RECIPE})",
    )
    parser.add_argument("--method", metavar="NAME", help="the method, which sets the number of scored views")
    parser.add_argument(
        "--prompt_tokens",
        type=COUNT,
        metavar="N",
        help=f"tokens of a prompt with its image (default: the recipe's longest, or {DEFAULT_PROMPT_TOKENS})",
    )
    whole = number_in("[0, inf)", whole=True)
    parser.add_argument("--image_tokens", type=whole, metavar="N", help="tokens of its image (default: three quarters)")
    parser.add_argument(
        "--response_tokens", type=COUNT, metavar="N", help="tokens of a response (default: the longest)"
    )
    group = number_in("[2, inf)", whole=True)
    parser.add_argument(
        "--num_generations", type=group, metavar="N", help="rollouts of a prompt (default: the recipe's)"
    )
    parser.add_argument("--micro_batch", type=COUNT, metavar="N", help="rollouts of a backward pass on each GPU")
    parser.add_argument("--lora_r", type=COUNT, metavar="N", help="rank of the adapter")
    parser.add_argument("--json", metavar="FILE", help="write the counts as JSON, in bytes")
    return parser
