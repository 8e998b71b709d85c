"""`cppo data`: `check` summarizes data and names every unusable row; `rate` is in `data_rate`."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from cppo.cli.console import quiet_libraries
from cppo.cli.data_rate import add_rate_options, rate_data
from cppo.cli.parser import COUNT, Parser, add_pixel_bounds, columns_option, number_in
from cppo.data import BadRows, DataSummary, PixelBounds, RecordSource, check_columns, load_records, summarize
from cppo.errors import UserError, tell
from cppo.progress import Progress
from cppo.runs.checks import check_data, check_model

SHOWN_PLACES = 5


def run(argv: Sequence[str]) -> None:
    """Check or rate data. Raises UserError."""
    arguments = _parser().parse_all(argv)
    arguments.command(arguments)


def _check(arguments: Namespace) -> None:
    """Print the table and the bad rows; exit status 1 for too many, or a misspelt column. Raises UserError."""
    check_data(arguments.specs)
    check_columns(arguments.columns)
    if arguments.against:
        check_data(arguments.against)
    pixels = PixelBounds.of(vars(arguments))
    if arguments.max_prompt_tokens is not None and not arguments.model:
        raise UserError("--max_prompt_tokens needs --model: tokens are counted with its processor")
    if arguments.model:
        check_model(arguments.model)
        quiet_libraries()
    reading: dict[str, Any] = {"columns": arguments.columns, "max_bad_fraction": 1.0, "with_facts": True}
    try:
        source = load_records(arguments.specs, split=arguments.split, **reading)
    except BadRows as error:
        _print_bad(error.rows)
        print(f"rows        {error.total:,}, none of them usable")
        if not error.rows:
            raise
        raise SystemExit(1) from error

    with Progress(total=len(source), desc="summarize", unit="rows") as bar:
        summary = summarize(source, bar.update)
    other = None
    if arguments.against:
        other = summarize(load_records(arguments.against, split="test", **reading))
    # Repeated images are found in the files' own pixels; long rows are counted with the pixels that the model sees.
    source.pixels, source.prompt_suffix = pixels, arguments.prompt_suffix
    readable, tokens, marked = _read_by_model(source, arguments) if arguments.model else (source, [], [])
    _print_bad(source.skipped)
    for line in marked:
        print(f"bad row  {line}")
    if arguments.max_prompt_tokens is not None:
        from cppo.evaluation import long_rows

        too_long = long_rows(readable, tokens, arguments.max_prompt_tokens)
        for row in too_long:
            print(f"long row  {row.place}: {row.tokens} prompt tokens")
    bad, total = len(source.skipped) + len(marked), len(source) + len(source.skipped)
    print(f"rows        {total:,}, {len(readable):,} usable, {bad:,} bad ({100 * bad / total:.1f} %)")
    print("\n".join([*(f"unread      {line}" for line in source.unread), *_lines(summary, pixels)]))
    if summary.choice_rows:
        wrong = f"{len(summary.no_choice):,}{_places(source, summary.no_choice)}"
        print(f"choices     {summary.choice_rows:,} rows have them; the answer is none of them in {wrong}")
    if summary.wrapped:
        what = "answers are not plain (tags, ####, a list or several lines)"
        print(f"wrapped     {len(summary.wrapped):,} {what}{_places(source, summary.wrapped)}")
    if tokens:
        print(f"prompts     {_spread(sorted(tokens))} tokens with images (model {arguments.model})")
    if arguments.max_prompt_tokens is not None:
        print(f"too long    {len(too_long):,} rows of more than {arguments.max_prompt_tokens:,} prompt tokens")
    if other is not None:
        shared = len(summary.images & other.images)
        print(f"overlap     {shared:,} of {len(summary.images):,} distinct images are also in {arguments.against}")
    if bad > arguments.max_bad_fraction * total:
        tell(f"more bad rows than max_bad_fraction = {arguments.max_bad_fraction:g} allows")
        raise SystemExit(1)
    if source.unread:
        tell("a misspelt column is not read: rename it, or map it with --columns ({images: null} if none is meant)")
        raise SystemExit(1)


def _print_bad(skipped: Sequence[tuple[int, str]]) -> None:
    for number, reason in skipped:
        print(f"bad row {number}  {reason}")


def _lines(summary: DataSummary, pixels: PixelBounds) -> list[str]:
    images = ", ".join(f"{count:,} rows with {number}" for number, count in summary.images_a_row.items())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.answer_kinds.items())
    lines = [f"images      {images}"]
    if summary.sizes:
        lines.append(f"sizes       {_sizes(summary.sizes)}")
    if summary.sizes and pixels != PixelBounds():
        lines.append(f"scaled      {_sizes([pixels.size(*size) for size in summary.sizes])}")
    return [
        *lines,
        f"answers     {kinds}",
        f"repeated    {summary.repeated_rows:,} rows have the question and images of an earlier one; "
        f"{summary.shared_images:,} images occur in several rows",
    ]


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """The smallest, largest and middle of (width, height) pairs, by their pixels."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    small, middle, large = ("{} x {}".format(*ordered[place]) for place in (0, len(ordered) // 2, -1))
    return f"{small} to {large} pixels, median {middle}"


