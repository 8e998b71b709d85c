"""Study files: what they mean, and what is refused before anything starts."""

import subprocess
import sys
from dataclasses import asdict

import pytest

from cppo.comparison.jobs import cell_job, study_jobs
from cppo.comparison.study import load_study, study_names
from cppo.errors import UserError


def test_the_grid_goes_seed_by_seed(write_study):
    study = load_study(write_study(seeds=[3, 5], seeds_of={"cppo": 3}, evaluate_every=None))
    grid = [(cell.label, cell.seed) for cell in study.cells]
    assert grid == [("grpo", 3), ("cppo", 0), ("grpo", 5), ("cppo", 1), ("cppo", 2)]
    for cell in study.cells:
        assert cell.recipe.config["method"] == cell.label
        assert cell.recipe.config["seed"] == cell.seed
        assert cell.recipe.options.data == f"tasks:digits?n=8&seed={cell.seed}"
        assert cell.recipe.options.final_eval_samples == 0
    assert study.control == "grpo"
    assert study.evaluation_steps(study.cells[0].recipe) == [2]


@pytest.mark.parametrize(("every", "last", "steps"), [(25, 100, [25, 50, 75, 100]), (30, 100, [30, 60, 90, 100])])
def test_evaluations_end_with_the_last_step(write_study, every, last, steps):
    study = load_study(write_study(evaluate_every=every, options={"max_steps": last}))
    assert study.evaluation_steps(study.cells[0].recipe) == steps


def test_variants_tasks_and_regimes(write_study):
    task = {
        "data": ["tasks:shapes?n=8", "tasks:chart?n=8&seed={seed}"],
        "eval_data": "tasks:shapes?n=4",
        "max_steps": 7,
    }
    variant = {"label": "cppo-kl", "method": "cppo", "perception_score": "kl"}
    study = load_study(write_study(methods=["grpo", variant], control="cppo-kl", tasks={"both": task}, seeds=1))
    recipe = study.cells[1].recipe
    assert recipe.config["perception_score"] == "kl"
    assert recipe.config["max_steps"] == 7
    assert recipe.options.data == ["tasks:shapes?n=8", "tasks:chart?n=8&seed=0"]
    folders = [str(job.folder.relative_to(study.output_dir)) for job in study_jobs(study)]
    assert folders == ["start/both", "cells/both/grpo/seed-0", "cells/both/cppo-kl/seed-0"]


def test_methods_of_a_task_share_the_start_and_its_evaluation(study):
    jobs = [cell_job(study, cell) for cell in study.cells]
    assert len({str(job.identity["evaluation"]) for job in jobs}) == 1
    assert len({job.identity["start_weights"] for job in jobs}) == 1
    assert len({str(sorted(job.identity.items(), key=str)) for job in jobs}) == len(jobs)


def test_other_ratings_make_another_cell(write_study, tmp_path):
    ratings = tmp_path / "ratings.jsonl"
    file = write_study(methods=["grpo"], seeds=1, options={"data_ratings": str(ratings), "data_stages": 2})
    identities = []
    for content in ("1", "2"):
        ratings.write_text(content)
        study = load_study(file)
        identities.append(cell_job(study, study.cells[0]).identity)
    assert identities[0] != identities[1]


REFUSED = [
    ({"method": ["grpo"]}, "unknown option `method`; did you mean `methods`?"),
    ({"methods": []}, "no `methods`"),
    ({"methods": ["grpo", {"method": "cppo", 1: 2}]}, "1 is not an option name"),
    ({"options": {1: 2}}, "options: 1 is not an option name"),
    ({"tasks": {1: {"data": "tasks:digits", "eval_data": "tasks:digits"}}}, "1 names a folder"),
    ({"methods": ["grpo", "grop"]}, "grop"),
    ({"methods": ["grpo", "grpo"]}, "grpo is there twice"),
    ({"methods": ["grpo", {"label": "x", "mehtod": "cppo"}]}, "give a method's name"),
    ({"methods": ["grpo", {"label": "x", "mehtod": "cppo"}]}, "it has label, mehtod"),
    ({"methods": ["grpo", {"method": "cppo", "perception_wieght": 1}]}, "did you mean `perception_weight`?"),
    ({"methods": ["grpo", {"method": "cppo", "perception_weight": -1}]}, "cppo: perception_weight: -1 is outside"),
    ({"methods": ["grpo", {"method": "cppo", "num_generations": 4}]}, "`num_generations` cannot be set here"),
    ({"methods": ["grpo", {"method": "cppo", "seed": 4}]}, "`seed` cannot be set here"),
    ({"methods": ["grpo", {"method": "cppo", "label": "../up"}]}, "names a folder"),
    ({"methods": [{"method": "cppo", "perception_gate": "correct"}]}, "digits, cppo: perception_gate"),
    ({"control": "dapo"}, "no method labelled 'dapo'"),
    ({"seeds_of": {"dapo": 3}}, "no method labelled 'dapo'"),
    ({"seeds": 0}, "give a number of seeds"),
    ({"seeds": [1, 1]}, "twice"),
    ({"seeds_of": {"cppo": "many"}}, "seeds of cppo: 'many'"),
    ({"tasks": {"digits": "tasks:digits"}}, "tasks: digits: expected a mapping"),
    ({"tasks": {"digits": {"data": "tasks:digits"}}}, "no `eval_data`"),
    (
        {"tasks": {"digits": {"data": "tasks:digits", "eval_data": "tasks:digits?seed={seed}"}}},
        "only `data` may have `{seed}`",
    ),
    ({"tasks": {"digits": {"data": "tasks:nothing", "eval_data": "tasks:digits"}}}, "unknown task 'nothing'"),
    ({"tasks": {"a b": {"data": "tasks:digits", "eval_data": "tasks:digits"}}}, "names a folder"),
    ({"options": {"max_steps": -1}}, "max_steps: give a number of steps"),
    ({"options": {"output_dir": "x"}}, "`output_dir` cannot be set here"),
    ({"conditions": ["clean", "upside_down"]}, "upside_down"),
    ({"eval_items": 0}, "eval_items: 0 is outside"),
    ({"recipe": "nothing"}, "recipe 'nothing'"),
]


