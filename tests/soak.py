"""How many examples a property is tried on: few and always the same in the suite, many and new ones in `make soak`."""

from __future__ import annotations

import os

SOAK = int(os.environ.get("PRM_SEARCH_SOAK", "0"))  # 0: no soak; N: N times as many examples


def examples(count: int) -> int:
    """Examples to try where the suite tries `count`."""
    return count * max(1, SOAK)
