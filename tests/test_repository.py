"""The repository's files beside its code: they parse, and say what pyproject.toml, the Makefile and the code say."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import cppo
from cppo.reports.model_card import CITATION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def parsed(name: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def recipe_lines(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    (found,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found.splitlines()]


def test_the_hooks_are_the_checks_of_make_test() -> None:
    *checks, tests = recipe_lines("test")
    assert "PYTEST" in tests
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == checks
    # `local` and `system`: the versions are those of .venv, not a second set.
    assert repository["repo"] == "local"
    assert {(hook["language"], hook["pass_filenames"]) for hook in repository["hooks"]} == {("system", False)}


def test_the_citation_is_of_this_version_and_its_paper() -> None:
    software = parsed("CITATION.cff")
    assert {"authors", "cff-version", "message", "title"} <= set(software)
    assert (software["cff-version"], software["version"]) == ("1.2.0", cppo.__version__)
    assert software["license"] == PROJECT["license"]
    assert software["title"] == PROJECT["description"]
    assert software["authors"] == PROJECT["authors"]
    paper = software["preferred-citation"]
    for field in (paper["title"], paper["journal"], paper["year"]):
        assert f"{{{field}}}" in CITATION
    assert paper["journal"].endswith(paper["url"].rpartition("/")[2])


def test_ci_covers_every_python_and_set_of_versions() -> None:
    matrix = parsed(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    named = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    assert matrix["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert matrix["target"] == ["test"]
    others = [(job["target"], job["python"]) for job in matrix["include"]]
    assert {target for target, _ in others} == {"docs", "test-oldest", "test-plain", "verl-test"}
    assert {python for _, python in others} <= set(named)
    for target in ("test", *{target for target, _ in others}):
        assert recipe_lines(target)


def workflows() -> dict[str, dict[Any, Any]]:
    return {path.name: parsed(str(path)) for path in (ROOT / ".github" / "workflows").iterdir()}


def test_workflows_may_do_no_more_than_they_need() -> None:
    granted = {}
    for name, workflow in workflows().items():
        assert workflow["permissions"] in ({}, {"contents": "read"}), name
        for job_name, job in workflow["jobs"].items():
            granted[name, job_name] = job.get("permissions", workflow["permissions"])
    writing = {job: rights for job, rights in granted.items() if "write" in rights.values()}
    assert writing == {("release.yml", "publish"): {"id-token": "write"}}
    assert not any("secrets." in path.read_text() for path in (ROOT / ".github" / "workflows").iterdir())


def test_actions_are_pinned() -> None:
    used = []
    for workflow in workflows().values():
        for job in workflow["jobs"].values():
            used += [step["uses"] for step in [job, *job.get("steps", [])] if "uses" in step]
    assert used
    for action in used:
        if action.startswith("./"):
            assert (ROOT / action).is_file()
        else:
            assert re.fullmatch(r"[\w/-]+@((release/)?v\d+|[0-9a-f]{40})", action), action


def test_a_release_publishes_what_was_tested_and_checked() -> None:
    jobs = parsed(".github/workflows/release.yml")["jobs"]
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("tests", "build")
    commands = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    shown = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for command in commands[1:]:
        assert command.removeprefix("python -m ").split()[0] in ("pip", "build", "twine")
        assert command in shown or command.removeprefix("python -m ") in shown


def test_issue_forms_ask_for_something() -> None:
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir())
    assert forms
    for path in forms:
        form = parsed(str(path))
        assert {"name", "description", "body"} <= set(form)
        asked = [part for part in form["body"] if part["type"] != "markdown"]
        assert len({part["id"] for part in asked}) == len(asked) > 0
        assert all(part["attributes"]["label"] for part in asked)
        assert any(part.get("validations", {}).get("required") for part in asked)
