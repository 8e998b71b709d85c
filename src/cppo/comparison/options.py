"""What a study file may say."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from cppo.fields import option


@dataclass(frozen=True)
class StudyOptions:
    """The options of `cppo compare`, as they stand in a study file."""

    methods: list[str | dict] = field(
        metadata={
            "help": "What is compared: names of methods, or variants {label: NAME, method: NAME, any_option: VALUE}."
        }
    )
    recipe: str = option("micro", "The recipe that every cell starts from: a packaged name or a file.")
    options: dict[str, Any] = option({}, "Options of `cppo train` for every cell, over the recipe's.")
    tasks: dict[str, Any] = option(
        {},
        "Tasks by name, each a mapping of options: data, eval_data and what else differs, over `options`. `{seed}` in "
        "`data` becomes the cell's seed. Without tasks the recipe's own data is the only one.",
    )
    control: str | None = option(None, "Label of the method that all others are compared with (default: the first).")
    seeds: Annotated[int | list[int], "[0, inf)"] = option(5, "How many seeds, from 0 on, or a list of them.")
    seeds_of: dict[str, Any] = option({}, "Other seeds for some labels: {label: N or a list}.")
    evaluate_every: Annotated[int | None, "[1, inf)"] = option(
        None, "Steps between evaluations; step 0 and the last are always there."
    )
    eval_items: Annotated[int, "[1, inf)"] = option(500, "Items of eval_data that each evaluation answers.")
    conditions: list[str] = option(
        ["clean", "blank", "trained_preserving", "held_out_preserving", "held_out_removing"],
        "What the images of an evaluation look like: clean, blank (grey), trained_preserving, trained_removing, "
        "held_out_preserving, held_out_removing, or a single view family.",
    )
    detector_items: Annotated[int, "[0, inf)"] = option(50, "Items that dependency scores are judged on; 0 for none.")
    output_dir: str | None = option(None, "Where cells and results go (default: runs/NAME of the study).")
    cells_from: list[str] = option(
        [],
        "Output folders or archives of other studies: their finished cells with equal options are taken over. Where "
        "archives hold all cells, nothing is run, and they are reported as they are.",
    )
    workers: Annotated[int | None, "[1, inf)"] = option(
        None, "Cells that run at once (default: one per GPU; without a GPU cores / threads)."
    )
    threads: Annotated[int, "[1, inf)"] = option(1, "Threads of each cell.")
    keep_models: bool = option(False, "Keep each cell's trained model.")
    timing_steps: Annotated[int, "[0, inf)"] = option(
        0,
        "After all cells: train each method so many steps alone on the machine, in turn, for the time and memory of a "
        "step (0: take them from the cells, which share the machine).",
    )
    timing_repeats: Annotated[int, "[1, inf)"] = option(3, "Rounds of that.")
