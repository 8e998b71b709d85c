"""`cppo eval`: accuracy, pass@k and format rate of a model on data or benchmarks, and its perception card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.cli.answering import (
    Answering,
    add_engine_options,
    categories,
    check_engine,
    model_identities,
    source_identity,
)
from cppo.cli.console import quiet_libraries
from cppo.cli.eval_report import category_rows, report_lines
from cppo.cli.parser import COUNT, SEED, Parser, add_data_options, check_output_file, check_two_files, number_in
from cppo.cli.trained import ANY_MODEL, add_answer_options, answer_settings, asked_rows, trained_recipe
from cppo.data import MissingColumns, RecordSource, first_prompts
from cppo.errors import UserError, tell
from cppo.runs.checks import check_model
from cppo.views import CARD_CONDITIONS, CONDITION_NAMES, ViewSampler, check_families

if TYPE_CHECKING:
    from cppo.evaluation import CardRow, EvalResult
    from cppo.evaluation.benchmarks import Suite


def run(argv: Sequence[str]) -> None:
    """Evaluate, print the figures, write them as JSON on request. Raises UserError for a user's mistake."""
    arguments = _parser().parse_all(argv)
    if arguments.list_benchmarks:
        from cppo.cli.eval_suite import benchmark_lines

        return print("\n".join(benchmark_lines()))
    suite = _suite(arguments)
    _check_files(arguments)
    check_engine(arguments)
    ks = _check_sampling(arguments)
    on_card: Sequence[str] = ()
    if arguments.card is not None:
        asked = list(dict.fromkeys(["clean", *(arguments.card or CARD_CONDITIONS)]))
        on_card = check_families("--card", asked, CONDITION_NAMES)
    settings, trained, published = _settings(arguments, on_card)
    if suite is not None:
        from cppo.cli.eval_suite import run_suite

        quiet_libraries()
        return run_suite(suite, arguments, settings, ks, {**model_identities(arguments.model), **settings})
    try:
        source = asked_rows(arguments, settings, extras=arguments.by)
    except MissingColumns as error:
        raise UserError(f"--by: {error}: name one of these, or add the column to every row") from error
    if arguments.card is not None and not any(record.images for record in source):
        raise UserError(f"--card: none of the rows of {source.name} has an image")
    quiet_libraries()

    from cppo.evaluation import get_condition, perception_card

    names = dict.fromkeys(["clean", *(["blank"] if arguments.blank else []), *on_card])
    conditions = [get_condition(name, trained) for name in names]
    answering = Answering(arguments)
    identity = {**source_identity(arguments), **answering.identity, **settings, "trained_views": _views(trained)}
    results = answering.answer(source, conditions, settings, arguments.responses, identity)
    if not answering.processes.is_first:
        return
    card: Sequence[CardRow] = ()
    if on_card:
        card = perception_card({name: results[name] for name in on_card}, tolerance=settings["tolerance"])
    report = _report(arguments, source, results, {**settings, "skipped_rows": len(source.skipped)}, ks)
    if card:
        report["card"] = [asdict(row) for row in card]
        report["card_families"] = {
            one.name: one.families for one in conditions if one.name.startswith("trained_") or len(one.families) > 1
        }
        report["trained_views"] = {**_views(trained), "source": "published" if published else "run"}
    if causes := _without_form(arguments, source, results["clean"], settings):
        report["format_warning"] = f"format 0 %: {'; '.join(causes)}"
        tell(f"warning: {report['format_warning']}")
    for line in report_lines(report, card):
        print(line)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _suite(arguments: Any) -> "Suite | None":
    """The requested suite, None without one; its defaults are set in `arguments`. Raises UserError."""
    if arguments.suite is not None:
        from cppo.cli.eval_suite import asked_suite

        return asked_suite(arguments)
    if arguments.data is None:
        raise UserError("give --data or --suite")
    if arguments.benchmark_folder is not None:
        raise UserError("--benchmark_folder needs --suite")
    arguments.samples = arguments.samples or 1
    return None


def _check_files(arguments: Any) -> None:
    """Check the named files and folders. Raises UserError."""
    if arguments.model is None:
        raise UserError("give --model: `micro`, a folder or a Hugging Face name")
    check_model(arguments.model)
    check_output_file("--json", arguments.json)
    if arguments.suite is not None:
        return
    check_output_file("--responses", arguments.responses)
    check_two_files("--json and --responses", arguments.json, arguments.responses)


def _report(
    arguments: Any,
    source: RecordSource,
    results: "Mapping[str, EvalResult]",
    settings: Mapping[str, Any],
    ks: Sequence[int],
) -> dict[str, Any]:
    """The results as JSON values, without the perception card."""
    clean = results["clean"]
    report = {"model": arguments.model, "data": arguments.data, **clean.to_dict(ks)}
    if arguments.blank:
        blind = results["blank"].to_dict()
        report |= {"blank_accuracy": blind["accuracy"], "blank_accuracy_ci95": blind["accuracy_ci95"]}
    report |= settings
    if arguments.by:
        rows = [categories(source, index) for index in range(len(source))]
        report["by"] = {name: category_rows(clean, [row[name] for row in rows]) for name in arguments.by}
    return report


