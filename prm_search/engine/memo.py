"""The memo of one LanguageModel about one search tree: nodes -> branches, and their log-probabilities.

It knows no model; `node_logprobs.py` fills it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .kv_tree import Branch, KVTree

if TYPE_CHECKING:
    from ..tree import Node, SearchTree


class Memo:
    """Made by LanguageModel.memo and freed by LanguageModel.release.

    A node's log-probs are computed once and never again, whatever happens to its KV; sampler and scorer that run
    the same weights share one memo. Twins, nodes with equal tokens below parents that are one or twins themselves,
    share log-probs and KV whichever requests drew them: the nodes stay apart, what is known of them is one.

    It does not hold the LanguageModel that holds it: with its last user a model goes at once, and with it the KV of
    trees that were never released.

    Args:
        kv: where the branches are made.
        tree: whose nodes.
    """

    def __init__(self, kv: KVTree, tree: SearchTree) -> None:
        self._kv = kv
        self._first: dict[Node, Node] = {tree.root: tree.root}
        self._twins: dict[tuple[Node, tuple[int, ...]], Node] = {}  # (first of the parent, tokens) -> first
        self._logprobs: dict[Node, np.ndarray] = {}  # of first nodes, as the branches
        self._branches: dict[Node, Branch] = {tree.root: kv.root(tree.prompt_ids, tree.meter)}

    def first(self, node: Node) -> Node:
        """The first node met of a node and its twins."""
        chain = []
        while node not in self._first:
            chain.append(node)
            node = node.parent  # type: ignore[assignment]  # the root is known
        first = self._first[node]
        for below in reversed(chain):
            first = self._first[below] = self._twins.setdefault((first, below.token_ids), below)
        return first

    def branch(self, node: Node) -> Branch:
        """The branch whose path ends with the node; made (unencoded) where there is none yet."""
        chain = []
        above = self.first(node)
        while above not in self._branches:
            chain.append(above)
            above = self.first(above.parent)  # type: ignore[arg-type]  # the root always has a branch
        branch = self._branches[above]
        for below in reversed(chain):
            branch = self._branches[below] = self._kv.fork(branch, below.token_ids)
        return branch

    def adopt(self, node: Node, branch: Branch, logprobs: np.ndarray | None = None) -> None:
        """Take over a branch that already holds the node's tokens (some encoded), and its log-probs if known."""
        first = self.first(node)
        if self._branches.setdefault(first, branch) is not branch:
            self._kv.release(branch)
        if logprobs is not None:
            self._logprobs.setdefault(first, logprobs)

    def knows(self, node: Node) -> bool:
        """Return True if the node's log-probs are known here."""
        return self.first(node) in self._logprobs

    def know(self, node: Node, logprobs: np.ndarray) -> None:
        """Record a node's log-probs, [T] nats."""
        self._logprobs[self.first(node)] = logprobs

    def logprobs(self, node: Node) -> np.ndarray:
        """A node's log-probs, [T] nats; empty for the root. Raises KeyError where they are not known."""
        return np.zeros(0, np.float32) if node.parent is None else self._logprobs[self.first(node)]

    def free(self) -> None:
        """Release every branch."""
        for branch in self._branches.values():
            self._kv.release(branch)
        for known in (self._branches, self._logprobs, self._twins, self._first):
            known.clear()
