"""The house itself: imports point down, the wheel is complete, the README tells the truth."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import trl
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from trl import GRPOTrainer, SFTTrainer

import cppo
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


PLAIN_WORDS = {
    "is told|are told": "is reported, gets",
    "is said of|are said": "says, names",
    "of which": "begin a new sentence",
    "(?<=[^.][.;] )of": "for, with, or the subject first",
    "but for": "except",
    "in (?:the|its|their) place of": "instead of",
    "makes of": "returns",
    "stands? for": "means",
    "comes to": "is",
    "held against|holds against": "compared with",
    "(?<![-.])anew": "again",
    "goes on|go on": "resumes, continues",
    "takes? the place of": "replaces",
    "brings?": "has, adds, sets",
    "so many": "this many, as many as",
    "of one's own": "your own, separate",
    "read off": "read from",
    "in order to": "to",
    "by means of": "by, with",
    "upon": "on",
    "thereof|therein|wherein|thereby|whereby|lest|hitherto|nought": "(leave out)",
    "utilize|utilise|leverage": "use",
    "it should be noted|note that": "(leave out)",
}
"""What prose must not say, as patterns: what to write instead."""


def test_the_prose_is_plain() -> None:
    """Code, documents, recipes and the coming release's notes have no phrase of `PLAIN_WORDS`."""
    texts = {
        path: path.read_text(encoding="utf-8")
        for folder in ("src", "docs", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".yaml", ".j2") and RESULTS not in path.parents
    }
    texts[ROOT / "README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    texts[ROOT / "CHANGELOG.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1]
    found = []
    for path, text in texts.items():
        prose = re.sub(r'"\s+r?f?"|[\s#]+', " ", text)  # phrases continue across lines of strings and comments
        for phrase, better in PLAIN_WORDS.items():
            for match in re.finditer(rf"\b(?:{phrase})\b", prose, flags=re.IGNORECASE):
                around = prose[max(match.start() - 40, 0) : match.end() + 20]
                found.append(f"{path.relative_to(ROOT)}: ...{around}...: instead of '{match[0]}' write: {better}")
    assert not found, "\n".join(found)
