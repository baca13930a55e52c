"""Self-contained HTML pages for light, dark and print.

A page is a Jinja template that extends `page.html.j2`: it sets `sections` (id → name, the links at the top) and
fills the block `main` and optionally `style` and `script`. `page_parts.html.j2` holds shared macros.
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from carclass.formatting import percent_text, rate_text


def render(template: Path, *, title: str, facts: Sequence[tuple[str, str]], **values: Any) -> str:
    """Render a template as one HTML document.

    facts: (name, value) pairs shown under the title; values: variables of the template. Text from data is escaped, and
    the page's Content-Security-Policy blocks all loading and every script except the page's own.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template(template.name).render(title=title, facts=facts, **values)


def _jpeg_uri(photo: bytes) -> str:
    """Return a JPEG file as a data URI."""
    assert photo[:2] == b"\xff\xd8", f"not a JPEG file: it starts with {photo[:4]!r}"
    return f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"


def _script_hash(script: str) -> str:
    """Return the source expression of a script for a Content-Security-Policy, or `none` without a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}" if script else "none"


def _decimal(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}"


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent_text,
    "number": "{:,}".format,
    "decimal": _decimal,
    "rate": rate_text,
    "jpeg": _jpeg_uri,
    "script_hash": _script_hash,
}
