"""`cppo eval --suite`: the benchmarks of the paper and others, their table, and their mean."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.cli.answering import Answering
from cppo.cli.console import percent
from cppo.cli.eval_report import category_rows
from cppo.data import PixelBounds
from cppo.errors import UserError
from cppo.evaluation.benchmarks import (
    BENCHMARKS,
    NEW_TOKENS,
    Asked,
    Benchmark,
    Figures,
    Suite,
    choose_suite,
    mean_of,
    read_benchmark,
)
from cppo.files import content_fingerprint

if TYPE_CHECKING:
    from cppo.evaluation import EvalResult

NOT_HERE: dict[str, Any] = {"data": None, "columns": None, "card": None, "blank": False, "by": []}
"""Options of `cppo eval` that a suite sets or does not use, with their defaults."""


def asked_suite(arguments: Any) -> Suite:
    """The suite of a command's options; its samples, temperature and length fill options that are not given.

    Makes the folder of its responses. Raises UserError for an unknown name, and for options that do not go with it.
    """
    suite = choose_suite(arguments.suite)
    for name, default in NOT_HERE.items():
        if getattr(arguments, name) != default:
            raise UserError(f"--{name} does not go with --suite, which has its own questions")
    if arguments.responses is not None:
        try:
            Path(arguments.responses).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--responses: for a suite it is a folder; cannot make {arguments.responses}: {error.strerror}"
            ) from error
    arguments.samples = arguments.samples or suite.samples
    arguments.temperature = 1.0 if arguments.temperature is None else arguments.temperature
    arguments.max_new_tokens = arguments.max_new_tokens or NEW_TOKENS
    return replace(suite, limit=arguments.limit or suite.limit)


def run_suite(
    suite: Suite, arguments: Any, settings: Mapping[str, Any], ks: Sequence[int], identity: Mapping[str, Any]
) -> None:
    """Answer every benchmark of a suite, print the table and write the results.

    All benchmarks are read before the model is loaded.

    Args:
        settings: arguments of `evaluate` for the model.
        ks: the k of pass@k.
        identity: what must be equal, beside benchmark and data, for responses in one file.
    """
    from cppo.evaluation import CLEAN

    asked = [_read(benchmark, suite.limit, arguments, settings) for benchmark in suite.benchmarks]
    answering = Answering(arguments)
    results: list[EvalResult] = []
    for one in asked:
        name = one.benchmark.name
        file = None if arguments.responses is None else str(Path(arguments.responses) / f"{name}.jsonl")
        data = one.benchmark.hub
        if arguments.benchmark_folder is not None:
            data = content_fingerprint(Path(arguments.benchmark_folder) / data)
        own = {**identity, **answering.identity, "benchmark": name, "data": data, "limit": suite.limit}
        results.append(answering.answer(one.source, [CLEAN], settings, file, own, right=one.right)["clean"])
    if not answering.processes.is_first:
        return
    report = _report(list(zip(asked, results, strict=True)), arguments, settings, ks)
    for line in suite_lines(report):
        print(line)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def benchmark_lines() -> list[str]:
    """The output of `--list_benchmarks`: a line for each benchmark, with the sources of its facts below."""
    lines = [f"{'name':<17}{'items':>6}  {'answers':<40}{'licence':<33}from"]
    for one in BENCHMARKS.values():
        splits = one.splits[0] if len(one.splits) == 1 else f"{one.splits[0]} .. {one.splits[-1]}"
        config = f", config {one.config}" if one.config else ""
        lines.append(
            f"{one.name:<17}{one.size:>6,}  {one.answers:<40}{one.licence:<33}hub:{one.hub} ({splits}{config})"
        )
        marks = [
            "in the paper's mean" if one.in_paper else "not in the paper",
            "verified" if one.verified else "unverified",
            f"a language model's part in its harness: {one.judge or 'none'}",
        ]
        lines.append(f"    {'; '.join(marks)}")
        lines += [f"    {fact:<8}{place}" for fact, place in vars(one.sources).items()]
    return lines


def suite_lines(report: Mapping[str, Any]) -> list[str]:
    """The table on the terminal: headline numbers, their mean over the paper's benchmarks, and the others."""
    benchmarks = report["benchmarks"].values()
    width = 2 + max(len(one["title"]) for one in benchmarks)
    how = f"temperature {report['temperature']:g}, top_p {report['top_p']:g}" if report["temperature"] else "greedy"
    lines = [
        f"avg@{report['samples']}, {how}, at most {report['max_new_tokens']:,} new tokens; "
        "answers are read by rule; 95 % intervals",
        "",
        f"{'benchmark':<{width}}{'items':>14}  {'figure':<16}{'':<24}a language model's part in its harness",
    ]
    for one in benchmarks:
        figure, rate = next(iter(one["figures"].items()))
        items = f"{one['n']:,}" + f" of {one['size']:,}" * (one["n"] != one["size"])
        lines.append(f"{one['title']:<{width}}{items:>14}  {figure:<16}{_rate(rate):<24}{one['judge'] or 'none'}")
    if "paper_mean" in report:
        counted, all_of_it = len(report["paper_mean"]["of"]), sum(one.in_paper for one in BENCHMARKS.values())
        name = f"mean of {counted} of the paper's {all_of_it}"
        lines.append(f"{name:<{width + 32}}{_rate(report['paper_mean'])}")
    for one in benchmarks:
        others = list(one["figures"].items())[1:]
        if others:
            lines += ["", one["title"], *(f"  {figure:<30}{_rate(rate)}" for figure, rate in others)]
    lines.append("")
    lines += [f"{one['title']}: unverified, not in the mean" for one in benchmarks if not one["verified"]]
    lines += [f"{one['title']}: {one['skipped_rows']} rows cannot be used" for one in benchmarks if one["skipped_rows"]]
    return lines[: None if lines[-1] else -1]


