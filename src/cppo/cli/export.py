"""`cppo export`: write a run or a checkpoint as a plain model folder, with adapters merged into the model."""

from collections.abc import Sequence
from pathlib import Path

from cppo.cli.console import quiet_libraries
from cppo.cli.parser import Parser
from cppo.errors import UserError
from cppo.files import writing
from cppo.progress import Progress
from cppo.runs.checks import check_model


def run(argv: Sequence[str]) -> None:
    """Write weights as safetensors, configuration and processor. Raises UserError for a user's mistake."""
    arguments = _parser().parse_all(argv)
    check_model(arguments.model)
    out = Path(arguments.out)
    _check_free(out)
    quiet_libraries()

    from cppo.evaluation import load_model

    model, processor = load_model(arguments.model, device="cpu", dtype=arguments.dtype)
    with writing(out), Progress(desc=f"write {out}"):
        model.save_pretrained(out)
        processor.save_pretrained(out)
    print(f"weights    {model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}")
    print(f"model      {out}")


def _check_free(folder: Path) -> None:
    """Check that a folder does not exist or is empty, and can be written to. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--out: {folder} is not empty: give a folder that does not exist yet")
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder}: {error.strerror}") from error


def _parser() -> Parser:
    parser = Parser(
        prog="cppo export",
        description="Writes a plain checkpoint that AutoModelForImageTextToText.from_pretrained loads, with its "
        "processor. A LoRA adapter is merged into its model.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a run directory, one of its checkpoint-N folders, or a model"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must be missing or empty")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the merge and of the written weights (default: auto, as the model was saved)",
    )
    return parser
