"""REBASE: reward-balanced search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import flag, number
from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, Run, at_least, distinct
from .beam import value_of


@dataclass(frozen=True)
class Rebase:
    """Spread a width over the open prefixes in proportion to the softmax of their values.

    At each depth the open prefixes, best first, get ceil(W * e_i / sum of the e_j not served yet) children each, with
    e_i = exp(v_i / temperature) and W the rest of the width. A finished answer takes 1 off the width for good.
    Source: Y. Wu et al., "Inference Scaling Laws" (arXiv 2408.00724), and its released code, thu-wyz/inference_scaling,
    whose values are step scores in [0, 1] (`value="last"`) and whose answers vote by weight.

    Args:
        width: answers looked for.
        temperature: > 0, in the unit of the values.
        merge: count equal children on one node.
        value: what balances; None for what the search ranks by.

    Raises:
        ValueError: a number is out of range, or no value has this name.
        TypeError: a number is of another type.
    """

    width: int = 16
    temperature: float = 0.2
    merge: bool = True
    value: Value | str | None = None

    def __post_init__(self) -> None:
        flag("merge", self.merge)
        at_least("width", self.width)
        number("temperature", self.temperature, "a finite number > 0", lambda value: 0 < value < math.inf)
        if self.value is not None:
            resolve_value(self.value)

    def run(self, root: Node) -> Run:
        finished: list[Node] = []
        drawn = yield Expand([root], self.width, merge=self.merge, alive=[root])
        while True:
            finished += [node for node in drawn if node.finished]
            live = sorted((node for node in drawn if not node.finished), key=lambda node: -value_of(node))
            width = self.width - len(finished)
            if not live or width < 1:
                break
            numbers = balance([value_of(node) for node in live], width, self.temperature)
            kept = [(node, n) for node, n in zip(live, numbers, strict=True) if n]
            nodes = [node for node, _ in kept]
            drawn = yield Expand(nodes, [n for _, n in kept], merge=self.merge, alive=nodes)
        return distinct(finished)


def balance(values: Sequence[float], width: int, temperature: float) -> list[int]:
    """Share a width between falling values, the larger first; see Rebase. Returns one number >= 0 a value."""
    top = values[0]
    shares = [1.0 if value == top else math.exp((value - top) / temperature) for value in values]
    rest = math.fsum(shares)
    numbers: list[int] = []
    for share in shares:
        # The tolerance keeps a quotient that is whole but for rounding from one child more.
        n = min(width, math.ceil(width * share / rest - 1e-9)) if rest > 0 else 0
        numbers.append(n)
        width -= n
        rest -= share
    return numbers
