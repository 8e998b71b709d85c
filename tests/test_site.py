"""The built site, opened as a file: its search finds pages without a network, and a page fits a phone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from browser import evaluate_in_page, needs_browser

pytest.importorskip("material", reason="the site is built with the extra `docs`")
ROOT = Path(__file__).parents[1]
SEARCH = """new Promise((found) => {
  const field = document.querySelector("[data-md-component=search-query]");
  const look = () => {
    field.focus();
    field.value = "entropy";
    field.dispatchEvent(new Event("keyup"));
    const links = [...document.querySelectorAll(".md-search-result__link")].map((link) => link.href);
    if (links.length) found(links); else setTimeout(look, 100);
  };
  look();
})"""
"""Types a word until results are there, and answers their addresses."""


@needs_browser
@pytest.mark.skipif(not (ROOT / "docs" / "results").exists(), reason="the source distribution has not all pages")
def test_the_site_searches_and_fits_a_phone(tmp_path: Path) -> None:
    site = tmp_path / "site"
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-d", str(site)], cwd=ROOT, env=environment, check=True)
    for width in (1280, 390):
        found = evaluate_in_page(site / "index.html", SEARCH, width=width, profile=tmp_path / "profile")
        pages = {link.removeprefix(f"{site.as_uri()}/").partition("?")[0] for link in found}
        assert {"pictures/index.html", "see/tokens.html"} <= pages
        assert "start/micro.html" not in pages  # it does not have the word
        assert all((site / page).is_file() for page in pages)
    wide = "document.documentElement.scrollWidth > window.innerWidth"
    for page in ("index.html", "reference/options.html", "reference/commands.html"):
        assert evaluate_in_page(site / page, wide, width=390, profile=tmp_path / "profile") is False, page
