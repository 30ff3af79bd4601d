"""A search tree as a scorer with texts of its own sees it: each node's path as ids, encoded once, read at its end."""

from __future__ import annotations

import codecs
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ...engine.kv_tree import Branch
from ...engine.language_model import LanguageModel
from ...tree import Node, SearchTree

Write = Callable[[Sequence[str]], list[int]]  # the texts of one or more steps -> the ids of the path


@dataclass(eq=False)
class ReadPath:
    """One path in the scorer's tokens; nodes that write the same share it.

    Attributes:
        ids: the whole path, prompt included.
        score: what was read at its end; None until then.
    """

    ids: tuple[int, ...]
    score: float | None = None


@dataclass(eq=False, kw_only=True)
class KVPath(ReadPath):
    """A path that branches of a KV tree hold.

    Attributes:
        branch: holds it.
        trunk: holds it but for the last token, where no later path keeps that; else the branch.
    """

    branch: Branch
    trunk: Branch


P = TypeVar("P", bound=ReadPath)


class Paths(Generic[P]):
    """The paths of one search tree.

    Args:
        tree: the search tree.
        write: see Write. Steps are stripped of white space; nodes of nothing else write what their parent writes.

    Attributes:
        too_long: nodes that keep a path for want of room.
    """

    def __init__(self, tree: SearchTree, write: Write) -> None:
        self._write = write
        # Whatever the first step is, its path begins so.
        begin = write(["a"])
        self._root = self._begin(tuple(begin[: _common(begin, write(["1"]))]))
        self._root.score = 0.0
        self._known: dict[tuple[int, ...], P] = {}
        self._paths: dict[Node, P] = {tree.root: self._root}
        self._texts: dict[Node, tuple[str, ...]] = {tree.root: ()}
        self.too_long: set[Node] = set()

    @abstractmethod
    def _begin(self, ids: tuple[int, ...]) -> P:
        """The path of the prompt alone."""

    @abstractmethod
    def _fork(self, above: P, ids: tuple[int, ...]) -> P:
        """A new path, which begins as another does."""

    def _release(self, path: P) -> None:  # of a path that holds nothing
        """Free what a path holds."""

    def of(self, node: Node) -> P:
        """Return a scored node's path."""
        return self._paths[node]

    def write(self, node: Node) -> list[int] | None:
        """Return the ids of a node's path, whose parent has one; None where it adds no text to it."""
        texts = tuple(text for part in step_texts(node) if (text := part.strip()))
        self._texts[node] = texts
        if node.parent is None or texts == self._texts[node.parent]:
            return None
        return self._write(texts)

    def whole(self, node: Node) -> list[int]:
        """Return the ids of a node's whole text, taken as one."""
        return self._write([node.path_text()])

    def keep(self, node: Node) -> P:
        """Give a node its parent's path."""
        path = self._paths[node] = self._paths[node.parent or node.tree.root]
        return path

    def grow(self, node: Node, ids: Sequence[int], after: Node | None = None) -> P:
        """Give a node the path of these ids: one that is known, or a fork where they leave the one of `after`.

        Args:
            node, ids: see above.
            after: a node that has a path; None for the parent.
        """
        key = tuple(ids)
        path = self._known.get(key)
        if path is None:
            path = self._known[key] = self._fork(self._paths[after or node.parent or node.tree.root], key)
        self._paths[node] = path
        return path

    def drop(self, nodes: Sequence[Node]) -> None:
        """Take back what nodes were given, their unread paths with it."""
        for node in reversed(nodes):
            path = self._paths.pop(node, None)
            self._texts.pop(node, None)
            self.too_long.discard(node)
            if path is not None and path.score is None and self._known.pop(path.ids, None) is not None:
                self._release(path)

    def free(self) -> None:
        """Forget everything."""
        for path in [*reversed(self._known.values()), self._root]:
            self._release(path)
        self._known.clear()
        self._paths.clear()
        self.too_long.clear()


class PathTree(Paths[KVPath]):
    """Paths that a LanguageModel's KV tree holds.

    Args:
        tree, write: see Paths.
        lm: encodes them.
        keeps_end: a path's last token stands in the paths of later steps too.
    """

    def __init__(self, tree: SearchTree, lm: LanguageModel, write: Write, *, keeps_end: bool = True) -> None:
        self._kv, self._meter, self._keeps_end = lm.tree, tree.meter, keeps_end
        super().__init__(tree, write)

    def _begin(self, ids: tuple[int, ...]) -> KVPath:
        root = self._kv.root(list(ids), self._meter)
        return KVPath(ids, branch=root, trunk=root)

    def _fork(self, above: KVPath, ids: tuple[int, ...]) -> KVPath:
        shared = min(_common(above.ids, ids), len(ids) - 1)
        below = above.trunk if shared <= above.trunk.length else above.branch
        if self._keeps_end:
            branch = trunk = self._kv.fork(below, ids[shared:], at=shared)
        else:
            trunk = self._kv.fork(below, ids[shared:-1], at=shared)
            branch = self._kv.fork(trunk, ids[-1:])
        return KVPath(ids, branch=branch, trunk=trunk)

    def _release(self, path: KVPath) -> None:
        self._kv.release(path.branch)
        self._kv.release(path.trunk)


class PlainPaths(Paths[ReadPath]):
    """Paths that some other place encodes, which is sent their ids."""

    def _begin(self, ids: tuple[int, ...]) -> ReadPath:
        return ReadPath(ids)

    def _fork(self, above: ReadPath, ids: tuple[int, ...]) -> ReadPath:
        return ReadPath(ids)


def read_ends(lm: LanguageModel, fresh: Sequence[tuple[Node, KVPath]]) -> torch.Tensor:
    """Encode paths and return [N, D], the hidden row at the end of each.

    Args:
        lm: encodes them.
        fresh: different paths, each with a node whose tree counts its tokens.
    """
    for node, path in fresh:
        above = path.trunk.parent
        node.tree.meter.add("cached", lm.id, path.trunk.start if above is not None and above.encoded else 0)
    rows = lm.extend([path.branch for _, path in fresh], [()] * len(fresh), want="hidden")
    if not isinstance(rows, torch.Tensor):
        raise TypeError("extend(want='hidden') gives rows")
    return rows


def step_texts(node: Node) -> list[str]:
    """Return the texts of a node's path, step by step; bytes of a character that is not complete wait for its rest."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(step.text_bytes) for step in node.path()]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)
