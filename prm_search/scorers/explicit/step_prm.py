"""StepPRM: an explicit process reward model, one score a step, each token of a tree encoded once."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch

from ...engine.adapters import AUTO
from ...engine.language_model import LanguageModel
from ...tree import Node, SearchTree
from ..base import BATCH_TOKENS, ScorerBase
from ..responses import Steps
from .formats import FORMATS, PRMFormat
from .layouts import Spelling
from .loading import load_parts
from .paths import PathTree, ReadPath, read_ends
from .questions import question_of
from .step_scores import StepScores, score_texts

TooLong = Literal["error", "keep"]


class StepPRM(ScorerBase):
    """A step PRM as people publish them: a head, a marker token's row, or a verdict word, read behind each step.

    Its score of a step is `node.reward`; `default_value` is what its authors judge answers by. The policy's tokens mean
    nothing to it: it writes the question and the steps' texts in its own format (white space around a step dropped,
    control tokens that text spells broken up by a space), and a path costs what its parent's does not have. So a
    question has to be given as text or chat messages.

    Args:
        model: a causal LM of transformers whose body is the PRM's, in eval mode; or a LanguageModel.
        tokenizer: its tokenizer.
        format: a name of `FORMATS`, or a PRMFormat.
        tensors: the head's weights by name, where the format reads a head (`from_pretrained` finds them).
        name: key of the scores in Node.rewards.
        adapter: which weights of a model with adapters; see ImplicitPRM.
        capacity: tokens of KV to hold; None: as LanguageModel.
        too_long: what to do with a path beyond the PRM's length: "error", or "keep" the parent's score and say so in
            `Result.tree.notes`.

    Raises:
        TypeError: model is not a causal LM, or format is neither a name nor a PRMFormat.
        ValueError: the format is unknown, or model and tokenizer lack what it needs.
    """

    kind = "step PRM"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        format: str | PRMFormat,
        tensors: Mapping[str, torch.Tensor] | None = None,
        name: str = "prm",
        adapter: str | None = AUTO,
        capacity: int | None = None,
        too_long: TooLong = "error",
    ) -> None:
        super().__init__(name, tokenizer)
        if too_long not in ("error", "keep"):
            raise ValueError(f"too_long={too_long!r}: it is 'error' or 'keep'")
        self.format = resolve_format(format)
        self.default_value = self.format.aggregate  # what its authors judge answers by
        self.reward_range = self.format.low, self.format.high
        self.too_long = too_long
        self.prm = (
            model if isinstance(model, LanguageModel) else LanguageModel.of(model, adapter=adapter, capacity=capacity)
        )
        layout, reading = self.format.layout, self.format.reading
        try:
            layout.check(self.need_tokenizer())
            width = int(self.prm.module.get_input_embeddings().weight.shape[1])
            self._read = reading.reader(self.prm.head, tensors or {}, tokenizer, self.prm.config.hidden_size or width)
        except ValueError as error:
            raise ValueError(f"format={self.format.name!r}: {error}") from error
        self._spelling = Spelling(tokenizer, [marker] if (marker := getattr(layout, "marker", "")) else [])
        self._trees: weakref.WeakKeyDictionary[SearchTree, PathTree] = weakref.WeakKeyDictionary()

    @classmethod
    def from_pretrained(
        cls,
        model: str | PathLike[str],
        *,
        format: str | PRMFormat = "auto",
        adapter: str | PathLike[str] | None = None,
        name: str = "prm",
        capacity: int | None = None,
        too_long: TooLong = "error",
        **options: Any,
    ) -> StepPRM:
        """Load a step PRM by hub id or path, its body by transformers' own classes and its head beside it.

        No remote code runs. "auto" looks at the architecture, the head's tensors and the name.

        Args:
            model: hub id, or folder of a checkpoint or adapter.
            format: see StepPRM; "auto" to find out.
            adapter: hub id or folder of a PEFT adapter that sits on the model; None for none.
            name, capacity, too_long: see StepPRM.
            options: for loading: dtype, device_map, revision, tokenizer, base (of an adapter) and what transformers'
                from_pretrained takes.

        Raises:
            OSError: there is no such model.
            ValueError: the format is ambiguous or unknown, or the checkpoint does not fit it; the names to choose from
                are said.
        """
        chosen = None if format == "auto" else resolve_format(format)
        parts = load_parts(model, chosen, adapter, capacity, options)
        return cls(parts.lm, parts.tokenizer, format=parts.format, tensors=parts.tensors, name=name, too_long=too_long)

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def models(self) -> Mapping[str, Hashable]:
        """See Scorer."""
        return {"prm": self.prm.id}

    @property
    def forward_calls(self) -> int:
        """Forwards run so far by its model, whoever asked for them."""
        return self.prm.forwards

    @property
    def context(self) -> int | None:
        """Tokens of the longest path, in its own tokens."""
        limits = (self.format.longest, self.prm.context, self.prm.tree.capacity)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def vocab(self) -> int | None:
        """See ScorerBase."""
        return self.prm.head.vocab

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Score nodes and their unscored ancestors; see Scorer.score_nodes. One packed forward.

        Raises:
            ValueError: a prompt is given only as token ids, or a path exceeds the PRM's length.
        """
        todo = self.unscored(nodes)
        fresh: dict[ReadPath, Node] = {}
        grown: list[Node] = []
        try:
            for node in todo:
                grown.append(node)
                path = self._grow(node)
                if path.score is None:
                    fresh.setdefault(path, node)
            if fresh:
                rows = read_ends(self.prm, [(node, path) for path, node in fresh.items()])
                with torch.no_grad():
                    scores = self._read(rows).double().cpu().numpy()
                if np.isnan(scores).any():
                    raise ValueError(f"{self.prm.id} gives scores that are not numbers")
                for path, score in zip(fresh, scores, strict=True):
                    path.score = float(score)
        except BaseException:
            for node in grown:
                self._tree(node.tree).drop([node])
            raise
        for node in todo:
            self.set_step_reward(node, self._tree(node.tree).of(node).score or 0.0)

    def _grow(self, node: Node) -> ReadPath:
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
            note = f"{self.name}: paths beyond its {limit} tokens keep the score of their last step that fits"
            if note not in node.tree.notes:
                node.tree.notes.append(note)
            return paths.keep(node)
        return paths.grow(node, ids)

    def _tree(self, tree: SearchTree) -> PathTree:
        """The paths of a search tree; made on first use."""
        paths = self._trees.get(tree)
        if paths is None:
            plain = self._spelling.plain
            question = question_of(self.name, tree.prompt, plain)
            tokenizer, layout = self.tokenizer, self.format.layout
            paths = self._trees[tree] = PathTree(
                tree,
                self.prm,
                lambda steps: layout.ids(tokenizer, question, [plain(step) for step in steps]),
                keeps_end=layout.keeps_end,
            )
        return paths

    def score(  # type: ignore[override]  # a number a step, and text: ids would mean nothing to it
        self,
        prompts: Iterable[Any],
        responses: Iterable[Any],
        *,
        steps: Steps = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[StepScores]:
        """Scores of complete responses.

        Args:
            prompts: B prompts: strings, lists of chat messages, or Prompts with either.
            responses: B responses: strings, or lists of strings, a step each.
            steps: a StepRule that cuts strings into steps; None for StepRule().
            batch_tokens: tokens handled at once, about; bounds the memory, changes no result.

        Returns:
            B StepScores, in order. Nothing is kept: all KV is freed.

        Raises:
            ValueError, TypeError: as ScorerBase.score, of text.
        """
        return score_texts(self, prompts, responses, steps=steps, batch_tokens=batch_tokens)

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