def _places(source: RecordSource, indices: Sequence[int]) -> str:
    """The first of some rows, after a colon; empty if there are none."""
    shown = ", ".join(source.place(index) for index in indices[:SHOWN_PLACES])
    return f": {shown}{', ...' if len(indices) > SHOWN_PLACES else ''}" if indices else ""


def _read_by_model(source: RecordSource, arguments: Namespace) -> tuple[RecordSource, list[int], list[str]]:
    """The rows that the model can read, their prompt tokens, and lines that name the rows with its own marks."""
    from cppo.evaluation import check_marks, load_processor, marked_rows, prompt_lengths

    processor = load_processor(arguments.model)
    check_marks(processor, [], system_prompt=arguments.system_prompt, prompt_suffix=arguments.prompt_suffix)
    marked = dict(marked_rows(source, processor))
    lines = [
        f"{source.place(index)}: its text holds {mark}, a mark of the model's own" for index, mark in marked.items()
    ]
    readable = source.keep([index for index in range(len(source)) if index not in marked])
    with Progress(total=len(readable), desc="tokens", unit="rows") as bar:
        lengths = prompt_lengths(processor, readable, system_prompt=arguments.system_prompt, progress=bar.update)
    return readable, lengths, lines


def _spread(values: list[int]) -> str:
    return f"{values[0]:,} to {values[-1]:,}, median {values[len(values) // 2]:,}"


def _parser() -> Parser:
    parser = Parser(prog="cppo data", description="Checks or rates data before a run.")
    commands = parser.add_subparsers(metavar="check | rate", required=True, parser_class=Parser)
    rate = commands.add_parser("rate", help="rate each row by a model's sampled answers, once, for `cppo train`")
    add_rate_options(rate)
    rate.set_defaults(command=rate_data)
    check = commands.add_parser("check", help="summarize the data, and name every unusable row")
    check.set_defaults(command=_check)
    check.add_argument("specs", nargs="+", metavar="SPEC", help="tasks:NAME, a file, a folder or hub:ORG/NAME[:SPLIT]")
    check.add_argument(
        "--columns", type=columns_option, metavar="{..}", help="your column names {prompt: question, ...}, or a layout"
    )
    check.add_argument(
        "--split", default="train", choices=("train", "test"), help="split of SPECs that name none (default: train)"
    )
    check.add_argument(
        "--max_bad_fraction",
        type=number_in("[0, 1]"),
        default=0.01,
        metavar="X",
        help="allowed fraction of bad rows; more: exit status 1",
    )
    check.add_argument("--against", metavar="SPEC", help="held-out data: count the images in both")
    check.add_argument("--model", metavar="DIR|NAME", help="count prompt tokens with this model's processor")
    check.add_argument(
        "--system_prompt", metavar="TEXT", help="with --model, count this system message in prompts without one"
    )
    check.add_argument(
        "--prompt_suffix", metavar="TEXT", help="with --model, count this text at the end of every prompt"
    )
    add_pixel_bounds(check)
    check.add_argument(
        "--max_prompt_tokens", type=COUNT, metavar="N", help="name the rows that are longer (needs --model)"
    )
    return parser
