"""The options of a study file."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from cppo.fields import option


@dataclass(frozen=True)
class StudyOptions:
    """The options of `cppo compare`, as in a study file."""

    methods: list[str | dict] = field(
        metadata={
            "help": "The methods to compare: names of methods, or variants {label: NAME, method: NAME, any_option: "
            "VALUE}."
        }
    )
    recipe: str = option("micro", "The recipe that every cell starts from: a packaged name or a file.")
    options: dict[str, Any] = option({}, "Options of `cppo train` for every cell; they replace the recipe's.")
    tasks: dict[str, Any] = option(
        {},
        "Tasks by name, each a mapping of options: data, eval_data and other differences from `options`. "
        "`{seed}` in `data` becomes the cell's seed. Without tasks the recipe's own data is the only task.",
    )
    control: str | None = option(None, "Label of the method that all others are compared with (default: the first).")
    seeds: Annotated[int | list[int], "[0, inf)"] = option(5, "Number of seeds, counted from 0, or a list of them.")
    seeds_of: dict[str, Any] = option({}, "Other seeds for some labels: {label: N or a list}.")
    evaluate_every: Annotated[int | None, "[1, inf)"] = option(
        None, "Steps between evaluations; step 0 and the last step are always evaluated."
    )
    eval_items: Annotated[int, "[1, inf)"] = option(500, "Items of eval_data that each evaluation answers.")
    conditions: list[str] = option(
        ["clean", "blank", "trained_preserving", "held_out_preserving", "held_out_removing"],
        "How the images of an evaluation are shown: clean, blank (grey), trained_preserving, "
        "trained_removing, held_out_preserving, held_out_removing, or a single view family.",
    )
    detector_items: Annotated[int, "[0, inf)"] = option(50, "Items that dependency scores are judged on; 0 for none.")
    output_dir: str | None = option(None, "Folder of cells and results (default: runs/NAME of the study).")
    cells_from: list[str] = option(
        [],
        "Output folders or archives of other studies: their finished cells with equal options are reused. If "
        "archives hold all cells, nothing runs, and the cells are reported as they are.",
    )
    workers: Annotated[int | None, "[1, inf)"] = option(
        None, "Cells that run at once (default: one per GPU; without a GPU cores / threads)."
    )
    threads: Annotated[int, "[1, inf)"] = option(1, "Threads of each cell.")
    keep_models: bool = option(False, "Keep each cell's trained model.")
    timing_steps: Annotated[int, "[0, inf)"] = option(
        0,
        "After all cells: train each method this many steps alone on the machine, in turn, to measure time "
        "and memory of a step (0: use the cells' measurements, which share the machine).",
    )
    timing_repeats: Annotated[int, "[1, inf)"] = option(3, "Rounds of these timing runs.")
