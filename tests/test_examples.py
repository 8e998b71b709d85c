"""The quick start: the notebook holds the script's cells with their outputs, and the script runs. So do the figures."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def script_cells():
    spec = importlib.util.spec_from_file_location("build_notebook", EXAMPLES / "build_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.script_cells


def test_cells_of_a_script(script_cells):
    text = "# %% [markdown]\n# # Title\n#\n# `# %%` text\n\n# %%\nx = 1\n\n\ny = 2  # %%\n# %%\n# a comment\n"
    assert script_cells(text) == [
        ("markdown", "# Title\n\n`# %%` text"),
        ("code", "x = 1\n\n\ny = 2  # %%"),
        ("code", "# a comment"),
    ]


def test_the_notebook_is_the_script_with_its_outputs(script_cells):
    file = EXAMPLES / "quickstart.ipynb"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    kept = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert kept == script_cells((EXAMPLES / "quickstart.py").read_text(encoding="utf-8"))
    assert file.stat().st_size < 1_500_000
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"/(home|tmp|root|work|usr)/", text)
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("text/html" in output.get("data", {}) for output in outputs) == 2
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


def test_the_script_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUICKSTART_STEPS", "2")
    monkeypatch.setenv("QUICKSTART_ITEMS", "4")
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(r"steps  1 to  2  mean reward \d\.\d{3}", out)
    assert re.search(r"gain [+-][\d.]+ points, 95 % interval", out)
    folder = tmp_path / "runs" / "quickstart"
    for name in ("data.png", "views.png"):
        assert Image.open(folder / name).width > 300
    assert "<svg" in (folder / "curves.html").read_text()
    assert "entropy_shift" in (folder / "tokens.html").read_text()
    assert (folder / "model" / "README.md").read_text().startswith("---\n")


def test_the_figures_of_the_method_are_what_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "tools")
    importlib.import_module("draw_pictures").main(["--out", str(tmp_path)])
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 5
    for figure in drawn:
        now, kept = (texts(one) for one in (figure, EXAMPLES.parent / "docs" / "pictures" / figure.name))
        assert len(now) == len(kept) > 5, figure.name
        for one, other in zip(now, kept, strict=True):  # two decimals, or whole per cent
            assert one == other or float(one) == pytest.approx(float(other), abs=0.011), figure.name


def texts(figure):
    """The words and numbers of a figure, in their order."""
    found = re.findall(r"<text[^>]*>([^<]*)</text>", figure.read_text(encoding="utf-8"))
    return [word for text in found for word in text.split()]
