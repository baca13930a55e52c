"""Loaded results as notebooks show them."""

from collections.abc import Sequence

from markupsafe import Markup


def facts_html(title: str, facts: Sequence[tuple[str, str]]) -> str:
    """Return a title and a table of (name, value) pairs as HTML; text is escaped."""
    row = Markup('<tr><th style="text-align: left">{}</th><td style="text-align: left">{}</td></tr>')
    rows = Markup("").join(row.format(name, value) for name, value in facts)
    return str(Markup("<b>{}</b><table>{}</table>").format(title, rows))
