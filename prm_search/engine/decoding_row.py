"""DecodingRow: a child that the Decoder draws."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..drawing import Draw
from .kv_tree import Branch


@dataclass(eq=False)
class DecodingRow(Draw):
    """One child being drawn.

    Attributes:
        branches: for each step, its branch in each model.
        scored: for each step and model, the drawn tokens' log-probs.
        token: drawn, not encoded yet; None before the first.
    """

    branches: list[list[Branch]] = field(default_factory=list)
    scored: list[list[list[float]]] = field(default_factory=list)
    token: int | None = None
