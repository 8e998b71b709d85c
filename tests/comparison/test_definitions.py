"""Definition numbers: what an option's value does not say keeps cells of an earlier meaning apart from later ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cppo.cli.main import main
from cppo.comparison import definitions
from cppo.comparison.finished import RESULT, read_archive
from cppo.comparison.jobs import cell_job, start_job, study_jobs
from cppo.comparison.study import load_study
from cppo.methods import METHODS
from cppo.options import schema
from cppo.views import EVERY_PRESERVING, EVERY_REMOVING

STUDIES = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def redefine(monkeypatch):
    """Gives a part of the code so many later definitions; the others keep the first."""
    monkeypatch.setattr(definitions, "CHANGES", {})

    def change(part, later=1):
        monkeypatch.setitem(definitions.CHANGES, part, ("something else",) * later)

    return change


def forget_numbers(folder):
    """Make all results in a folder what they were before cells kept numbers."""
    for file in folder.rglob(RESULT):
        content = json.loads(file.read_text())
        del content["identity"]["definitions"]
        file.write_text(json.dumps(content))


def ran(file):
    return len(file.read_text().splitlines())


def test_every_change_is_of_a_part_and_says_what():
    parts = {f"view {name}" for name in (*EVERY_PRESERVING, *EVERY_REMOVING)} | {f"method {name}" for name in METHODS}
    own = schema("train").own
    parts |= {f"{kind} {name}" for kind in definitions.BLOCKS for name in own[f"perception_{kind}"].choices}
    assert set(definitions.CHANGES) <= parts
    assert all(text.endswith(".") for texts in definitions.CHANGES.values() for text in texts)


def test_a_cell_keeps_the_numbers_of_what_it_uses(write_study, redefine):
    redefine("view crop", 2)
    study = load_study(write_study(methods=["grpo", "cppo", "noisyrollout"], seeds=1, conditions=["blur", "clean"]))
    grpo, cppo, noisy = (cell_job(study, cell).identity["definitions"] for cell in study.cells)
    start = start_job(study, "digits").identity["definitions"]
    judged = {"view noise_rectangles", "view crop", "view blur"}
    assert {part for part in start if part.startswith("view")} == judged
    assert len([part for part in start if part.startswith("score")]) == 7
    assert grpo == {**start, "method grpo": 1}
    assert {*cppo} - {*start} == {
        "method cppo", "sink contrast", "gate advantage", "selector top_positive", "divergence k3",
        "view color_jitter", "view perspective", "view rotation",
    }  # fmt: skip
    assert cppo["view crop"] == 3
    assert {*noisy} - {*start} == {"method noisyrollout", "view diffusion_noise"}


@pytest.mark.parametrize(
    ("part", "again", "numbered"),
    [
        ("view crop", 5, True),
        ("score k3", 5, False),
        ("sink contrast", 2, False),
        ("method cppo", 2, True),
        ("view jpeg", 0, False),
    ],
)
def test_a_result_of_an_earlier_definition_is_not_taken_for_a_later_one(
    write_study, stub_cells, redefine, tmp_path, capsys, part, again, numbered
):
    """The start and GRPO's cells use views and scores in their evaluation alone, and no sink."""
    file, out = write_study(), stub_cells.parent
    assert main(["compare", "--config", file]) == 0
    if not numbered:
        forget_numbers(out)
    redefine(part)
    if again:
        assert main(["compare", "--config", file]) == 2
        assert f"with other definitions than the code has now ({part}: 1, now 2)" in capsys.readouterr().err
    else:
        assert main(["compare", "--config", file]) == 0
    assert ran(stub_cells) == 5
    other = tmp_path / "other"
    assert main(["compare", "--config", write_study("other", output_dir=str(other), cells_from=[str(out)])]) == 0
    assert ran(other / "runs.txt") == again if again else not (other / "runs.txt").exists()
    assert main(["compare", "--config", file, "--rerun"]) == 0
    assert ran(stub_cells) == 5 + again
    assert main(["compare", "--config", file]) == 0


