"""What one LanguageModel knows of one search tree: nodes -> branches, and their log-probabilities.

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
    the same weights share one memo.

    It does not hold the LanguageModel that holds it: with its last user a model goes at once, and with it the KV of
    trees that were never released.

    Args:
        kv: where the branches are made.
        tree: whose nodes.
    """

    def __init__(self, kv: KVTree, tree: SearchTree) -> None:
        self._kv = kv
        self.logprobs: dict[Node, np.ndarray] = {}
        self._branches: dict[Node, Branch] = {tree.root: kv.root(tree.prompt_ids, tree.meter)}

    def branch(self, node: Node) -> Branch:
        """The branch whose path ends with the node; made (unencoded) where there is none yet."""
        chain = []
        above: Node = node
        while above not in self._branches:
            chain.append(above)
            above = above.parent  # type: ignore[assignment]  # the root always has a branch
        branch = self._branches[above]
        for below in reversed(chain):
            branch = self._branches[below] = self._kv.fork(branch, below.token_ids)
        return branch

    def adopt(self, node: Node, branch: Branch, logprobs: np.ndarray | None = None) -> None:
        """Take over a branch that already holds the node's tokens (some encoded), and its log-probs if known."""
        if node in self._branches:
            if self._branches[node] is not branch:
                self._kv.release(branch)
        else:
            self._branches[node] = branch
        if logprobs is not None and node not in self.logprobs:
            self.logprobs[node] = logprobs

    def knows(self, node: Node) -> bool:
        """Whether the node's log-probs are known here."""
        return node in self.logprobs

    def free(self) -> None:
        """Release every branch."""
        for branch in self._branches.values():
            self._kv.release(branch)
        self._branches.clear()
        self.logprobs.clear()
