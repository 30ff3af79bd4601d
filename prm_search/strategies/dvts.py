"""Diverse verifier tree search: a beam search split into independent ones."""

from __future__ import annotations

from dataclasses import dataclass

from ..tree import Node
from ..values import Value
from .base import Parallel, Run, at_least, distinct
from .beam import Beam


@dataclass(frozen=True)
class DVTS:
    """`subtrees` beam searches of one prompt that never compete with each other, for answers that differ.

    As in huggingface/search-and-learn, where it is step beam search over a partition of the beams. Every
    subtree draws its own first steps; what is left of a token or node budget is split evenly between them.

    Args:
        subtrees: independent searches.
        width, expansions, per_parent, merge, value: of each, as in Beam.

    Raises:
        ValueError: a number is below 1, or no value has this name.
    """

    subtrees: int = 4
    width: int = 1
    expansions: int = 4
    per_parent: int | None = None
    merge: bool = True
    value: Value | str | None = None

    def __post_init__(self) -> None:
        at_least("subtrees", self.subtrees)
        self._beam()

    def _beam(self) -> Beam:
        return Beam(self.width, self.expansions, self.per_parent, self.merge, self.value)

    def run(self, root: Node) -> Run:
        subtree_candidates = yield Parallel([self._beam().run(root) for _ in range(self.subtrees)])
        return distinct([node for candidates in subtree_candidates for node in candidates])
