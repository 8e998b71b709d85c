"""Make quickstart.ipynb from quickstart.py, with its outputs.

    pip install -e '.[notebook]' && python examples/build_notebook.py

The script is the source. Its cells begin with `# %%`, text cells with `# %% [markdown]`.
"""

import re
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).with_name("quickstart.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
SECONDS = 3600


def script_cells(text: str) -> list[tuple[str, str]]:
    """The cells of a script as ("markdown" or "code", source)."""
    cells = []
    for mark, source in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text, flags=re.DOTALL | re.MULTILINE):
        if mark:
            cells.append(("markdown", re.sub(r"^# ?", "", source.strip(), flags=re.MULTILINE)))
        else:
            cells.append(("code", source.strip()))
    return cells


def build(script: Path = SCRIPT, notebook: Path = NOTEBOOK) -> None:
    """Execute the script's cells in a temporary folder, and write the notebook."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    for number, (kind, source) in enumerate(script_cells(script.read_text(encoding="utf-8"))):
        make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        book.cells.append(make(source, id=f"cell-{number}"))
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=SECONDS, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        if cell.cell_type == "code":  # libraries warn with paths of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # a picture is also stored as PNG
    nbformat.write(book, notebook)


if __name__ == "__main__":
    build()
