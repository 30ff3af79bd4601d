"""Prompts that many requests share: what two begin with in common is encoded once, and freed with its last user.

For requests that come and go one by one, as in a server. A search knows its prompts beforehand and uses a memo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..usage import Meter
from .kv_tree import Branch, KVTree

SHARED_AT_LEAST = 16  # tokens in common from which a fork is worth the token that it encodes again


@dataclass(eq=False)
class _Prompt:
    branch: Branch
    ids: np.ndarray
    users: int = 0


class SharedPrompts:
    """The prompts in use in one KVTree, as branches that requests go on from.

    Args:
        tree: where the branches are made. Nothing is encoded here: a prompt is when the first branch behind it is.
        meter: where their tokens are counted.
    """

    def __init__(self, tree: KVTree, meter: Meter | None = None) -> None:
        self._tree = tree
        self._meter = meter
        self._known: dict[tuple[int, ...], _Prompt] = {}

    def __len__(self) -> int:
        return len(self._known)

    def open(self, ids: tuple[int, ...]) -> Branch:
        """An empty branch behind a prompt of at least one token."""
        prompt = self._known.get(ids)
        if prompt is None:
            prompt = self._known[ids] = self._make(ids)
        prompt.users += 1
        return self._tree.fork(prompt.branch)

    def close(self, branch: Branch, ids: tuple[int, ...]) -> None:
        """Free a branch that `open` gave for this prompt, and the prompt with its last one."""
        self._tree.release(branch)
        prompt = self._known[ids]
        prompt.users -= 1
        if not prompt.users:
            del self._known[ids]
            self._tree.release(prompt.branch)  # what others forked from it stays until they go

    def _make(self, ids: Sequence[int]) -> _Prompt:
        own = np.asarray(ids, np.int64)
        shared, above = 0, None
        for other in self._known.values():
            same = _common(own, other.ids)
            if same > shared:
                shared, above = same, other.branch
        if above is None or shared < SHARED_AT_LEAST:
            return _Prompt(self._tree.root(ids, self._meter), own)
        return _Prompt(self._tree.fork(above, ids[shared:], at=shared), own)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that both begin with."""
    length = min(len(a), len(b))
    if a[0] != b[0]:
        return 0
    differ = a[:length] != b[:length]
    first = int(differ.argmax())
    return first if differ[first] else length
