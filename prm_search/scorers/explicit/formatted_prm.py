"""FormattedPRM: the part of a step PRM that needs no model: its format, its questions, its paths."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal

import numpy as np

from ...tree import Node, Prompt, SearchTree
from .formats import FORMATS, PRMFormat
from .layouts import Spelling
from .paths import P, Paths, Write
from .questions import question_of
from .text_scorer import TextScorer

TooLong = Literal["error", "keep"]


class FormattedPRM(TextScorer, Generic[P]):
    """A step PRM's format, without a model that reads it.

    Args:
        tokenizer: the PRM's.
        format: a name of `FORMATS`, or a PRMFormat.
        name: key of the scores in Node.rewards.
        too_long: see StepPRM.

    Attributes:
        format: the PRMFormat.
        default_value: the value that its authors judge answers by.
        too_long: as given.

    Raises:
        TypeError: format is neither a name nor a PRMFormat.
        ValueError: the format or too_long is unknown, or the tokenizer lacks what the format needs.
    """

    kind = "step PRM"

    def __init__(self, tokenizer: Any, *, format: str | PRMFormat, name: str, too_long: TooLong) -> None:
        super().__init__(name, tokenizer)
        if too_long not in ("error", "keep"):
            raise ValueError(f"too_long={too_long!r}: it is 'error' or 'keep'")
        self.format = resolve_format(format)
        self.default_value = self.format.aggregate
        self.reward_range = self.format.low, self.format.high
        self.too_long: TooLong = too_long
        with self._of_format():
            self.format.layout.check(self.need_tokenizer())
        marker = getattr(self.format.layout, "marker", "")
        self._spelling = Spelling(tokenizer, [marker] if marker else [])
        self._trees: weakref.WeakKeyDictionary[SearchTree, Paths[P]] = weakref.WeakKeyDictionary()

    @contextmanager
    def _of_format(self) -> Iterator[None]:
        """Let an error name the format."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"format={self.format.name!r}: {error}") from error

    # --- scoring -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _make_paths(self, tree: SearchTree, write: Write) -> Paths[P]:
        """Paths of a search tree that is new here."""

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise ValueError where a prompt is given only as token ids, or leaves no room for a step."""
        question = question_of(self.name, prompt, self._spelling.plain)
        tokens = len(self.format.layout.ids(self.tokenizer, question, ["a"]))
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"the prompt has {tokens} tokens with one step in the format of {self.name!r}, which reads at most "
                f"{self.context}"
            )

    @contextmanager
    def _scoring(self, nodes: Sequence[Node]) -> Iterator[dict[P, Node]]:
        """Give nodes and unscored ancestors of theirs their paths, and set the scores after the block.

        Yields:
            Paths without a score, each with a node whose tree counts its tokens; the block has to give each its score
            by `_settle`. Where it raises, all is as it was.

        Raises:
            ValueError: a prompt is given only as token ids, or a path exceeds the PRM's length.
        """
        todo = self.unscored(nodes)
        fresh: dict[P, Node] = {}
        grown: list[Node] = []
        try:
            for node in todo:
                grown.append(node)
                path = self._grow(node)
                if path.score is None:
                    fresh.setdefault(path, node)
            yield fresh
        except BaseException:
            for node in grown:
                if node.tree in self._trees:
                    self._trees[node.tree].drop([node])
            raise
        for node in todo:
            if not node.scored_by(self.name):  # on an event loop another call may have been faster
                self.set_step_reward(node, self._tree(node.tree).of(node).score or 0.0)

    def _settle(self, fresh: dict[P, Node], scores: Sequence[float] | np.ndarray) -> None:
        """Give paths their scores. Raises ValueError where one is not a number."""
        if np.isnan(np.asarray(scores, np.float64)).any():
            raise ValueError(f"{next(iter(self.models.values()))} gives scores that are not numbers")
        for path, score in zip(fresh, scores, strict=True):
            path.score = float(score)

    def _grow(self, node: Node) -> P:
        paths = self._tree(node.tree)
        ids = paths.write(node)
        if ids is None:
            return paths.keep(node)
        limit = self.context
        if limit is not None and len(ids) > limit:
            if self.too_long == "error":
                raise ValueError(
                    f"a path of {len(ids)} tokens exceeds the {limit} that {self.name!r} reads (too_long='keep' keeps "
                    "the score of its last step that fits)"
                )
            paths.too_long.add(node)
            if self._note not in node.tree.notes:
                node.tree.notes.append(self._note)
            return paths.keep(node)
        return paths.grow(node, ids)

    @property
    def _note(self) -> str:
        return f"{self.name}: paths beyond its {self.context} tokens keep the score of their last step that fits"

    def notes_of(self, node: Node) -> tuple[str, ...]:
        """Say where a path keeps a score because it is too long."""
        paths = self._trees.get(node.tree)
        kept = paths is not None and any(step in paths.too_long for step in node.path())
        return (self._note,) if kept else ()

    def _tree(self, tree: SearchTree) -> Paths[P]:
        """The paths of a search tree; made on first use."""
        paths = self._trees.get(tree)
        if paths is None:
            plain = self._spelling.plain
            question = question_of(self.name, tree.prompt, plain)
            tokenizer, layout = self.tokenizer, self.format.layout
            paths = self._trees[tree] = self._make_paths(
                tree, lambda steps: layout.ids(tokenizer, question, [plain(step) for step in steps])
            )
        return paths

    def release(self, tree: SearchTree) -> None:
        """Forget a tree and free its KV."""
        paths = self._trees.pop(tree, None)
        if paths is not None:
            paths.free()


def resolve_format(format: str | PRMFormat) -> PRMFormat:
    """Return a format, or the one of this name.

    Raises:
        ValueError: no format has this name.
        TypeError: it is neither.
    """
    if isinstance(format, PRMFormat):
        return format
    if not isinstance(format, str):
        raise TypeError(f"format must be a name or a PRMFormat, got {type(format).__name__}")
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; it is one of {', '.join(sorted(FORMATS))}")
    return FORMATS[format]
