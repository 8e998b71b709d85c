"""`cppo report`: write the report of a run directory, or of several side by side."""

from collections.abc import Sequence
from pathlib import Path

from cppo.cli.parser import Parser, check_output_file
from cppo.errors import UserError


def run(argv: Sequence[str]) -> None:
    """Write the page. Raises UserError for a user's mistake."""
    arguments = _parser().parse_all(argv)
    if Path(arguments.out).suffix.lower() != ".html":
        raise UserError(f"--out: {arguments.out}: write a .html file")
    check_output_file("--out", arguments.out)

    from cppo.reports import read_run, render_report, render_runs
    from cppo.reports.charts import STYLES

    if len(arguments.runs) > STYLES:
        raise UserError(f"{len(arguments.runs)} runs: one page shows at most {STYLES}")
    for path in arguments.runs:
        if cell := next(Path(path).glob("cells/*/*/*/config.yaml"), None):
            raise UserError(
                f"{path} is the folder of a study: `cppo compare --config STUDY --report_only` writes its "
                f"report; for one run give its folder, such as {cell.parent}"
            )
    runs = [read_run(path) for path in arguments.runs]
    page = render_report(runs[0]) if len(runs) == 1 else render_runs(runs)
    Path(arguments.out).write_text(page, encoding="utf-8")
    print(f"report     {arguments.out}")


def _parser() -> Parser:
    parser = Parser(
        prog="cppo report",
        description="Writes the report of a run directory in its present state; for several runs, final numbers, "
        "differing options and curves side by side.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, finished or not")
    parser.add_argument("--out", required=True, metavar="FILE", help="the page, a .html file")
    return parser
