"""All pages: one style, self-contained, and nothing but our own templates is ever markup."""

from pathlib import Path
from typing import Any

import jinja2


def render_page(template: str, **values: Any) -> str:
    """A template of this folder as HTML. Every value is escaped: texts of models and data are not to be trusted."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)
