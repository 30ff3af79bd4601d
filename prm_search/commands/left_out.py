"""Problems that failed while `prm-search tune` ran: kept in its folder, so that whoever goes on leaves them out too."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from ..files import parse_json
from . import BadInput
from .progress import Bar
from .records import Item
from .workers import Failures


class LeftOut:
    """The problems that failed, in this call or before.

    Configurations are compared on the same problems, so one that fails under any of them is left out for all, and stays
    so: choices that were made without it would not hold.

    Args:
        path: of the file that keeps them.
        parts: file of records -> its problems.

    Raises:
        BadInput: the file is damaged.
    """

    def __init__(self, path: Path, parts: dict[str, list[Item]]) -> None:
        self._path, self._parts = path, parts
        self._reasons: dict[str, dict[int, str]] = {name: {} for name in parts}
        self._failures: dict[str, Failures] = {}
        if path.exists():
            try:
                kept = parse_json(path.read_bytes(), str(path))
                for name, reasons in self._reasons.items():
                    reasons |= {int(place): str(reason) for place, reason in kept.get(name, {}).items()}
            except (ValueError, AttributeError) as error:
                raise BadInput(f"{path}: not what this command wrote") from error

    def places(self, name: str) -> set[int]:
        """The places of those of one file, as they are now."""
        return set(self._reasons[name])

    def taker(self, name: str, bar: Bar) -> Callable[[int, str], None]:
        """A function that takes note of a problem's place and the reason, and says so beside the bar."""
        failures = self._failures.setdefault(name, Failures(self._parts[name], bar))

        def take(place: int, reason: str) -> None:
            failures.lost(place, reason)
            self._reasons[name][place] = reason
            beside = self._path.with_name(f"{self._path.name}.new")
            beside.write_text(json.dumps(self._reasons, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, self._path)

        return take

    def about(self) -> dict[str, str]:
        """As a report says it; empty where there are none."""
        names = [self._parts[name][place].where for name in self._parts for place in sorted(self._reasons[name])]
        return {"left out, since they failed": "; ".join(names)} if names else {}

    def check(self) -> None:
        """Raises BadInput where some failed in this call."""
        names = [where for failures in self._failures.values() for where in failures.names]
        if names:
            total = sum(map(len, self._parts.values()))
            raise BadInput(f"{len(names)} of {total} failed and were left out: {'; '.join(names)}")
