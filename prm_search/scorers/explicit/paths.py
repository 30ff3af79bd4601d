"""A search tree as a scorer with texts of its own sees it: each node's path as ids, encoded once, read at its end."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        branch: holds them.
        trunk: holds them but for the last one, where no later path keeps that; else the branch.
        score: what was read at its end; None until then.
    """

    ids: tuple[int, ...]
    branch: Branch
    trunk: Branch
    score: float | None = None


class PathTree:
    """The paths of one search tree.

    Args:
        tree: the search tree.
        lm: encodes them.
        write: see Write. Steps are stripped of white space; nodes of nothing else write what their parent writes.
        keeps_end: a path's last token stands in the paths of later steps too.
    """

    def __init__(self, tree: SearchTree, lm: LanguageModel, write: Write, *, keeps_end: bool = True) -> None:
        self._lm = lm
        self._write = write
        self._keeps_end = keeps_end
        # Whatever the first step is, its path begins so.
        begin = write(["a"])
        begin = begin[: _common(begin, write(["1"]))]
        root = lm.tree.root(begin, tree.meter)
        self._root = ReadPath(tuple(begin), root, root, 0.0)
        self._known: dict[tuple[int, ...], ReadPath] = {}
        self._paths: dict[Node, ReadPath] = {tree.root: self._root}
        self._texts: dict[Node, tuple[str, ...]] = {tree.root: ()}

    def of(self, node: Node) -> ReadPath:
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

    def keep(self, node: Node) -> ReadPath:
        """Give a node its parent's path."""
        path = self._paths[node] = self._paths[node.parent or node.tree.root]
        return path

    def grow(self, node: Node, ids: Sequence[int], after: Node | None = None) -> ReadPath:
        """Give a node the path of these ids: one that is known, or a fork where they leave the one of `after`.

        Args:
            node, ids: see above.
            after: a node that has a path; None for the parent.
        """
        key = tuple(ids)
        path = self._known.get(key)
        if path is None:
            above = self._paths[after or node.parent or node.tree.root]
            shared = min(_common(above.ids, key), len(key) - 1)
            fork = self._lm.tree.fork
            below = above.trunk if shared <= above.trunk.length else above.branch
            if self._keeps_end:
                branch = trunk = fork(below, key[shared:], at=shared)
            else:
                trunk = fork(below, key[shared:-1], at=shared)
                branch = fork(trunk, key[-1:])
            path = self._known[key] = ReadPath(key, branch, trunk)
        self._paths[node] = path
        return path

    def drop(self, nodes: Sequence[Node]) -> None:
        """Take back what nodes were given, their unread paths with it."""
        for node in reversed(nodes):
            path = self._paths.pop(node, None)
            self._texts.pop(node, None)
            if path is not None and path.score is None and self._known.pop(path.ids, None) is not None:
                self._release(path)

    def _release(self, path: ReadPath) -> None:
        self._lm.tree.release(path.branch)
        self._lm.tree.release(path.trunk)

    def free(self) -> None:
        """Forget everything."""
        for path in [*reversed(self._known.values()), self._root]:
            self._release(path)
        self._known.clear()
        self._paths.clear()


def read_ends(lm: LanguageModel, fresh: Sequence[tuple[Node, ReadPath]]) -> torch.Tensor:
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
