"""The documents tell the truth: links lead somewhere, code runs, commands are understood, the site has each page."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from trl import GRPOConfig

from cppo import CPPOConfig
from cppo.cli.main import COMMANDS
from cppo.cli.parser import Parser
from cppo.cli.recipes import packaged_files
from cppo.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
DOORS = [
    "Start (5 minutes)",
    "Train on your data",
    "Choose a method",
    "See what it sees",
    "Evaluate",
    "Scale",
    "Extend",
    "Reference",
    "Results",
    "Method in pictures",
]


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and text of each code block of a document; "" for one that is indented or names no language."""
    found, language, kept = [], None, []
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            if language is None:
                language, kept = line.strip().strip("`"), []
            else:
                found.append((language, "\n".join(kept) + "\n"))
                language = None
        elif language is not None:
            kept.append(line)
        elif line.startswith("    "):
            found.append(("", line.strip() + "\n"))
    return found


def test_the_site_has_each_page_behind_its_doors() -> None:
    class Loader(yaml.SafeLoader):
        """Leaves out what names an object of Python."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    assert [title for door in nav for title in door] == DOORS
    shown = re.findall(r"[\w/-]+\.md", json.dumps(nav))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    in_docs = [page for page in shown if not page.startswith(("source/", "results/"))]
    assert sorted(in_docs) == sorted(page for page in pages if not page.startswith("results/"))
    if RESULTS.exists():  # the source distribution leaves the results out
        assert pages <= set(shown)


def test_the_documents_name_every_option_with_its_default() -> None:
    table = (DOCS / "reference" / "options.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", table, flags=re.MULTILINE))
    inherited = {field.name for field in fields(GRPOConfig)}
    defaults = CPPOConfig("unused", use_cpu=True, bf16=False)
    options = [field.name for field in fields(CPPOConfig) if field.name not in inherited]
    assert list(rows) == options
    for name in options:
        value, shown = getattr(defaults, name), rows[name].strip().strip("`")
        if isinstance(value, bool):
            assert shown == str(value).lower(), name
        elif isinstance(value, list) and not value:
            assert shown == "none", name
        elif isinstance(value, list) and isinstance(value[0], str):
            assert shown in ("all three", "both"), name
        elif isinstance(value, list):
            assert [float(part) for part in shown.split(",")] == value, name
        elif isinstance(value, (int, float)):
            assert float(shown) == value, name
        else:
            assert shown == (value or "none"), name


def sentences(document: Path) -> list[str]:
    """The sentences of a document, without code and tables."""
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|^[|#!].*?$|\]\([^)]*\)|\*\*", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.split(r"(?<=[.:?!])\s+|\n\n|\n- ", prose)


def test_the_readme_is_short() -> None:
    """A screen and a half."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_no_sentence_is_long() -> None:
    """At most 25 words, except in the records of what was measured."""
    pages = [page for page in DOCS.rglob("*.md") if RESULTS not in page.parents]
    found = {page: sentences(page) for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages)}
    assert all(len(one) > 2 for one in found.values())
    long = [(page.name, one) for page, some in found.items() for one in some if len(one.split()) > 25]
    assert long == []


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code.count("max_steps=100") == 1
    short = code.replace("max_steps=100", "max_steps=1")
    run = subprocess.run([sys.executable, "-c", short], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "perception/gated_fraction" in run.stdout


def test_the_pages_python_runs(tmp_path: Path) -> None:
    """Each page is a script: its blocks run in their order, in a folder of their own."""
    pages = {page: [text for language, text in blocks(page) if language == "python"] for page in DOCS.rglob("*.md")}
    scripts = {str(page.relative_to(DOCS)): "\n".join(texts) for page, texts in sorted(pages.items()) if texts}
    assert len(scripts) >= 5
    program = (
        "import json, os, sys, tempfile\n"
        "for page, code in json.load(sys.stdin).items():\n"
        "    os.chdir(tempfile.mkdtemp(dir=sys.argv[1]))\n"
        "    print('page', page, flush=True)\n"
        "    exec(compile(code, page, 'exec'), {'__name__': '__main__'})\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.run(command, input=json.dumps(scripts), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.findall(r"^page (.*)$", run.stdout, flags=re.MULTILINE) == list(scripts)
    functions = run.stdout.partition("page reference/perception.md\n")[2]
    assert re.match(r"\d+ tokens selected, loss \d\.\d{3}\n\(64, 64\) \(64, 64\)\n", functions)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_the_code_of_a_document_is_of_the_language_it_names(document: Path) -> None:
    for language, text in blocks(document):
        if language == "":
            assert not re.match(r"(import|from) \w+.*\n?", text), f"{document.name}: name the language of {text!r}"
        elif language == "yaml":
            yaml.safe_load(text)
        elif language == "json":
            for line in text.splitlines() if text.count("\n{") else [text]:
                json.loads(line)


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            place = document.parent / file if file else document
            if not RESULTS.exists() and place.resolve().is_relative_to(RESULTS):
                continue  # the source distribution leaves the results out
            assert place.exists(), f"{document.name} links to {target}"
            assert not anchor or anchor in anchors(place), f"{document.name} links to {target}"


def test_each_page_begins_with_its_reader() -> None:
    """Under the title: whom the page is for, and what the reader can do after it, each in one line."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    outside = {
        page.name: page.read_text(encoding="utf-8") for page in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
    }
    pages = {str(page): page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}
    for page, text in {"notebook": "".join(notebook["cells"][0]["source"]), **outside, **pages}.items():
        title, *lines = text.splitlines()[:5]
        assert title.startswith("# "), page
        assert len(lines) == 4, page
        blank, reader, ability, after = lines
        assert (blank, after) == ("", ""), page
        assert re.fullmatch(r"For \w.{10,100}\.", reader), page
        assert re.fullmatch(r"After this page you can \w.{10,100}\.", ability), page


def commands(document: Path) -> set[str]:
    """Every `cppo ...` shown in a document's code blocks, also behind a launcher."""
    shell = [text.replace("\\\n", " ") for language, text in blocks(document) if language in ("", "sh", "bash")]
    lines = [line.strip() for text in shell for line in text.splitlines()]
    return {found[1] for line in lines if (found := re.match(r"(?:\w+=\S+ )*(?:\S.* -m )?(cppo .*)", line))}


class ReachedError(Exception):
    """A command has reached its parser, which this holds."""


def parser_of(name: str, words: list[str]) -> Parser:
    """The parser of a command, after it has read `words` where there are any. Raises UserError for what it refuses."""
    parse_all = Parser.parse_all

    def parse_only(parser: Parser, argv: list[str]) -> None:
        if words:
            parse_all(parser, argv)
        raise ReachedError(parser)

    assert name in COMMANDS, name
    command = importlib.import_module(f"cppo.cli.{name.replace('-', '_')}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_all", parse_only)
        with pytest.raises(ReachedError) as reached:
            command.run(words)
    return reached.value.args[0]


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser and of the parsers of its parts."""
    parts = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return set(parser._option_string_actions).union(*(options_of(part) for named in parts for part in named.values()))


def test_commands_in_the_documents_are_understood() -> None:
    shown = {command for document in DOCUMENTS for command in commands(document)}
    assert len(shown) > 50
    for command in sorted(shown):
        name, *words = shlex.split(command, comments=True)[1:]
        if not name.startswith("-") and not {"--help", "--help-all"} & set(words):
            try:
                parser_of(name, words)
            except UserError as error:
                pytest.fail(f"{command}: {error}")
        configs = (after for word, after in pairwise(words) if word == "--config")
        assert all(config in packaged_files() or "." in config for config in configs), command


def test_options_in_the_text_of_documents_exist() -> None:
    """In a sentence a command may leave out what it needs; the options that it names exist."""
    known = {name: options_of(parser_of(name, [])) | {"--help", "--help-all"} for name in COMMANDS}
    for document in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for name, rest in re.findall(r"`cppo ([a-z-]+)( [^`]*)?`", text):
            for option in re.findall(r"(?<= )--[\w-]+", rest):
                assert option in known[name], f"{document.name}: cppo {name} has no {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_make_and_scripts_in_the_documents_exist(document: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = "".join(text for language, text in blocks(document) if language in ("", "sh", "bash"))
    for target in re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE):
        assert target in targets, target
    for script in re.findall(r"^(?:\w+=\S+ )*python ((?:benchmarks|examples|tests|tools)/\S+\.py)", text, re.MULTILINE):
        assert (ROOT / script).exists(), script
