"""Log-probabilities of nodes under models: what memos know already is looked up, the rest is scored together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .language_model import LanguageModel

if TYPE_CHECKING:
    from ..tree import Node
    from .kv_tree import Branch
    from .pending import Pending


def node_logprobs(lm: LanguageModel, nodes: Sequence[Node]) -> list[np.ndarray]:
    """Log-probabilities of nodes' tokens under a model, encoding what is new in one packed forward.

    Args:
        lm: the model.
        nodes: nodes of any trees; their ancestors are scored with them.

    Returns:
        [T] fp32 (fp64 for an fp64 model) a node, nats.
    """
    return logprobs_under([lm], nodes)[lm]


def logprobs_under(lms: Iterable[LanguageModel], nodes: Sequence[Node]) -> dict[LanguageModel, list[np.ndarray]]:
    """`node_logprobs` under each of several models. All of their forwards are launched before any is waited for."""
    jobs: list[_Job] = []
    try:
        for lm in dict.fromkeys(lms):
            jobs.append(_Job(lm, nodes))
            jobs[-1].begin()
        return {job.lm: job.finish() for job in jobs}
    finally:
        for job in jobs:
            job.free()


class _Job:
    """Nodes under one model: what is known already, and what has to be scored."""

    def __init__(self, lm: LanguageModel, nodes: Sequence[Node]) -> None:
        self.lm, self._nodes = lm, nodes
        self._wanted: dict[Node, None] = {}
        self._spare: list[Branch] = []
        self._pending: Pending[list[np.ndarray]] | None = None
        unknown = [(lm.memo(node.tree), part) for node in nodes for part in node.path()]
        for memo, part in unknown:
            if part.sampler == lm.id and part.logprobs is not None and not memo.knows(part):
                memo.know(part, part.logprobs)  # the sampler's own: computed when the token was drawn
        for memo, part in unknown:
            if not memo.knows(part):
                self._wanted.setdefault(memo.first(part))

    def begin(self) -> None:
        """Launch the forward that scores what is not known."""
        todo = []
        for node in self._wanted:
            memo = self.lm.memo(node.tree)
            branch = memo.branch(node)
            if branch.seen:  # encoded as context, unscored: its rows are gone, so a copy is scored and dropped
                branch = self.lm.tree.fork(memo.branch(node.parent), node.token_ids)  # type: ignore[arg-type]
                branch.seen = len(node.token_ids)
                self._spare.append(branch)
            todo.append(branch)
            above = branch.parent
            node.tree.meter.add("cached", self.lm.id, branch.start if above is not None and above.encoded else 0)
        if todo:
            self._pending = self.lm.begin_score(todo)

    def finish(self) -> list[np.ndarray]:
        """Wait for it, memoise, and answer."""
        for node, values in zip(self._wanted, self._pending.result() if self._pending else (), strict=True):
            self.lm.memo(node.tree).know(node, values)
        return [self.lm.memo(node.tree).logprobs(node) for node in self._nodes]

    def free(self) -> None:
        """Drop the copies."""
        for branch in self._spare:
            self.lm.tree.release(branch)
