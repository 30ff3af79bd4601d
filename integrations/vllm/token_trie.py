"""Known facts of one search tree under one engine: the log-probability of every token of its responses. No torch.

Kept token by token, not node by node: siblings that begin alike share these tokens' log-probabilities as they share
their KV, and what is asked of an engine begins where a response is new. So within a tree no request finds more in the
prefix cache than its own beginning, which is what makes reading that cache safe (see asking.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prm_search.tree import Node, SearchTree


class Entry:
    """A token at its place.

    Attributes:
        logprob: nats, given all before it; None until known.
        after: the tokens that follow it.
    """

    __slots__ = ("after", "logprob")

    def __init__(self) -> None:
        self.logprob: float | None = None
        self.after: dict[int, Entry] = {}


class TokenTrie:
    """The tokens of a tree.

    Args:
        tree: whose nodes will be asked about.
    """

    def __init__(self, tree: SearchTree) -> None:
        self._tokens: dict[Node, list[Entry]] = {tree.root: [Entry()]}

    def entries(self, node: Node) -> list[Entry]:
        """One a token of the node; made where there are none yet."""
        if node.parent is None:
            return []
        entries = self._tokens.get(node)
        if entries is None:
            self.entries(node.parent)
            last = self._tokens[node.parent][-1]
            entries = []
            for token in node.token_ids:
                last = last.after.setdefault(token, Entry())
                entries.append(last)
            self._tokens[node] = entries
        return entries

    def know(self, node: Node, logprobs: Sequence[float] | np.ndarray) -> None:
        """Record log-probabilities of a node's tokens, [T] nats; what is known already stays."""
        for entry, value in zip(self.entries(node), logprobs, strict=True):
            if entry.logprob is None:
                entry.logprob = float(value)

    def logprobs(self, node: Node) -> np.ndarray:
        """[T] float32, nats. Raises KeyError where one is not known."""
        values = [entry.logprob for entry in self.entries(node)]
        if None in values:
            raise KeyError(node)
        return np.array(values, np.float32)
