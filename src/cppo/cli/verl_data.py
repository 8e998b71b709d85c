"""`cppo verl-data`: write data as the Parquet file that verl trains from."""

from collections.abc import Sequence
from pathlib import Path

from cppo.cli.parser import COUNT, SEED, Parser, add_pixel_bounds, check_output_file, columns_option, number_in
from cppo.data import PixelBounds, check_columns, load_records
from cppo.errors import UserError
from cppo.progress import Progress
from cppo.runs.checks import check_data


def run(argv: Sequence[str]) -> None:
    """Write the file. Raises UserError for a user's mistake."""
    arguments = _parser().parse_all(argv)
    check_output_file("--out", arguments.out)
    check_data(arguments.specs)
    check_columns(arguments.columns)
    if Path(arguments.out).resolve() in [Path(spec).resolve() for spec in arguments.specs]:
        raise UserError(f"--out: {arguments.out} is the data itself and would be replaced: give another file")
    source = load_records(
        arguments.specs,
        split=arguments.split,
        limit=arguments.limit,
        columns=arguments.columns,
        max_bad_fraction=arguments.max_bad_fraction,
        pixels=PixelBounds.of(vars(arguments)),
        prompt_suffix=arguments.prompt_suffix,
        images_per_row=arguments.images_per_row,
    )

    from cppo.verl.data import write_parquet

    name = arguments.name or Path(arguments.out).stem
    with Progress(total=len(source), desc="verl-data", unit="rows") as bar:
        write_parquet(source, arguments.out, name, system_prompt=arguments.system_prompt, progress=bar.update)
    left_out = f", {len(source.other_images):,} with another number of images" if source.other_images else ""
    print(f"rows        {len(source):,}; left out: {len(source.skipped):,} bad ones{left_out}")
    print(f"file        {arguments.out}")


def _parser() -> Parser:
    parser = Parser(prog="cppo verl-data", description="Writes data as a Parquet file in verl's layout.")
    parser.add_argument("specs", nargs="+", metavar="SPEC", help="tasks:NAME, a file, a folder or hub:ORG/NAME[:SPLIT]")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write, in Parquet")
    parser.add_argument(
        "--columns", type=columns_option, metavar="{..}", help="your column names {prompt: question, ...}, or a layout"
    )
    parser.add_argument(
        "--max_bad_fraction",
        type=number_in("[0, 1]"),
        default=0.01,
        metavar="X",
        help="allowed fraction of bad rows, which are skipped",
    )
    parser.add_argument(
        "--split", default="train", choices=("train", "test"), help="split of SPECs that name none (default: train)"
    )
    parser.add_argument("--limit", type=COUNT, metavar="N", help="write only the first N good rows")
    parser.add_argument("--images_per_row", type=SEED, metavar="N", help="leave out rows with another number of images")
    parser.add_argument("--name", metavar="NAME", help="the data's name in verl's validation (default: the file's)")
    parser.add_argument("--system_prompt", metavar="TEXT", help="added before every prompt without one")
    parser.add_argument("--prompt_suffix", metavar="TEXT", help="added to every prompt, after a space")
    add_pixel_bounds(parser)
    return parser
