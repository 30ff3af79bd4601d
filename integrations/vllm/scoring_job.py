"""The questions to one engine that score some nodes: as few tokens as what is known of their trees allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prm_search.integrations.vllm.logprob_requests import Ask, LogprobAnswer, SpanRequest, fill, gaps, whole
from prm_search.integrations.vllm.scoring_engine import ScoredEngine
from prm_search.integrations.vllm.token_trie import Entry
from prm_search.tree import Node, SearchTree


class Job:
    """The questions to one engine in a call of score_nodes.

    Args:
        engine: the engine.
        todo: nodes to score, each after its parent.
        prompt: the pair's token ids of a tree's prompt.
    """

    def __init__(
        self, engine: ScoredEngine, todo: Sequence[Node], prompt: Callable[[SearchTree], tuple[int, ...]]
    ) -> None:
        self.engine = engine
        self.spans: list[SpanRequest] = []
        self._entries: list[list[Entry]] = []  # what each span asks for
        self._nodes: list[Node] = []  # where it ends
        self._answers: list[LogprobAnswer] = []
        self.again: list[tuple[Ask, list[int]]] = []
        requested: set[Entry] = set()
        for node in todo:
            before = prompt(node.tree)
            if node.sampler == engine.id and node.logprobs is not None and before == node.tree.prompt_ids:
                engine.memo(node.tree, before).know(node, node.logprobs)  # the sampler's own: known from drawing it
        inner = {node.parent for node in todo}
        for leaf in todo:
            if leaf in inner:
                continue
            before = prompt(leaf.tree)
            memo = engine.memo(leaf.tree, before)
            path = leaf.path()
            while path and not any(
                entry.logprob is None and entry not in requested for entry in memo.entries(path[-1])
            ):
                path.pop()
            if not path:
                continue
            entries = [entry for node in path for entry in memo.entries(node)]
            start = next(i for i, entry in enumerate(entries) if entry.logprob is None and entry not in requested)
            requested.update(entries[start:])
            self.spans.append(SpanRequest((*before, *path[-1].path_ids()), len(before) + start))
            self._entries.append(entries[start:])
            self._nodes.append(path[-1])

    def take(self, answers: list[LogprobAnswer]) -> None:
        """The first answers."""
        self._answers = answers
        for node, span, answer in zip(self._nodes, self.spans, answers, strict=True):
            self.engine.ledger.encoded(node, len(span.token_ids), answer.cached)
        self.again = gaps(self.spans, answers)

    def retake(self, answers: list[LogprobAnswer]) -> None:
        """Answers to what was asked again."""
        for (ask, places), answer in zip(self.again, answers, strict=True):
            self.engine.ledger.repeated(self._nodes[places[0]].tree, len(ask.token_ids), answer.cached)
        fill(self.spans, self._answers, self.again, answers)
        full = {
            place for ask, places in self.again if isinstance(ask, SpanRequest) and not ask.cached for place in places
        }
        short = [place for place, answer in enumerate(self._answers) if np.isnan(answer.logprobs).any()]
        if full.intersection(short):
            raise RuntimeError("vLLM gave no log-probabilities of a prompt, though it was told not to read its cache")
        self.again = [(whole(self.spans[place]), [place]) for place in short]

    def remember(self) -> None:
        """Put the log-probabilities into the engine's memo."""
        for entries, answer in zip(self._entries, self._answers, strict=True):
            for entry, value in zip(entries, answer.logprobs.tolist(), strict=True):
                if entry.logprob is None:
                    entry.logprob = value
