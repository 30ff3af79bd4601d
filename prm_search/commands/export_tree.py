"""``prm-search export-tree``: search trees as training records."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import one_writer
from ..training.trees import NODES, tree_records
from ..tree import Prompt, SearchTree
from . import BadInput, groups, options
from .config import Common
from .grouped import grouped
from .records import Item, dumps, reason
from .rollout import summary
from .tree_files import tree_records_of


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The exported kind of records. Raises BadInput for an unknown kind of nodes."""

    out: Annotated[str, typer.Option(help="Write JSON Lines here.", rich_help_panel=options.OUTPUT)]
    nodes: Annotated[
        str,
        typer.Option(
            help="ends: whole responses, which train reads; all: the path to every node.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = "ends"

    def __post_init__(self) -> None:
        options.one_of("--nodes", self.nodes, NODES)


@dataclass(frozen=True, kw_only=True)
class Answers(groups.Questions):
    """The problems, which are found by their prompts."""

    data: Annotated[
        str | None,
        typer.Option(help="The problems with their answers. Without: no labels.", rich_help_panel=options.DATA),
    ] = None


@grouped
def export_tree(
    trees: Annotated[
        list[str],
        typer.Argument(help="What prm-search generate --tree --out wrote, or trees of SearchTree.to_json."),
    ],
    exported: Exported,
    problems: Answers,
    labels: groups.Labels,
    common: Common,
) -> None:
    """Turn search trees into training records: responses with labels and per-step values."""
    out, data, nodes = exported.out, problems.data, exported.nodes
    judge = None if data is None else labels.judge()
    answers = {} if data is None else {_asked(item.prompt): item for item in problems.problems(data)}
    labelled: list[dict[str, Any]] = []
    try:
        with one_writer(out):
            count = _write(Path(out), trees, data, answers, judge, nodes, labelled)
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written: {reason(error)}") from error
    print(summary(labelled) if data is not None else f"{count} records, without labels", file=sys.stderr)


def _write(
    out: Path,
    trees: list[str],
    data: str | None,
    answers: Mapping[str, Item],
    judge: Any,
    nodes: str,
    labelled: list[Any],
) -> int:
    """Write the records of all trees, the file whole or not at all. Returns their number; labels go to `labelled`."""
    if out.exists():
        raise BadInput(f"{out} exists: name another file")
    part, count = Path(f"{out}.part"), 0
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for problem, (where, tree, extra) in enumerate(_trees(trees)):
                item = answers.get(_asked(tree.prompt))
                if data is not None and item is None:
                    raise BadInput(f"{where}: no problem of {data} has this tree's prompt")
                known = None if item is None else str(item.response)
                for sample, record in enumerate(_records(where, tree, known, judge, nodes)):
                    head = {"index": count, **extra, "problem": problem, "sample": sample}
                    file.write(dumps(head | record) + "\n")
                    count += 1
                    if "label" in record:
                        labelled.append({"problem": problem, "label": record["label"], "finish": record["finish"]})
        if not count:
            raise BadInput(f"{', '.join(trees)}: no tree has a whole response")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return count


def _records(where: str, tree: SearchTree, answer: str | None, judge: Any, nodes: str) -> Iterator[dict[str, Any]]:
    try:
        return tree_records(tree, answer, judge, nodes)
    except ValueError as error:
        raise BadInput(f"{where}: {reason(error)}") from error


def _trees(paths: list[str]) -> Iterator[tuple[str, SearchTree, dict[str, Any]]]:
    """Trees with what to call them, and the id of the prompt."""
    for path in paths:
        for where, record in tree_records_of(path):
            tree = record.get("tree", record)
            if not isinstance(tree, dict) or "nodes" not in tree:
                raise BadInput(f'{where}: there is no "tree": was it generated with --tree?')
            try:
                search_tree = SearchTree.from_json(json.dumps(tree))
            except ValueError as error:
                raise BadInput(f"{where}: {reason(error)}") from error
            yield where, search_tree, {"id": record["id"]} if "id" in record else {}


def _asked(prompt: Prompt) -> str:
    """A prompt's name: what was asked, and not the token ids that a policy made of it."""
    if prompt.messages is not None:
        return json.dumps([dict(message) for message in prompt.messages], sort_keys=True)
    return json.dumps(prompt.text if prompt.text is not None else list(prompt.token_ids or ()))
