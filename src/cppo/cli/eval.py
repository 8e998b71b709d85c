"""`cppo eval`: accuracy and format rate of a model on data."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cppo.cli.checks import check_data, check_model, check_output_file
from cppo.cli.console import percent, quiet_libraries
from cppo.cli.parser import Parser, add_pixel_bounds, at_least, columns_option, fraction
from cppo.data import PixelBounds, check_columns, load_records
from cppo.errors import UserError
from cppo.recipes import RunDirectory
from cppo.rewards import check_rewards, number_tolerance

DEFAULT_MAX_NEW_TOKENS = 512


def run(argv: Sequence[str]) -> None:
    """Evaluate, print the figures, write them as JSON on request. Raises UserError for a user's mistake."""
    arguments = _parser().parse_all(argv)
    check_model(arguments.model)
    check_data(arguments.data)
    check_columns(arguments.columns)
    check_output_file("--json", arguments.json)
    trained = trained_recipe(arguments.model)
    system_prompt = trained.get("system_prompt") if arguments.system_prompt is None else arguments.system_prompt
    max_new_tokens = arguments.max_new_tokens or trained.get("max_completion_length") or DEFAULT_MAX_NEW_TOKENS
    pixels = {
        name: trained.get(name) if getattr(arguments, name) is None else getattr(arguments, name)
        for name in ("min_pixels", "max_pixels")
    }
    tolerance = trained.get("tolerance", 0.0) if arguments.tolerance is None else arguments.tolerance
    source = load_records(
        arguments.data,
        split="test",
        limit=arguments.limit,
        columns=arguments.columns,
        max_bad_fraction=arguments.max_bad_fraction,
        pixels=PixelBounds(pixels["min_pixels"], pixels["max_pixels"]),
    )
    quiet_libraries()

    from tqdm import tqdm

    from cppo.evaluation import BLANK, CLEAN, Condition, evaluate, load_model

    model, processor = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)

    def answer_all(label: str, condition: Condition) -> dict[str, Any]:
        with tqdm(total=len(source), desc=label, unit="item", leave=False) as bar:
            return evaluate(
                model,
                processor,
                source,
                samples=arguments.samples,
                batch_size=arguments.batch_size,
                max_new_tokens=max_new_tokens,
                seed=arguments.seed,
                system_prompt=system_prompt,
                condition=condition,
                tolerance=tolerance,
                progress=bar.update,
            ).to_dict()

    report = {"model": arguments.model, "data": arguments.data, **answer_all("eval", CLEAN)}
    if arguments.blank:
        blind = answer_all("blank image", BLANK)
        report |= {"blank_accuracy": blind["accuracy"], "blank_accuracy_ci95": blind["accuracy_ci95"]}
    report |= {
        "seed": arguments.seed,
        "max_new_tokens": max_new_tokens,
        "system_prompt": system_prompt,
        "tolerance": tolerance,
        **pixels,
        "skipped_rows": len(source.skipped),
    }
    for line in _lines(report):
        print(line)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def trained_recipe(model: str) -> dict[str, Any]:
    """What of a run directory's recipe an evaluation takes over, so that the task it trained for is measured."""
    config = RunDirectory(model).config
    try:
        recipe = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    wanted = {"system_prompt": str, "max_completion_length": int, "min_pixels": int, "max_pixels": int}
    given = recipe if isinstance(recipe, dict) else {}
    taken = {name: given[name] for name, kind in wanted.items() if isinstance(given.get(name), kind)}
    rewards = given.get("rewards")
    if isinstance(rewards, list) and all(isinstance(reward, str) for reward in rewards):
        with contextlib.suppress(UserError):  # a reward of files that are no longer there does not matter here
            taken["tolerance"] = number_tolerance(check_rewards(rewards, None))
    return taken


def _lines(report: dict[str, Any]) -> list[str]:
    how = "greedy" if report["samples"] == 1 else f"mean of {report['samples']} samples at temperature 1"
    lines = [
        f"items      {report['n']:,} ({how}, 95 % interval)",
        f"accuracy   {percent(report['accuracy'], report['accuracy_ci95'])}",
    ]
    if "blank_accuracy" in report:
        lines.append(f"blank      {percent(report['blank_accuracy'], report['blank_accuracy_ci95'])}   (grey image)")
    lines.append(f"format     {percent(report['format_rate'])}")
    if report["skipped_rows"]:
        lines.append(f"skipped    {report['skipped_rows']} rows that cannot be used")
    return lines


def _parser() -> Parser:
    parser = Parser(prog="cppo eval", description="Accuracy and format rate of a model on data.")
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="`micro`, a folder or a Hugging Face name")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="SPEC",
        help="tasks:NAME[?option=value&...], a file, a folder or hub:ORG/NAME[:SPLIT]",
    )
    parser.add_argument(
        "--columns",
        type=columns_option,
        metavar="{..}",
        help="your column names {prompt: question, ...}, or a known layout",
    )
    parser.add_argument(
        "--samples", type=at_least(1), default=1, metavar="N", help="1 is greedy (default); more: avg@N"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N items")
    parser.add_argument(
        "--blank", action="store_true", help="also the accuracy with a grey image: what needs no looking"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures as one JSON object")
    parser.add_argument("--system_prompt", metavar="TEXT", help="default: the one that a run directory trained with")
    parser.add_argument(
        "--batch_size", type=at_least(1), default=64, metavar="N", help="responses at once (default: 64)"
    )
    parser.add_argument(
        "--max_new_tokens",
        type=at_least(1),
        metavar="N",
        help=f"longest response (default: a run directory's own, else {DEFAULT_MAX_NEW_TOKENS})",
    )
    parser.add_argument(
        "--tolerance",
        type=fraction,
        metavar="X",
        help="how far a number may lie from the expected one, as a fraction of it (default: as trained, else 0)",
    )
    add_pixel_bounds(parser)
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument(
        "--max_bad_fraction", type=fraction, default=0.01, metavar="X", help="bad rows skipped up to it"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on CPU, else as saved"
    )
    return parser