def test_a_cell_of_a_sinks_former_name_is_the_same_cell(write_study, stub_cells, capsys):
    file = write_study(methods=["grpo", {"label": "pgpo", "method": "pgpo", "perception_sink": "weights"}])
    assert main(["compare", "--config", file]) == 0
    for cell in stub_cells.parent.glob(f"cells/digits/pgpo/*/{RESULT}"):
        content = json.loads(cell.read_text())
        identity, numbers = content["identity"], content["identity"]["definitions"]
        assert (identity["perception_sink"], numbers.pop("sink scale_advantage")) == ("scale_advantage", 2)
        identity["perception_sink"], numbers["sink weights"] = "weights", 2
        cell.write_text(json.dumps(content))
    before = ran(stub_cells)
    assert main(["compare", "--config", file]) == 0
    assert ran(stub_cells) == before
    assert json.loads((stub_cells.parent / "results.json").read_text())["definitions"]["sink scale_advantage"] == [2]
    numbers["sink weights"] = 1
    cell.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["compare", "--config", file]) == 2
    assert "sink scale_advantage: 1, now 2" in capsys.readouterr().err


def test_report_only_tells_of_earlier_definitions_and_reports_them_as_they_are(
    write_study, stub_cells, redefine, capsys
):
    file, out = write_study(), stub_cells.parent
    assert main(["compare", "--config", file]) == 0
    before = {name: (out / name).read_bytes() for name in ("results.json", "summary.md", "report.html")}
    forget_numbers(out)
    redefine("view crop")
    capsys.readouterr()
    assert main(["compare", "--config", file, "--report_only"]) == 0
    assert "other definitions than the code has now: view crop: 1, now 2" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in before} == before
    cell = out / "cells/digits/cppo/seed-1" / RESULT
    cell.unlink()
    assert main(["compare", "--config", file, "--rerun"]) == 0
    capsys.readouterr()
    assert json.loads((out / "results.json").read_text())["definitions"] == {"view crop": [2]}
    content = json.loads(cell.read_text())
    content["identity"]["definitions"]["view crop"] = 1
    cell.write_text(json.dumps(content))
    assert main(["compare", "--config", file, "--report_only"]) == 0
    assert "CELLS OF SEVERAL DEFINITIONS ARE MIXED: view crop." in (out / "summary.md").read_text()


def test_what_a_later_method_sets_is_no_other_option(write_study, stub_cells, redefine, monkeypatch, capsys):
    """A cell of an earlier method stays reportable, while options that the study itself gives are still compared."""
    louder = {"label": "loud", "method": "papo", "perception_weight": 0.5}
    file = write_study(methods=["grpo", louder])
    assert main(["compare", "--config", file]) == 0
    now = {"perception_sink": "contrast", "epsilon": 0.3}
    monkeypatch.setitem(METHODS, "papo", replace(METHODS["papo"], options=now))
    assert main(["compare", "--config", file, "--report_only"]) == 2  # the method changed under the same number
    redefine("method papo")
    assert main(["compare", "--config", file, "--report_only"]) == 0
    capsys.readouterr()
    louder["perception_weight"] = 0.6
    assert main(["compare", "--config", write_study(methods=["grpo", louder]), "--report_only"]) == 2
    assert "was run with other options (perception_weight)" in capsys.readouterr().err


@pytest.mark.skipif(not STUDIES.exists(), reason="the source distribution leaves the results out")
def test_loose_cells_of_an_old_version_load_unchanged(tmp_path):
    """Cells of a code that kept no definition numbers show the same from their own files as from an archive."""
    archive, out = STUDIES / "evidence-negative.jsonl.xz", tmp_path / "loose"
    cells = read_archive(archive)
    assert not any("definitions" in cell["identity"] for cell in cells.values())
    for path, cell in cells.items():
        (out / path).mkdir(parents=True)
        (out / path / RESULT).write_text(json.dumps(cell, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    study = load_study("evidence-negative", {"output_dir": str(out)})
    assert {job.path: job.result() for job in study_jobs(study)} == cells
    words = ["compare", "--config", "evidence-negative", "--output_dir"]
    assert main([*words, str(out), "--report_only"]) == 0
    assert main([*words, str(tmp_path / "archived"), "--cells_from", str(archive)]) == 0
    for name, ends in {"results.json": '"versions"', "summary.md": "`. ", "report.html": "</code>"}.items():
        loose, archived = ((folder / name).read_text().split(ends, 1)[1] for folder in (out, tmp_path / "archived"))
        settings = f'"output_dir": "{out}",\n  "cells_from": [],'
        others = f'"output_dir": "{tmp_path}/archived",\n  "cells_from": [\n   "{archive}"\n  ],'
        assert loose.replace(settings, others) == archived, name
    recorded = (STUDIES / "evidence-negative.md").read_text()
    assert (out / "summary.md").read_text().split("`. ", 1)[1] == recorded.split("`. ", 1)[1]
