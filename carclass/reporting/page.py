"""What every HTML page of the project has in common: one file, no network, readable in light, dark and on paper.

A page is a Jinja template that extends `page.html.j2`: it sets `sections` (id → name, the links at the top) and
fills the blocks `main` and, where it needs them, `style` and `script`. `page_parts.html.j2` holds shared pieces.
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from carclass.formatting import percent_text


def render(template: Path, *, title: str, facts: Sequence[tuple[str, str]], **values: Any) -> str:
    """Return the template's page as one HTML document.

    facts: (name, value) pairs shown under the title; values: what the template itself uses. Text from data is
    escaped, and the page's content policy lets nothing load and nothing run but the page's own script.
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
    assert photo[:2] == b"\xff\xd8", f"not a JPEG file: it starts with {photo[:4]!r}"
    return f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"


def _script_hash(script: str) -> str:
    """What a Content-Security-Policy calls a script by, so that no other script in the page runs."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}" if script else "none"


def _decimal(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}"


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent_text,
    "number": "{:,}".format,
    "decimal": _decimal,
    "jpeg": _jpeg_uri,
    "script_hash": _script_hash,
}
