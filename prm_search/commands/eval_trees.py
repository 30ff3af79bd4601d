"""The search trees of `prm-search eval --html`, shown on one page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.plan import Unit
from ..viewer.page_tree import PageTree, costs_of
from . import BadInput
from .records import finished
from .view import write_page
from .view_records import page_tree, step_record

if TYPE_CHECKING:
    from ..driver.result import Result

TREES = "trees.jsonl"
MOST = 50_000  # steps of one page; what a browser opens at once
SAMPLES = "The samples that the votes choose among; each vote's choice is in records.jsonl."


def trees_page(folder: Path, html: str, title: str, expected: int) -> None:
    """Write the page of a folder's trees, problem by problem, as many as one page takes.

    Args:
        folder: of the evaluation.
        html: the page's file.
        title: of the page.
        expected: trees of the whole run.

    Raises:
        BadInput: the folder keeps no trees, or the page cannot be written.
    """
    path = folder / TREES
    if not path.exists():
        raise BadInput(f"--html: {path} does not exist: the evaluation ran without --html and kept no trees")
    records = sorted(finished(path), key=lambda record: (record["problem"], record["index"]))
    trees: list[PageTree] = []
    steps = 0
    for record in records:
        tree = page_tree(record, f"{path}, index {record['index']}", str(record["title"]))
        steps += len(tree.steps)
        if trees and steps > MOST:
            break
        trees.append(tree)
    notes = []
    if len(trees) < len(records):
        notes.append(f"the first {len(trees):,} of {len(records):,} trees: prm-search view shows others of {TREES}.")
    if len(records) < expected:
        notes.append(f"{len(records):,} of {expected:,} searches kept their trees: the others ran without --html.")
    write_page("--html", html, title, trees, notes)


def tree_record(unit: Unit, result: Result) -> dict[str, Any]:
    """A search as `view` reads it."""
    if unit.cell is None:
        what = "samples" if unit.kind == "samples" else "greedy"
    else:
        what = f"{unit.cell.title(with_pair=True)}, N = {unit.cell.n}"
    seed = "" if unit.seed is None else f", seed {unit.seed}"
    samples = unit.kind == "samples"
    tree = json.loads(result.tree.to_json())
    if samples:
        tree["notes"].append(SAMPLES)
    return {
        **asdict(unit),
        "title": f"problem {unit.problem}: {what}{seed}",
        "stopped": result.stopped,
        "steps": [] if samples or result.node is None else [step_record(node) for node in result.node.path()],
        **costs_of(result.usage),
        "tree": tree,
    }
