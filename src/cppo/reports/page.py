"""Shared style of all pages; they are self-contained, and only our own templates are markup."""

from pathlib import Path
from typing import Any

import jinja2


def render_page(template: str, **values: Any) -> str:
    """A template of this folder as HTML. Every value is escaped: texts of models and data are not trusted."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)
