"""`cppo inspect`: show which tokens of a model's responses depend on the image, as a page and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from cppo.cli.console import quiet_libraries
from cppo.cli.parser import COUNT, SEED, Parser, add_data_options, check_output_file, check_two_files
from cppo.cli.trained import (
    ANY_MODEL,
    add_answer_options,
    answer_settings,
    answering_model,
    asked_rows,
    recipe_views,
    trained_recipe,
)
from cppo.errors import UserError
from cppo.progress import Progress
from cppo.runs.checks import check_model

DEFAULT_LIMIT = 20


def run(argv: Sequence[str]) -> None:
    """Inspect, write page and JSON, print the detectors' quality. Raises UserError for a user's mistake."""
    arguments = _parser().parse_all(argv)
    check_model(arguments.model)
    if Path(arguments.out).suffix.lower() != ".html":
        raise UserError(f"--out: {arguments.out}: write a .html file (--json FILE writes the numbers)")
    check_output_file("--out", arguments.out)
    check_output_file("--json", arguments.json)
    check_two_files("--out and --json", arguments.out, arguments.json)
    _, options, sampler = recipe_views(arguments)
    trained = trained_recipe(arguments.model)
    settings = answer_settings(arguments, trained)
    source = asked_rows(arguments, settings)
    quiet_libraries()

    from cppo.evaluation.inspection import InspectOptions, inspect_record
    from cppo.hooks import register_own
    from cppo.reports.inspection import NO_TRUTH, detector_table, json_item, render_inspection, sampling_text

    register_own(options)
    model, processor = answering_model(arguments, settings, source)
    asked = InspectOptions(
        samples=arguments.samples,
        temperature=options.get("temperature", 1.0),
        max_new_tokens=settings["max_new_tokens"],
        seed=arguments.seed,
        system_prompt=settings["system_prompt"],
        score=options["perception_score"],
        selector=options["perception_selector"],
        top_fraction=options["perception_top_fraction"],
        top_rounding=options["perception_top_rounding"],
        gate=options["perception_gate"],
        tolerance=trained.get("tolerance", 0.0),
        run=SimpleNamespace(**options),
    )
    score = options["perception_score"]
    items = [
        inspect_record(model, processor, record, sampler, asked)
        for record in Progress(source, total=len(source), desc="inspect", unit="items")
    ]
    if arguments.json:
        content = json.dumps([json_item(item, score) for item in items], ensure_ascii=False)
        Path(arguments.json).write_text(content + "\n", encoding="utf-8")
    page = render_inspection(items, model=arguments.model, data=" ".join(arguments.data), score=score)
    Path(arguments.out).write_text(page, encoding="utf-8")
    correct = sum(item.responses[0].correct for item in items)
    print(f"items      {len(items):,}, {correct:,} with a right first response")
    print(f"responses  {sampling_text(asked)}")
    table = detector_table(items)
    if not table:
        print(f"detectors  not judged: {NO_TRUTH}")
    else:
        print("detectors  how well each score finds the tokens that are read from the image, of 1")
    for name, quality in table.items():
        rule = "none" if quality.precision is None else f"{quality.precision:.3f}"
        print(
            f"{name:<24} AUPRC {quality.auprc:.3f} (chance {quality.base_rate:.3f})   "
            f"selected: precision {rule}, recall {quality.recall:.3f}"
        )
    print(f"report     {arguments.out}")


def _parser() -> Parser:
    parser = Parser(prog="cppo inspect", description="Shows which tokens of a model's responses depend on the image.")
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|NAME",
        help=ANY_MODEL,
    )
    add_data_options(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the page, a .html file")
    parser.add_argument("--json", metavar="FILE", help="write the numbers too: a list, one object an item")
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="take views, score, selection, gate and temperature from this recipe (default: a run directory's own)",
    )
    parser.add_argument(
        "--limit", type=COUNT, default=DEFAULT_LIMIT, metavar="N", help=f"items (default: {DEFAULT_LIMIT})"
    )
    parser.add_argument(
        "--samples", type=COUNT, default=4, metavar="N", help="responses an item; 1 is greedy (default: 4)"
    )
    parser.add_argument(
        "--seed", type=SEED, default=0, metavar="N", help="random seed of sampling and views (default: 0)"
    )
    add_answer_options(parser)
    return parser