@pytest.mark.parametrize(("entries", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused_in_one_line_before_anything_starts(write_study, stub_cells, refused, entries, message):
    assert message in refused("compare", "--config", write_study(**entries))
    assert not stub_cells.parent.exists()


OF_THE_STUDY = ("seed", "output_dir", "final_eval_samples", "probe_steps", "eval_strategy", "save_strategy")
OF_THE_STUDY += ("resume_from_checkpoint", "overwrite", "dry_run")
OF_ALL_METHODS = ("model", "data", "eval_data", "columns", "min_pixels", "max_pixels", "max_prompt_tokens")
OF_ALL_METHODS += ("min_side", "images_per_row", "prompt_suffix")
OF_ALL_METHODS += ("system_prompt", "max_steps", "num_train_epochs", "num_generations", "per_device_train_batch_size")
OF_ALL_METHODS += ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size", "num_iterations")
OF_ALL_METHODS += ("max_completion_length", "shuffle_dataset", "data_seed")


@pytest.mark.parametrize("name", OF_THE_STUDY + OF_ALL_METHODS)
def test_what_no_method_may_change(write_study, name):
    with pytest.raises(UserError, match=f"methods: cppo: `{name}` cannot be set here"):
        load_study(write_study(methods=["grpo", {"method": "cppo", name: 1}]))
    if name in OF_THE_STUDY:
        with pytest.raises(UserError, match=f"options: `{name}` cannot be set here"):
            load_study(write_study(options={name: 1}))


def test_what_every_cell_has(study):
    fixed = {"final_eval_samples": 0, "probe_steps": 0, "eval_strategy": "no", "save_strategy": "no"}
    fixed |= {"resume_from_checkpoint": None, "overwrite": False, "dry_run": False}
    for cell in study.cells:
        given = {**asdict(cell.recipe.options), **cell.recipe.config}
        assert {name: given[name] for name in fixed} == fixed


def test_what_an_evaluation_depends_on(write_study):
    task = {"eval_data": "tasks:digits?n=6", "columns": {"prompt": "question"}, "min_pixels": 64, "max_pixels": 4096}
    task |= {"system_prompt": "Look.", "prompt_suffix": "Think.", "min_side": 28}
    task |= {"rewards": ["accuracy"], "max_completion_length": 5}
    task |= {"view_rotation_degrees": 3.0, "preserving_views": ["rotation"], "removing_views": ["crop"]}
    own = {"eval_items": 4, "conditions": ["clean"], "detector_items": 2}
    study = load_study(write_study(tasks={"digits": {"data": "tasks:digits", "perception_weight": 0.5, **task}}, **own))
    assert study.evaluations == {"digits": {**task, **own}}


def test_no_torch_before_the_check(write_study):
    program = "import sys; from cppo.cli.main import main; status = main(sys.argv[1:]); "
    program += "sys.exit(status + ('torch' in sys.modules))"
    file = write_study(methods=["grpo", {"method": "cppo", "perception_gate": "correct"}])
    run = subprocess.run([sys.executable, "-c", program, "compare", "--config", file], capture_output=True, text=True)
    assert run.returncode == 2, run.stderr


def test_packaged_studies_are_valid():
    studies = ("confirm", "fair", "family", "negative", "parts", "prior", "search", "settings", "small", "unlimited")
    assert study_names() == ["compare-micro", *(f"evidence-{name}" for name in studies), "methods-micro"]
    for name in study_names():
        assert load_study(name).cells


def test_options_on_the_command_line_win(write_study):
    assert load_study(write_study(), {"seeds": 1, "eval_items": 3}).options.eval_items == 3
