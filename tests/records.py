"""Files of JSON records: written, read, and compared where two runs made them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

TIMES = ("seconds", "forward_calls")  # what says how fast a run was


def parsed(text: str) -> list[dict[str, Any]]:
    """The records of a text, one a line."""
    return [json.loads(line) for line in text.splitlines()]


def lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return parsed(Path(path).read_text())


def write(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Make a file of records."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def untimed(record: Any) -> Any:
    """A record, or a list of them, without what says how fast it was made."""
    if isinstance(record, dict):
        return {name: untimed(value) for name, value in record.items() if name not in TIMES}
    return [untimed(each) for each in record] if isinstance(record, list) else record


def same(found: Any, expected: Any) -> bool:
    """Equal but for the last digits of numbers, which batches of another shape round otherwise."""
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=1e-4, abs=1e-5))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)
