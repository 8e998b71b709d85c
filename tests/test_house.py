"""The house itself: imports point down, the wheel is complete, the README tells the truth."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
import trl
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer, SFTTrainer

import cppo
from cppo import CPPOConfig
from cppo.training import OLDEST_TRANSFORMERS, SUPPORTED_TRL
from cppo.upstream import OVERRIDES
from cppo.verl.versions import OF_TRL, SUPPORTED_VERL

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cppo"
RESULTS = ROOT / "docs" / "results"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FLOORS = (
    {"errors", "progress", "parsing", "fields", "messages"},
    {"files", "imports", "line_file", "probing", "values", "methods"},
    {"checkpoints", "trl_surface", "options", "tasks", "perception", "rewards"},
    {"views", "recipes", "hooks"},
    {"policy"},
    {"data", "assets", "upstream"},
    {"evaluation", "verl"},
    {"reports"},
    {"training"},
    {"runs"},
    {"comparison", "verl"},
    {"cli"},
)
"""A room imports from lower floors and from itself only."""


def imported_rooms(file: Path) -> set[str]:
    """Rooms of cppo that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in modules if name.startswith("cppo.")}


def test_imports_only_point_down() -> None:
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    rooms = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir() if not path.name.startswith("__")}
    assert rooms == set(floor)
    wrong = []
    for file in SOURCE.rglob("*.py"):
        room = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        wrong += [
            f"{file.relative_to(SOURCE)} imports {other}"
            for other in imported_rooms(file) - {room}
            if floor[other] >= floor[room]
        ]
    assert not wrong


def test_perception_imports_torch_alone() -> None:
    for file in (SOURCE / "perception").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        outside = {str(name).split(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"torch", "cppo"}
        assert not outside, f"{file.name} imports {outside}"
        assert imported_rooms(file) <= {"perception"}


def trls_private_names() -> set[str]:
    """Names with a leading underscore that TRL's trainers, or what they inherit from, define or set on themselves."""
    names: set[str] = set()
    for cls in {*GRPOTrainer.__mro__, *SFTTrainer.__mro__} - {object}:
        nodes = ast.walk(ast.parse(inspect.getsource(cls)))
        names |= {*vars(cls)} | {node.attr for node in nodes if isinstance(node, ast.Attribute) and sets_own(node)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def sets_own(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"


def reached(tree: ast.Module, names: set[str]) -> set[str]:
    """Those of the names that a file reaches on an object, but for `super()` and the `self` of what is no trainer."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    others = [node for node in classes if not any(ast.unparse(base).endswith("Trainer") for base in node.bases)]
    own = {id(node) for cls in others for node in ast.walk(cls)}
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in names
        if ast.unparse(node.value) != "super()" and not (ast.unparse(node.value) == "self" and id(node) in own)
    }


def test_trls_private_surface_is_used_in_one_file() -> None:
    """Others use its public names and the methods that our trainer overrides."""
    private = trls_private_names() - OVERRIDES.keys()
    assert {"_step", "_buffered_inputs", "_metrics"} <= private
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in SOURCE.rglob("*.py")}
    assert {"_step", "_buffered_inputs", "_metrics"} <= reached(trees.pop(SOURCE / "trl_surface.py"), private)
    for file, tree in trees.items():
        assert not reached(tree, private), file.name
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "trl":
                names = {alias.name for alias in node.names}
                assert node.module == "trl", file.name
                assert all(name in trl.__all__ and not inspect.ismodule(getattr(trl, name)) for name in names), names
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("trl.") for alias in node.names), file.name


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it, without its dependencies, into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("cppo-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_the_wheel_holds_assets_and_recipes(installed_wheel: Path, tmp_path: Path) -> None:
    program = (
        "import cppo, transformers; from cppo.assets import resolve_model; from cppo.recipes import load_recipe;"
        "print(cppo.__file__);"
        "transformers.AutoModelForImageTextToText.from_pretrained(resolve_model('micro'));"
        "processor = transformers.AutoProcessor.from_pretrained(resolve_model('micro'));"
        "print(type(processor).__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed_wheel)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    where, processor = run.stdout.split()
    assert Path(where).is_relative_to(installed_wheel)
    assert processor == "Qwen2_5_VLProcessor"
    files = (path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file())
    source_files = {file for file in files if not any(part.startswith((".", "__pycache__")) for part in file.parts)}
    installed = {path.relative_to(installed_wheel / "cppo") for path in (installed_wheel / "cppo").rglob("*")}
    assert source_files <= installed


def test_a_checkout_and_a_wheel_agree_on_the_version(installed_wheel: Path, tmp_path: Path) -> None:
    (wheel,) = metadata.distributions(name="cppo", path=[str(installed_wheel)])
    assert wheel.version == cppo.__version__
    for place in (SOURCE.parent, installed_wheel):
        shown = subprocess.run(
            [sys.executable, "-m", "cppo", "--version"],
            env={**os.environ, "PYTHONPATH": str(place)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout == f"cppo {cppo.__version__}\n"
    assert f"## {cppo.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_source_distribution_holds_no_results(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = tmp_path.glob("cppo-*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "src/cppo/__init__.py", "tests/test_house.py", "docs/evaluate/compare.md"} <= names
    assert not [name for name in names if name.startswith("docs/results")]


def pins(name: str) -> dict[str, str]:
    """Package and version of each line of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): pinned for package, pinned in pairs}


def test_ranges_say_what_was_run() -> None:
    """A range begins at the oldest version that was tested and ends before the next of the newest one."""
    oldest = {"torch": "2.13.0", "torchvision": "0.28.0", **pins("constraints-oldest.txt")}
    newest = pins("constraints.txt")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        name = canonicalize_name(requirement.name)
        floor, ceiling = sorted(requirement.specifier, key=lambda bound: bound.operator, reverse=True)
        assert (floor.operator, ceiling.operator) == (">=", "<"), name
        assert Version(floor.version) == Version(oldest[name]), name
        last, bound = Version(newest[name]), Version(ceiling.version)
        assert last < bound, name
        assert bound in (Version(f"{last.major}.{last.minor + 1}"), Version(f"{last.major + 1}")), name


def test_what_is_refused_at_the_start_is_outside_the_ranges() -> None:
    bounds = {needed.name: needed.specifier for needed in map(Requirement, PROJECT["dependencies"])}
    assert bounds["trl"] == SpecifierSet(SUPPORTED_TRL)
    assert f">={OLDEST_TRANSFORMERS}" in map(str, bounds["transformers"])


def test_the_set_inside_verl_holds_what_both_ask_for() -> None:
    """Its versions lie in the ranges of this package, but for the packages that verl bounds otherwise."""
    pinned = pins("constraints-verl.txt")
    assert SpecifierSet(SUPPORTED_VERL).contains(pinned["verl"])
    assert "trl" not in pinned
    for needed in map(Requirement, PROJECT["dependencies"]):
        if needed.name not in OF_TRL:
            assert needed.specifier.contains(pinned[canonicalize_name(needed.name)]), needed


def test_the_documents_name_every_option_with_its_default() -> None:
    table = (ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
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


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code.count("max_steps=100") == 1
    short = code.replace("max_steps=100", "max_steps=1")
    run = subprocess.run([sys.executable, "-c", short], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "perception/gated_fraction" in run.stdout


def test_the_python_of_the_functions_page_runs(tmp_path: Path) -> None:
    page = ROOT / "docs" / "reference" / "perception.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 2
    run = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    selected, views = run.stdout.splitlines()
    assert re.fullmatch(r"\d+ tokens selected, loss \d\.\d{3}", selected)
    assert views == "(64, 64) (64, 64)"


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]), ids=lambda p: p.name)
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
    for page in (ROOT / "docs").rglob("*.md"):
        title, *lines = page.read_text(encoding="utf-8").splitlines()[:5]
        assert title.startswith("# "), page
        assert len(lines) == 4, page
        blank, reader, ability, after = lines
        assert (blank, after) == ("", ""), page
        assert re.fullmatch(r"For \w.{10,100}\.", reader), page
        assert re.fullmatch(r"After this page you can \w.{10,100}\.", ability), page


