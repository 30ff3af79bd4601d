"""StepPRM: an explicit process reward model, one score a step, each token of a tree encoded once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from ...engine.adapters import AUTO
from ...engine.language_model import LanguageModel
from ...tree import Node, SearchTree
from .formats import PRMFormat
from .formatted_prm import FormattedPRM, TooLong, resolve_format
from .loading import load_parts
from .paths import KVPath, Paths, PathTree, Write, read_ends


class StepPRM(FormattedPRM[KVPath]):
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
        super().__init__(tokenizer, format=format, name=name, too_long=too_long)
        self.prm = (
            model if isinstance(model, LanguageModel) else LanguageModel.of(model, adapter=adapter, capacity=capacity)
        )
        with self._of_format():
            width = int(self.prm.module.get_input_embeddings().weight.shape[1])
            self._read = self.format.reading.reader(
                self.prm.head, tensors or {}, tokenizer, self.prm.config.hidden_size or width
            )

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
        with self._scoring(nodes) as fresh:
            if fresh:
                rows = read_ends(self.prm, [(node, path) for path, node in fresh.items()])
                with torch.no_grad():
                    scores = self._read(rows).double().cpu().numpy()
                self._settle(fresh, scores)

    def _make_paths(self, tree: SearchTree, write: Write) -> Paths[KVPath]:
        return PathTree(tree, self.prm, write, keeps_end=self.format.layout.keeps_end)
