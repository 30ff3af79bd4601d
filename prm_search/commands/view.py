"""``prm-search view``: search trees as a page to look at."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..viewer.page import view_page
from ..viewer.page_tree import FOLDED, PageTree
from .config import Common
from .grouped import grouped
from .options import OUTPUT
from .records import writable, write_text
from .view_records import page_trees


@grouped
def view(
    trees: Annotated[
        list[str],
        typer.Argument(help="Trees (SearchTree.to_json), or results of generate --tree, eval --html or score."),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Write the page here.", rich_help_panel=OUTPUT)],
    common: Common,
    title: Annotated[
        str | None, typer.Option(help="Of the page. Default: the files' names.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Make a page of search trees: one file to look at in a browser, also without a network."""
    writable("--out", out)
    made = list(page_trees(trees))
    names = ", ".join("standard input" if name == "-" else Path(name).name for name in trees)
    write_page("--out", out, title or names, made)


def write_page(option: str, path: str, title: str, trees: Sequence[PageTree], notes: Sequence[str] = ()) -> None:
    """Write the page of some trees, and say on standard error what is not shown as it stands.

    Args:
        option: what names the file on the command line.
        path: the file.
        title: of the page.
        trees: at least one.
        notes: sentences for its reader.

    Raises:
        BadInput: it cannot be written.
    """
    strange = sum(tree.strange for tree in trees)
    if strange:
        steps = "1 step has" if strange == 1 else f"{strange:,} steps have"
        notes = [*notes, f"{steps} a reward that is NaN or infinite: hatched, and without a colour."]
    large = [tree for tree in trees if len(tree.steps) >= FOLDED]
    if large:
        most = max(len(tree.steps) for tree in large)
        which = "a tree" if len(large) == 1 else f"{len(large)} trees"
        notes = [*notes, f"{which} of up to {most:,} steps: opens folded to the chosen path."]
    write_text(option, path, view_page(title, trees, notes))
    for note in notes:
        print(f"prm-search: {note}", file=sys.stderr)
    print(f"{path}: {len(trees)} {'tree' if len(trees) == 1 else 'trees'}", file=sys.stderr)