def _without_form(arguments: Any, source: RecordSource, result: "EvalResult", settings: Mapping[str, Any]) -> list[str]:
    """The reason why no response has the form that the standard rewards look for; empty if some have it."""
    if result.format_rate:
        return []
    from cppo.evaluation import load_processor
    from cppo.rewards import ChatForm

    responses = [response for item in result.items for response in item.responses]
    form = ChatForm.of(load_processor(arguments.model))
    return form.causes(first_prompts(source, settings["system_prompt"]), responses)


def _check_sampling(arguments: Any) -> list[int]:
    """The k of pass@k: the requested ones, else powers of two up to the number of samples.

    Raises UserError for sampling options that do not go together.
    """
    samples, temperature = arguments.samples, arguments.temperature
    if samples > 1 and temperature == 0:
        raise UserError(f"--temperature 0 is greedy: {samples} samples would all be the same; give --samples 1")
    if arguments.top_p is not None and not (samples > 1 or temperature):
        raise UserError("--top_p needs sampling: give --temperature above 0, or --samples above 1")
    for k in arguments.pass_k or ():
        if k > samples:
            raise UserError(f"--pass_k {k} needs at least {k} samples an item, but --samples is {samples}")
    powers = [2**power for power in range(samples.bit_length())] if samples > 1 else []
    return sorted(set(arguments.pass_k)) if arguments.pass_k else powers


def _settings(arguments: Any, on_card: Sequence[str]) -> tuple[dict[str, Any], ViewSampler, bool]:
    """What decides the responses and their scores, as given, as trained, or by default; the trained views; and whether
    these are the published ones, for want of a run's. Raises UserError where the card needs the run's views, and they
    cannot be loaded.
    """
    trained = trained_recipe(arguments.model)
    greedy = arguments.samples == 1 and not arguments.temperature
    settings = {
        "samples": arguments.samples,
        "temperature": 0.0 if greedy else (1.0 if arguments.temperature is None else arguments.temperature),
        "top_p": 1.0 if arguments.top_p is None else arguments.top_p,
        "seed": arguments.seed,
        "tolerance": trained.get("tolerance", 0.0) if arguments.tolerance is None else arguments.tolerance,
        **answer_settings(arguments, trained),
    }
    if "views_error" in trained and any(name.startswith("trained_") for name in on_card):
        raise UserError(f"--card: {trained['views_error']}; the run trained with it")
    return settings, trained.get("views", ViewSampler(0)), "views" not in trained


def _views(sampler: ViewSampler) -> dict[str, Any]:
    families = {"preserving": list(sampler.preserving_families), "removing": list(sampler.removing_families)}
    return {**families, "strengths": asdict(sampler.strengths)}


def _parser() -> Parser:
    parser = Parser(
        prog="cppo eval",
        description="Accuracy, pass@k and format rate of a model on data or benchmarks, and its perception card.",
    )
    parser.add_argument("--model", metavar="DIR|NAME", help=ANY_MODEL)
    add_data_options(parser, required=False)
    parser.add_argument(
        "--suite",
        nargs="+",
        metavar="NAME",
        help="public benchmarks instead of --data: `paper`, `quick`, or some of --list_benchmarks",
    )
    parser.add_argument("--list_benchmarks", action="store_true", help="show the benchmarks that --suite knows")
    parser.add_argument(
        "--benchmark_folder", metavar="DIR", help="read the data sets of --suite from DIR/ORG/NAME, not from the hub"
    )
    parser.add_argument(
        "--samples",
        type=COUNT,
        metavar="N",
        help="answers an item (default: 1, for a suite 16, for `quick` 1); 1 is greedy, more give avg@N and pass@k",
    )
    parser.add_argument(
        "--temperature",
        type=number_in("[0, inf)"),
        metavar="X",
        help="0 is greedy (default: 1 for several samples, else 0)",
    )
    parser.add_argument(
        "--top_p", type=number_in("(0, 1]"), metavar="X", help="nucleus probability of sampling (default: 1)"
    )
    parser.add_argument(
        "--pass_k", type=COUNT, nargs="+", metavar="K", help="k of pass@k (default: powers of two up to N)"
    )
    parser.add_argument(
        "--limit", type=COUNT, metavar="N", help="only the first N items; with --suite N of each benchmark"
    )
    parser.add_argument(
        "--blank",
        action="store_true",
        help="also the accuracy with a grey image: what the model answers without seeing",
    )
    parser.add_argument(
        "--card",
        nargs="*",
        metavar="CONDITION",
        help="accuracy and consistency under perturbed images (default: "
        f"{', '.join(CARD_CONDITIONS)}; also trained_removing, a family, or file.py:function)",
    )
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="COLUMN", help="accuracy for each value of these columns of the data"
    )
    parser.add_argument(
        "--responses",
        metavar="FILE",
        help="store every response in a .jsonl file (for a suite: in a folder of them); resume from it",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results as one JSON object")
    parser.add_argument(
        "--tolerance",
        type=number_in("[0, 1)"),
        metavar="X",
        help="allowed error of a number, as a fraction of the expected number (default: as trained, else 0)",
    )
    parser.add_argument(
        "--seed", type=SEED, default=0, metavar="N", help="random seed of samples and perturbations (default: 0)"
    )
    add_answer_options(parser)
    add_engine_options(parser)
    return parser
