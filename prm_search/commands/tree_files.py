"""Files that hold search trees: JSON Lines, or one tree as SearchTree.to_json with an indent writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import Distinct, parse_json
from .records import json_lines


def tree_records_of(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a file, each with what to call it.

    Args:
        path: JSON Lines, or a file that is one object; "-" is standard input, JSON Lines.

    Raises:
        BadInput: the file cannot be read, or a line is no JSON object.
        ValueError: a record stands in it twice.
    """
    whole, once = _whole(path), Distinct()
    for where, record in [(path, whole)] if whole is not None else json_lines(path):
        once.add(where, record)
        yield where, record


def _whole(path: str) -> Mapping[str, Any] | None:
    """The one object that a file holds; None for JSON Lines."""
    if path == "-" or path.endswith(".jsonl"):
        return None
    try:
        record = parse_json(Path(path).read_text(encoding="utf-8-sig"), path)
    except (OSError, ValueError):
        return None  # the lines say what is wrong
    return record if isinstance(record, dict) else None
