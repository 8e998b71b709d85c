"""What a cell's process does: the same prompts for every method, and evaluations that training does not notice."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from cppo.comparison.cell import StepMeter, measurement_of, run_folder
from cppo.comparison.finished import RESULT
from cppo.comparison.jobs import cell_job, start_job, study_jobs
from cppo.comparison.measure import Measurement
from cppo.comparison.pool import run_jobs
from cppo.comparison.study import load_study
from cppo.data import load_records
from cppo.evaluation import EvalResult, ItemResult, evaluate, get_condition, load_model
from cppo.evaluation.detectors import detector_quality
from cppo.evaluation.inspection import InspectOptions, inspect_record
from cppo.perception import DEPENDENCY_SCORES
from cppo.views import ViewSampler, ViewStrengths

MEASURED = ("step_time", "time/", "memory/")
"""How the names of metrics begin that differ from run to run."""


def run(job):
    job.begin()
    run_folder(job.folder)
    return json.loads((job.folder / RESULT).read_text())


def metrics(job):
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, study_writer):
    """Both methods of seed 0, GRPO of seed 1, and GRPO of seed 0 with fewer evaluations: (job, result) each."""
    folder = tmp_path_factory.mktemp("cells")
    study = load_study(study_writer(folder))
    jobs = {(cell.label, cell.seed): cell_job(study, cell) for cell in study.cells}
    seldom = load_study(study_writer(folder, "seldom", evaluate_every=None, output_dir=str(folder / "seldom")))
    jobs["seldom", 0] = cell_job(seldom, seldom.cells[0])
    del jobs["cppo", 1]
    return {name: (job, run(job)) for name, job in jobs.items()}


def test_methods_see_the_same_prompts_in_the_same_order(runs):
    assert runs["grpo", 0][1]["prompts"] == runs["cppo", 0][1]["prompts"]
    assert runs["grpo", 0][1]["prompts"] != runs["grpo", 1][1]["prompts"]
    steps = [len(found["step_seconds"]) for _, found in runs.values()]
    assert steps == [2] * len(runs)


def test_evaluations_do_not_change_the_training(runs):
    assert metrics(runs["grpo", 0][0]) == metrics(runs["seldom", 0][0])
    often, seldom = (runs[name, 0][1]["evaluations"] for name in ("grpo", "seldom"))
    assert [one["step"] for one in often] == [1, 2]
    assert [one["step"] for one in seldom] == [2]
    assert often[-1] == seldom[-1]


def test_what_a_cell_writes(runs):
    job, result = runs["cppo", 0]
    assert (result["label"], result["seed"], result["task"], result["kind"]) == ("cppo", 0, "digits", "cell")
    for one in result["evaluations"]:
        assert set(one["correct"]) == {"clean", "blank"}
        assert all(len(marks) == 6 and set(marks) <= {"0", "1"} for marks in one["correct"].values())
    assert result["options"]["perception_weight"] == 0.01
    assert result["peak_mib"] > 50
    logged = [row["reward"] for row in metrics(job)]
    steps = [one["step"] for one in result["evaluations"]]
    expected = [sum(logged[a:b]) / (b - a) for a, b in zip([0, *steps], steps, strict=False)]
    assert result["training"]["reward"] == pytest.approx(expected, rel=1e-4)
    assert result["evaluation_seconds"] < result["seconds"]
    assert not list(job.folder.glob("*.safetensors"))
    assert not list(job.folder.glob("checkpoint-*"))
    assert job.changed() == []
    # A result of before an option existed is still the same; one with another value is not.
    file = job.folder / "cell.json"
    older = {name: value for name, value in result["identity"].items() if name != "max_bad_fraction"}
    file.write_text(json.dumps({**result, "identity": older}))
    assert job.changed() == []
    file.write_text(json.dumps({**result, "identity": {**older, "max_bad_fraction": 0.5}}))
    assert job.changed() == ["max_bad_fraction"]
    file.write_text(json.dumps(result))


def test_all_methods_are_judged_with_the_tasks_tolerance(write_study):
    task = {
        "data": "tasks:digits?n=8",
        "eval_data": "tasks:digits?n=6",
        "rewards": ["accuracy?tolerance=0.1", "format"],
    }
    lenient = {"label": "lenient", "method": "grpo", "rewards": ["accuracy?tolerance=0.5", "format"]}
    study = load_study(write_study(methods=["grpo", lenient], tasks={"digits": task}, seeds=1))
    for cell in study.cells:
        evaluation = cell_job(study, cell).identity["evaluation"]
        assert measurement_of(evaluation, cell.recipe.options).tolerance == 0.1


def test_the_conditions_are_the_recipes_own_views(write_study, monkeypatch):
    """A rotation by 0 degrees is no change, which no published view is."""
    own = {"preserving_views": ["rotation"], "view_rotation_degrees": 0.0, "removing_views": ["crop"]}
    entries = {"conditions": ["clean", "trained_preserving", "trained_removing"], "detector_items": 0}
    study = load_study(write_study(options={"max_steps": 2, **own}, **entries))
    job = start_job(study, "digits")
    measurement = measurement_of(job.identity["evaluation"], study.cells[0].recipe.options)
    assert measurement.sampler == ViewSampler(0, ("rotation",), ("crop",), ViewStrengths(rotation_degrees=0.0))
    shown = {}

    def answer(model, processor, records, *, condition, **options):
        shown[condition.name] = [image.tobytes() for record in records for image in condition.show(record, 0)]
        return EvalResult(tuple(ItemResult(record.id, "", ("",), (0.0,), (0.0,), 1) for record in records), 1)

    monkeypatch.setattr("cppo.comparison.measure.evaluate", answer)
    measurement.take(torch.nn.Identity(), None)
    assert shown["trained_preserving"] == shown["clean"]
    assert all(one != other for one, other in zip(shown["trained_removing"], shown["clean"], strict=True))


def test_a_measurement_leaves_torchs_random_state_alone(monkeypatch):
    records = load_records("tasks:digits?n=2", split="test")

    def answer(*args, **options):
        torch.rand(1)
        return EvalResult((ItemResult("a", "", ("",), (1.0,), (0.0,), 1),), 1)

    monkeypatch.setattr("cppo.comparison.measure.evaluate", answer)
    before = torch.random.get_rng_state()
    found = Measurement(records, ["clean"], 0, ViewSampler(0), 0.5, 40, None, 0.0).take(torch.nn.Identity(), None)
    assert found["correct"] == {"clean": "1"}
    assert torch.equal(torch.random.get_rng_state(), before)


def test_steps_are_timed_without_the_evaluations(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(
        "cppo.comparison.cell.time", SimpleNamespace(monotonic=lambda: now[0], process_time=lambda: 2 * now[0])
    )

    def measure():
        now[0] += 50.0
        return {}

    meter = StepMeter([0, 1, 3], measure)
    meter.evaluate(0)
    args, state = SimpleNamespace(device=torch.device("cpu")), TrainerState()
    meter.on_train_begin(args, state, None)
    for state.global_step, seconds in enumerate((1.0, 2.0, 4.0), start=1):
        now[0] += seconds
        meter.on_step_end(args, state, None)
    assert meter.seconds == [1.0, 2.0, 4.0]
    assert meter.cpu_seconds == [2.0, 4.0, 8.0]
    assert [one["step"] for one in meter.evaluations] == [0, 1, 3]
    assert meter.evaluation_seconds == 150.0


def test_the_peak_is_the_devices_own_before_the_first_evaluation(monkeypatch):
    peaks = iter([{"resident": 9.0, "cuda": cuda} for cuda in (1.0, 2.0, 7.0)])
    monkeypatch.setattr("cppo.comparison.cell.peak_memory_mib", lambda device: next(peaks))
    meter, args, state = StepMeter([2], dict), SimpleNamespace(device=torch.device("cuda")), TrainerState()
    for state.global_step in (1, 2, 3):
        meter.on_step_end(args, state, None)
    assert meter.peak_mib == 2.0


def test_a_real_process(study):
    job = start_job(study, "digits")
    done = []
    run_jobs([job], workers=1, threads=1, finished=lambda job, status, seconds: done.append(status))
    assert done == [0], job.log.read_text()
    (evaluation,) = job.result()["evaluations"]
    assert evaluation["step"] == 0
    assert len(evaluation["correct"]["blank"]) == 6
    assert study_jobs(study)[0].changed() == []


def test_detectors_and_accuracy_against_one_item_at_a_time():
    """The batch of different prompts says what `cppo inspect` says of each item alone."""
    model, processor = load_model("micro", device="cpu")
    records = load_records("tasks:digits?noise=100&n=12", split="test", limit=12)
    sampler = ViewSampler(0)
    measurement = Measurement(records, ["clean", "blank"], 12, sampler, 0.5, 40, None, 0.0)
    found = measurement.take(model, processor)
    for condition in ("clean", "blank"):
        shown = get_condition(condition)
        expected = evaluate(model, processor, records, batch_size=1, max_new_tokens=40, condition=shown)
        assert found["correct"][condition] == "".join("1" if one else "0" for one in expected.accuracies)
    options = InspectOptions(samples=1, max_new_tokens=40)
    tokens = [
        token
        for record in records
        for token in inspect_record(model, processor, record, sampler, options).responses[0].tokens
    ]
    for name in DEPENDENCY_SCORES:
        alone = detector_quality(
            [token.scores[name] for token in tokens],
            [token.selected[name] for token in tokens],
            [bool(token.true_perception) for token in tokens],
        )
        for figure in ("auprc", "precision", "recall", "base_rate", "tokens"):
            assert found["detectors"][name][figure] == pytest.approx(getattr(alone, figure), rel=1e-3, abs=1e-5)