def _read(benchmark: Benchmark, limit: int | None, arguments: Any, settings: Mapping[str, Any]) -> Asked:
    asked = read_benchmark(
        benchmark, folder=arguments.benchmark_folder, limit=limit, max_bad_fraction=arguments.max_bad_fraction
    )
    asked.source.pixels, asked.source.prompt_suffix = PixelBounds.of(settings), settings["prompt_suffix"]
    return asked


def _report(
    answered: "Sequence[tuple[Asked, EvalResult]]", arguments: Any, settings: Mapping[str, Any], ks: Sequence[int]
) -> dict[str, Any]:
    """The results as JSON values."""
    benchmarks: dict[str, dict[str, Any]] = {}
    paper: dict[str, Figures] = {}
    for asked, found in answered:
        benchmark, result = asked.benchmark, asked.scored(found)
        figures = asked.figures(result.items)
        questions = [asked.questions[item.id] for item in result.items]
        benchmarks[benchmark.name] = {
            "title": benchmark.title,
            "hub": benchmark.hub,
            "size": benchmark.size,
            "verified": benchmark.verified,
            "judge": benchmark.judge,
            "figures": {figure: _json(rate) for figure, rate in figures.rates.items()},
            **result.to_dict(ks),
            "skipped_rows": len(asked.source.skipped),
            "by": {fact: category_rows(result, [one.facts[fact] for one in questions]) for fact in benchmark.by},
        }
        if benchmark.in_paper and benchmark.verified:
            paper[benchmark.name] = figures
    report = {"model": arguments.model, "suite": arguments.suite, **settings, "benchmarks": benchmarks}
    return {**report, "paper_mean": {**_json(mean_of(list(paper.values()))), "of": list(paper)}} if paper else report


def _json(rate: Any) -> dict[str, Any]:
    return {"mean": rate.mean, "ci95": [rate.low, rate.high]}


def _rate(rate: Mapping[str, Any]) -> str:
    return percent(rate["mean"], rate["ci95"])
