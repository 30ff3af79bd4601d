"""A judge's questions to a vLLM engine: one token is drawn behind each text, which reads the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prm_search.integrations.vllm.engines import Ledger
from prm_search.integrations.vllm.logprob_requests import CANDIDATES, LogprobAnswer, NextTokenRequest
from prm_search.next_token import NextToken, answer_ids, check_words, word_ids
from prm_search.tokens import TokenText, encode_prompt


class NextTokenRound:
    """The requests to one engine that answer some asks.

    Args:
        asks, words: see PolicyBase.next_token_logprobs.
        token_text: of the engine's tokenizer.
        vocab: tokens that the model knows.
        context: tokens of a path that it can be asked about.

    Attributes:
        requests: what to send, asks with equal texts together.

    Raises:
        ValueError: a word is no token, or a text is too long.
    """

    def __init__(
        self, asks: Sequence[NextToken], words: Sequence[str], token_text: TokenText, vocab: int, context: int | None
    ) -> None:
        self._ids = word_ids(token_text, check_words(words), vocab)
        self._asks = asks
        self._texts: list[tuple[int, ...]] = []
        for place, ask in enumerate(asks):
            prompt = encode_prompt(token_text.tokenizer, ask.prompt, "the policy's tokenizer")
            text = (*prompt, *answer_ids(ask, token_text))
            if context is not None and len(text) > context:
                raise ValueError(f"asks[{place}] has {len(text)} tokens, and the engine can be asked about {context}")
            self._texts.append(text)
        tokens = list(dict.fromkeys(token for group in self._ids.values() for token in group))
        parts = [tuple(tokens[low : low + CANDIDATES]) for low in range(0, len(tokens), CANDIDATES)]
        self.requests = [NextTokenRequest(text, part) for text in dict.fromkeys(self._texts) for part in parts]
        self._parts = len(parts)

    def read(self, answers: Sequence[LogprobAnswer], ledger: Ledger) -> list[dict[str, float]]:
        """Log-probabilities of the words behind each ask, nats, from the answers to the requests; counts the texts."""
        tables: dict[tuple[int, ...], dict[int, float]] = {}
        owners = dict(zip(reversed(self._texts), reversed(self._asks), strict=True))
        for place, (request, answer) in enumerate(zip(self.requests, answers, strict=True)):
            table = tables.setdefault(request.token_ids, {})
            table.update(zip(request.candidates, answer.logprobs.tolist(), strict=True))
            ask = owners[request.token_ids]
            if place % self._parts:
                ledger.repeated(ask.tree, len(request.token_ids), answer.cached)
            else:
                ledger.asked(ask.tree, request.token_ids, answer.cached, _drawn(ask))
        return [
            {word: _total([tables[text][token] for token in group]) for word, group in self._ids.items()}
            for text in self._texts
        ]


def _drawn(ask: NextToken) -> tuple[int, ...]:
    """A drawn answer behind its prompt; empty for an answer that is only text."""
    if ask.drawn is None or ask.drawn.tree.prompt.token_ids is None:
        return ()
    return (*ask.drawn.tree.prompt_ids, *ask.drawn.path_ids())


def _total(logprobs: Sequence[float]) -> float:
    return float(np.logaddexp.reduce(np.asarray(logprobs, np.float64)))
