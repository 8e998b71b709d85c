"""`cppo recipes list` and `cppo recipes copy NAME [DEST]`: recipes, studies, configurations of `accelerate launch`."""

from collections.abc import Sequence
from pathlib import Path

from cppo.cli.parser import Parser
from cppo.comparison.study import study_file, study_names
from cppo.errors import UserError, choose_one
from cppo.recipes import accelerate_files, recipe_file, recipe_names, recipe_summary


def run(argv: Sequence[str]) -> None:
    """List the packaged recipes, or copy one. Raises UserError for an unknown name or an existing file."""
    parser = Parser(
        prog="cppo recipes", description="Recipes, studies and accelerate configurations that come with the package."
    )
    commands = parser.add_subparsers(dest="command", metavar="list|copy", required=True, parser_class=Parser)
    commands.add_parser("list", help="list names and purposes")
    copy = commands.add_parser("copy", help="copy one, to edit it and use it as `--config FILE.yaml`")
    copy.add_argument("name", metavar="NAME", help="a name from `cppo recipes list`")
    copy.add_argument("dest", metavar="DEST", nargs="?", help="file or folder (default: ./NAME.yaml)")
    arguments = parser.parse_all(argv)
    if arguments.command == "list":
        files = packaged_files()
        width = max(map(len, files))
        for name, file in files.items():
            print(f"{name:<{width}}  {recipe_summary(file)}")
    else:
        print(copy_recipe(arguments.name, arguments.dest))


def packaged_files() -> dict[str, Path]:
    """Recipes, then studies, then configurations of `accelerate launch`, by name."""
    recipes = {name: recipe_file(name) for name in recipe_names()}
    return recipes | {name: study_file(name) for name in study_names()} | accelerate_files()


def copy_recipe(name: str, dest: str | None) -> Path:
    """Copy the packaged `name` to the file or folder `dest`, never over an existing file. Returns the copy."""
    files = packaged_files()
    if name not in files:
        raise UserError(f"no packaged recipe {name!r}; {choose_one(name, files)}")
    target = Path(dest) if dest else Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(files[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UserError(f"{target} exists already; give another DEST") from error
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    return target
