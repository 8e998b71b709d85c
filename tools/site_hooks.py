"""Hooks of mkdocs.yml: pages for the repository's files that the documents link to, and the page of commands.

A document links to a file outside docs/ by its path, which works in a checkout. On the site that file is a page below
source/: code with its colours, a folder as a list, Markdown and notebooks as themselves.
"""

import base64
import html
import json
import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCE = "source"
"""The folder of the site that holds the repository's files."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "sh"}
HELP = "<!-- the help of every command -->"
PARTS = re.compile(r"^    (\w+) {2,}\w", re.MULTILINE)
"""The parts of a command, as its help lists them."""
UNSEARCHED = "---\nsearch: {exclude: true}\n---\n\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the documents link to outside docs/, and in turn what those pages link to."""
    waiting = {target for page in DOCS.rglob("*.md") for target in outside(page)}
    seen: set[Path] = set()
    while waiting:
        target = waiting.pop()
        if target in seen:
            continue
        seen.add(target)
        for uri, content in pages_of(target):
            files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
        waiting |= set(target.glob("*.py")) if target.is_dir() else set()
        waiting |= set(outside(target)) if target.suffix == ".md" else set()
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead links that leave docs/ to their pages below source/; print the commands' help where its place is marked."""
    uri = page.file.src_uri
    if HELP in markdown:
        markdown = markdown.replace(HELP, commands())
    place = (ROOT / uri.removeprefix(f"{SOURCE}/")) if uri.startswith(f"{SOURCE}/") else DOCS / uri
    return LINK.sub(lambda found: site_link(found, place, uri), markdown)


def outside(document: Path) -> list[Path]:
    """The files and folders of the repository, outside docs/, that a document links to."""
    targets = [(document.parent / found[1]).resolve() for found in LINK.finditer(document.read_text(encoding="utf-8"))]
    return [one for one in targets if one.exists() and one.is_relative_to(ROOT) and not one.is_relative_to(DOCS)]


def site_link(found: re.Match[str], place: Path, uri: str) -> str:
    """A link as the site has it; one that leads nowhere stays, and fails the build."""
    target = (place.parent / found[1]).resolve()
    if not target.exists() or not target.is_relative_to(ROOT):
        return found[0]
    inside = target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else uri_of(target)
    return posixpath.relpath(inside, posixpath.dirname(uri)) + (found[2] or "")


def uri_of(target: Path) -> str:
    """Where the page of a file or folder of the repository lies below docs/."""
    path = f"{SOURCE}/{target.relative_to(ROOT).as_posix()}"
    if target.is_dir():
        return f"{path}/index.md"
    return path if target.suffix == ".md" else f"{path.removesuffix('.ipynb')}.md"


def pages_of(target: Path) -> Iterator[tuple[str, str | bytes]]:
    """The pages, and their pictures, that show a file or folder: where each lies below docs/, and its content."""
    uri, title = uri_of(target), f"# {target.relative_to(ROOT)}\n\n"
    if target.is_dir():
        names = sorted(file.name for file in target.glob("*.py"))
        yield uri, UNSEARCHED + title + "\n".join(f"- [{name}]({name}.md)" for name in names)
    elif target.suffix == ".ipynb":
        yield from notebook_pages(target, uri)
    elif target.suffix == ".md":
        yield uri, target.read_text(encoding="utf-8")
    else:
        code = target.read_text(encoding="utf-8")
        yield uri, f"{UNSEARCHED}{title}````{LANGUAGES.get(target.suffix, 'text')}\n{code}````\n"


def notebook_pages(notebook: Path, uri: str) -> Iterator[tuple[str, str | bytes]]:
    """A notebook as a page, and each picture and each frame of its outputs as a file beside it."""
    parts = []
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text'])}```")
            elif "image/png" in data:
                name = f"{notebook.stem}-{number}.png"
                yield posixpath.join(posixpath.dirname(uri), name), base64.b64decode(data["image/png"])
                parts.append(f"![The output of the cell above]({name})")
            elif "text/html" in data:
                name = f"{notebook.stem}-{number}.html"
                (framed,) = re.findall(r'srcdoc="([^"]*)"', "".join(data["text/html"]))
                yield posixpath.join(posixpath.dirname(uri), name), html.unescape(framed)
                parts.append(f'<iframe src="{name}" title="The output of the cell above" loading="lazy"></iframe>')
    yield uri, "\n\n".join(parts)


def commands() -> str:
    """What `cppo --help`, `cppo NAME --help` and `cppo NAME PART --help` print."""
    overview = help_text()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        names = [(name,) for name in re.findall(r"^  ([a-z][\w-]+) ", overview, flags=re.MULTILINE)]
        texts = dict(zip(names, pool.map(lambda words: help_text(*words), names), strict=True))
        parts = [(*words, part) for words, text in texts.items() for part in PARTS.findall(text)]
        texts |= dict(zip(parts, pool.map(lambda words: help_text(*words), parts), strict=True))
    sections = (f"## cppo {' '.join(words)}\n\n```text\n{texts[words]}```" for words in sorted(texts))
    shown = (f"```text\n{overview}```", *sections)
    return "\n\n".join(('<div class="help" markdown>', *shown, "</div>"))


def help_text(*words: str) -> str:
    """The help of a command, 100 columns wide."""
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "cppo", *words, "--help"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
