"""`cppo data rate`: a model answers each row several times; each row's accuracy and agreement become one line."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cppo.cli.answering import Answering, add_engine_options, check_engine, source_identity
from cppo.cli.console import quiet_libraries
from cppo.cli.parser import COUNT, SEED, add_data_options, check_output_file, number_in
from cppo.cli.trained import ANY_MODEL, add_answer_options, answer_settings, asked_rows, trained_recipe
from cppo.data import Rating, RecordSource
from cppo.data.ratings import RATINGS, rating_of
from cppo.errors import UserError
from cppo.line_file import LineFile
from cppo.progress import Progress
from cppo.runs.checks import check_model

if TYPE_CHECKING:
    from cppo.evaluation import Processes

OPTION = "--out"
SHOWN: tuple[tuple[str, str, Callable[[Rating], float]], ...] = (
    ("accuracy", "", lambda rating: rating.accuracy),
    ("confidence", "", lambda rating: rating.confidence),
    ("semantic entropy", " nats", lambda rating: rating.semantic_entropy),
    ("discrete semantic entropy", " nats", lambda rating: rating.discrete_semantic_entropy),
)


def rate_data(arguments: argparse.Namespace) -> None:
    """Rate the rows that the file lacks, and print how the ratings spread. Raises UserError."""
    check_output_file(OPTION, arguments.out)
    check_model(arguments.model)
    check_engine(arguments)
    trained = trained_recipe(arguments.model)
    tolerance = trained.get("tolerance", 0.0) if arguments.tolerance is None else arguments.tolerance
    sampled = {name: getattr(arguments, name) for name in ("samples", "temperature", "top_p", "seed")}
    settings = {**sampled, "tolerance": tolerance, **answer_settings(arguments, trained)}
    source = asked_rows(arguments, settings, split="train", with_facts=True)
    quiet_libraries()
    answering = Answering(arguments)
    identity = {**source_identity(arguments), **answering.identity, **settings}
    ratings = _rate(source, answering, settings, identity, arguments.out)
    if answering.processes.is_first:
        print(f"rated {len(ratings):,} rows, {arguments.samples} answers each: {arguments.out}")
        print("\n".join(_lines(ratings)))
        bands = "--data_stages, --data_accuracy_band or --data_confidence_band"
        print(f"use them with cppo train --data_ratings {arguments.out} and {bands}")


def _rate(
    source: RecordSource, answering: Answering, settings: dict[str, Any], identity: dict[str, Any], path: str
) -> list[Rating]:
    """The ratings of all records. Only the first process reads and writes the file, and shows the progress."""
    from cppo.evaluation import check_marks, rate_records

    processes: Processes = answering.processes
    file = LineFile(path, RATINGS, identity, OPTION) if processes.is_first else None
    known = processes.from_first([] if file is None else _known(file, source, path))
    if len(known) == len(source):
        return known
    model, processor = answering.model
    if processor is not None:
        check_marks(processor, [source], **{name: settings[name] for name in ("system_prompt", "prompt_suffix")})
    with Progress(total=len(source), initial=len(known), desc="rate", unit="rows") as bar:

        def keep(rating: Rating) -> None:
            assert file is not None
            file.append(vars(rating))
            bar.update()

        asked = ("samples", "temperature", "top_p", "seed", "tolerance", "max_new_tokens", "system_prompt")
        return rate_records(
            model,
            processor,
            source,
            batch_size=answering.batch_size,
            known=known,
            keep=keep,
            processes=processes,
            **{name: settings[name] for name in asked},
        )


def _known(file: LineFile, source: RecordSource, path: str) -> list[Rating]:
    """The ratings of the first records, from the file. Raises UserError if one belongs to another record."""
    ratings = [rating_of(line) for line in file.lines[: len(source)]]
    for index, rating in enumerate(ratings):
        if rating.row != source.content_digest(index):
            raise UserError(
                f"{OPTION}: {path} line {index + 2} rates another row than {source.place(index)}: the data have "
                "changed; give another file"
            )
    return ratings


def _lines(ratings: Sequence[Rating]) -> list[str]:
    """The spread of each measure over the rows: smallest, quartiles, largest."""
    lines = []
    for name, unit, measure in SHOWN:
        values = sorted(map(measure, ratings))
        low, first, middle, third, high = (values[(len(values) - 1) * part // 4] for part in range(5))
        spread = f"{low:.3f} to {high:.3f}{unit}, quartiles {first:.3f}, {middle:.3f}, {third:.3f}"
        lines.append(f"{name:<26}{spread}, mean {sum(values) / len(values):.3f}")
    never, always = (sum(rating.accuracy == share for rating in ratings) for share in (0, 1))
    return [*lines, f"{never:,} rows are never answered right, {always:,} always"]


def add_rate_options(parser: argparse.ArgumentParser) -> None:
    """The options of `cppo data rate`."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|NAME",
        help=ANY_MODEL,
    )
    add_data_options(parser, note="rows of the split `train`: ")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the ratings, as JSON lines; a stopped rating resumes from them"
    )
    parser.add_argument(
        "--samples", type=number_in("[2, inf)", whole=True), default=8, metavar="N", help="answers a row (default: 8)"
    )
    parser.add_argument(
        "--temperature", type=number_in("(0, inf)"), default=1.0, metavar="X", help="sampling temperature (default: 1)"
    )
    parser.add_argument(
        "--top_p",
        type=number_in("(0, 1]"),
        default=1.0,
        metavar="X",
        help="nucleus probability of sampling (default: 1)",
    )
    parser.add_argument("--limit", type=COUNT, metavar="N", help="only the first N rows")
    parser.add_argument(
        "--tolerance",
        type=number_in("[0, 1)"),
        metavar="X",
        help="allowed difference of two equal numbers, as a fraction of one (default: as trained, else 0)",
    )
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="random seed of the samples (default: 0)")
    add_answer_options(parser)
    add_engine_options(parser)
