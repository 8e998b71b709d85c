"""`cppo views`: show I+ and I-, and how they change a model's answers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cppo.cli.console import percent, quiet_libraries
from cppo.cli.parser import COUNT, SEED, Parser, add_data_options, check_output_file
from cppo.cli.trained import (
    add_answer_options,
    answer_settings,
    answering_model,
    asked_rows,
    recipe_views,
    trained_recipe,
)
from cppo.data import PixelBounds, Record, with_suffix
from cppo.errors import UserError, tell
from cppo.options.views import pictured
from cppo.progress import Progress
from cppo.runs.checks import check_model
from cppo.views import EVERY_PRESERVING, EVERY_REMOVING, check_families, load_rgb, stable_sample_id

if TYPE_CHECKING:
    from cppo.evaluation import ItemResult

DEFAULT_LIMIT = 20
DEFAULT_PROMPT = "What does the image show?"


def run(argv: Sequence[str]) -> None:
    """Write a grid or a page of views. Raises UserError for a user's mistake."""
    arguments = _parser().parse_all(argv)
    if (arguments.image is None) == (arguments.data is None):
        raise UserError("give either --image FILE or --data SPEC")
    suffix = Path(arguments.out).suffix.lower()
    if suffix not in (".png", ".html"):
        raise UserError(f"--out: {arguments.out}: write a .png (of --image) or a .html page")
    if suffix == ".png" and arguments.data is not None:
        raise UserError(f"--out: {arguments.out}: several items make a page: write a .html file")
    needs_model = ("prompt", "answer", "max_new_tokens", "system_prompt", "prompt_suffix", "device", "dtype")
    given = [name for name in needs_model if getattr(arguments, name) is not None]
    if arguments.model is None and given:
        raise UserError(f"--{given[0]} needs --model: without a model nothing answers")
    if arguments.data is not None and (arguments.prompt is not None or arguments.answer is not None):
        raise UserError("--prompt and --answer go with --image; the rows of --data have their own")
    check_output_file("--out", arguments.out)
    if arguments.model is not None:
        check_model(arguments.model)
    trained = trained_recipe(arguments.model) if arguments.model else {}
    settings = answer_settings(arguments, trained)
    config, options, sampler = recipe_views(arguments)
    families: Sequence[str] = _families(options)
    if arguments.families is not None:
        families = check_families("--families", arguments.families, (*EVERY_PRESERVING, *EVERY_REMOVING))
    records = _records(arguments, settings)
    answer = _answers(arguments, settings, trained) if arguments.model else None

    from cppo.reports.views import (
        clean_accuracy,
        draw_grid,
        perturbed_records,
        render_views,
        shown_item,
        summarize_families,
        view_remarks,
    )

    items = []
    for record in Progress(records, total=len(records), desc="views", unit="items"):
        copies, views = perturbed_records(record, sampler, arguments.draws, families)
        items.append(shown_item(record, views, answer(copies) if answer else None))
    if suffix == ".png":
        draw_grid(items[0]).save(arguments.out)
    else:
        title = arguments.image or " ".join(arguments.data)
        strengths = "the published ones" if config is None else f"recipe {config}"
        page = render_views(items, title=title, strengths=f"Strengths: {strengths}.", seed=arguments.seed)
        Path(arguments.out).write_text(page, encoding="utf-8")
    summaries = summarize_families(items, arguments.seed)
    if (clean := clean_accuracy(items)) is not None:
        print(f"{'image':<18}{'':36}accuracy {percent(clean)}")
    for row in summaries:
        change = ""
        if row.accuracy is not None and row.change is not None:
            change = f"   accuracy {percent(row.accuracy)} ({100 * row.change.mean:+.1f} points)"
        print(f"{row.family:<18}{percent(row.unchanged)} answered as with the image{change}")
    for remark in view_remarks(summaries):
        tell(remark)
    print(f"views      {arguments.out}")


def _answers(
    arguments: Any, settings: Mapping[str, Any], trained: Mapping[str, Any]
) -> "Callable[[Sequence[Record]], Sequence[ItemResult]]":
    """The loaded model of --model, which answers records."""
    quiet_libraries()

    from cppo.evaluation import evaluate

    model, processor = answering_model(arguments, settings, None, prompt=arguments.prompt)
    asked: dict[str, Any] = {
        "max_new_tokens": settings["max_new_tokens"],
        "system_prompt": settings["system_prompt"],
        "tolerance": trained.get("tolerance", 0.0),
    }
    return lambda records: evaluate(model, processor, records, **asked).items


def _records(arguments: Any, settings: Mapping[str, Any]) -> list[Record]:
    if arguments.data is None:
        pixels = PixelBounds.of(settings)
        try:
            with Image.open(arguments.image) as file:
                image = pixels.apply(load_rgb(file))
        except (OSError, UserError, Image.DecompressionBombError) as error:
            reason = (
                "there is no such file" if isinstance(error, FileNotFoundError) else "it cannot be read as an image"
            )
            raise UserError(f"--image: {arguments.image}: {reason}") from error
        prompt = arguments.prompt or DEFAULT_PROMPT
        shown = with_suffix(prompt, settings["prompt_suffix"])
        return [Record(stable_sample_id(prompt, [image]), shown, (image,), arguments.answer or "")]
    source = asked_rows(arguments, settings)
    with_images = [record for record in source if record.images]
    if not with_images:
        raise UserError(f"{source.name}: none of the rows has an image")
    return with_images


def _families(options: Mapping[str, Any]) -> list[str]:
    """A recipe's families: for rollouts, then I+ and I-, unless its method scores no views at all."""
    of_rollouts = options["rollout_views"]
    if of_rollouts and options["perception_sink"] == "none":
        return of_rollouts
    return list(dict.fromkeys([*of_rollouts, *options["preserving_views"], *pictured(options["removing_views"])]))


def _parser() -> Parser:
    parser = Parser(
        prog="cppo views", description="Shows the images' views, I+ and I-: the published families, or others."
    )
    parser.add_argument("--image", metavar="FILE", help="an image file")
    add_data_options(parser, required=False, note="rows instead of one image: ")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .png grid (of --image), or a .html page")
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="take families and strengths from this recipe (default: a run directory's own)",
    )
    parser.add_argument(
        "--families",
        nargs="+",
        metavar="NAME",
        help=f"these families instead of the recipe's: {', '.join((*EVERY_PRESERVING, *EVERY_REMOVING))}, or "
        "file.py:function",
    )
    parser.add_argument("--draws", type=COUNT, default=4, metavar="N", help="draws of each family (default: 4)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="random seed of the draws (default: 0)")
    parser.add_argument("--model", metavar="DIR|NAME", help="let this model answer under every view, greedily")
    parser.add_argument("--prompt", metavar="TEXT", help=f"the question to --image (default: {DEFAULT_PROMPT!r})")
    parser.add_argument("--answer", metavar="TEXT", help="the right answer to --prompt")
    parser.add_argument(
        "--limit", type=COUNT, default=DEFAULT_LIMIT, metavar="N", help=f"rows of --data (default: {DEFAULT_LIMIT})"
    )
    add_answer_options(parser)
    return parser
