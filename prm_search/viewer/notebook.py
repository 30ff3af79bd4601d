"""A result as a notebook shows it: the answer in plain HTML, and the tree in a frame of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .page import view_page
from .page_tree import PageTree

MOST = 5_000  # steps; a notebook keeps the page with the cell
LONGEST = 2_000  # characters of the answer's text


def notebook_html(page_tree: PageTree, text: str, facts: Sequence[tuple[str, str]]) -> str:
    """HTML for a notebook's cell. Where a notebook strips frames, the text above stays.

    Args:
        page_tree: the tree.
        text: the chosen response.
        facts: (name, text) beside it.
    """
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    words = " &middot; ".join(f"{escape(name)} <b>{escape(_visible(value))}</b>" for name, value in facts)
    head = f'<div><pre style="white-space: pre-wrap" dir="auto">{escape(_visible(shown))}</pre><p>{words}</p></div>'
    steps = len(page_tree.steps)
    if steps > MOST:
        return f"{head}<p>The tree has {steps:,} steps: save <code>tree.to_json()</code>, then prm-search view.</p>"
    source = escape(view_page("Search tree", [page_tree]), quote=True)
    return (
        f'{head}<iframe title="Search tree" sandbox="allow-scripts" srcdoc="{source}" '
        'style="width: 100%; height: 30rem; border: 1px solid #8886; border-radius: 8px"></iframe>'
    )


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