def shell_lines(document: Path) -> list[str]:
    """The lines of a document's code blocks that are not marked as another language."""
    lines, language = [], None
    for line in document.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
        elif language in ("", "sh", "bash") or line.startswith("    "):
            lines.append(line.strip())
    return lines


def help_of(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "cppo", *words], capture_output=True, text=True)


def test_commands_in_the_documents_are_understood() -> None:
    """Every `cppo` shown in a document, also behind a launcher, names a command and options that exist."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    lines = {line for document in documents for line in shell_lines(document)}
    commands = {found[1] for line in lines if (found := re.match(r"(?:\w+=\S+ )*(?:\S.* -m )?(cppo .*)", line))}
    assert len(commands) >= 2
    assert any(command not in lines for command in commands)
    shown: dict[str, str] = {}
    for command in sorted(commands):
        name, *words = shlex.split(command, comments=True)[1:]
        if name in ("data", "recipes"):
            name = f"{name} {words.pop(0)}"
        if name not in shown:
            run = help_of(*name.split(), "--help-all" if name in ("train", "sft") else "--help")
            assert run.returncode == 0, (command, run.stderr)
            shown[name] = run.stdout
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert f"{option} " in shown[name].replace("\n", " "), (command, option)


PLAIN_WORDS = {
    "is told|are told": "is reported, logged, asked for",
    "is said of|are said": "says, names",
    "comes to": "is",
    "holds against|hold against": "agrees with",
    "in order to": "to",
    "by means of": "by, with",
    "upon": "on",
    "thereof|therein|wherein|thereby|whereby|lest|hitherto|nought": "(leave out)",
    "utilize|utilise|leverage": "use",
    "it should be noted|note that": "(leave out)",
}
"""What prose must not say, alternatives beside each other: what to write instead."""


def test_the_prose_is_plain() -> None:
    """Of code, documents, recipes and the coming release's notes: no phrase that `PLAIN_WORDS` replaces."""
    texts = {
        path: path.read_text(encoding="utf-8")
        for folder in ("src", "docs", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".yaml", ".j2") and not path.is_relative_to(RESULTS)
    }
    texts[ROOT / "README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    texts[ROOT / "CHANGELOG.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1]
    found = []
    for path, text in texts.items():
        prose = re.sub(r'"\s+r?f?"|[\s#]+', " ", text)  # phrases go on across lines of strings and comments
        for phrase, better in PLAIN_WORDS.items():
            for match in re.finditer(rf"\b(?:{phrase})\b", prose, flags=re.IGNORECASE):
                around = prose[max(match.start() - 40, 0) : match.end() + 20]
                found.append(f"{path.relative_to(ROOT)}: ...{around}...: instead of '{match[0]}' write: {better}")
    assert not found, "\n".join(found)
