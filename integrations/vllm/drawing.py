"""One Request as vLLM requests, a request a child, and the tokens these bring as steps. Imports no vLLM itself.

The engine is asked for tokens as it draws them, and the StepRule's own matcher decides where a step ends, so that a
step is the same on every engine. vLLM's stop strings are not used, which know nothing of leading delimiters, of a
delimiter begun in the parent, or of patterns; nor is its detokenizer. Both would end a request as this does: the front
end sees a token and tells the engine to abort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from prm_search.drawing import Draw, nodes_of
from prm_search.integrations.vllm.engines import EngineFacts, Ledger
from prm_search.rng import stream
from prm_search.sampling import Request
from prm_search.tokens import TokenText
from prm_search.tree import Node

_SEEDS = (1 << 63) - 1  # vLLM's seeds are signed 64-bit integers, and -1 means none


@dataclass(eq=False)
class EngineRow(Draw):
    """One child being drawn.

    Attributes:
        dropped: tokens the engine drew beyond its end.
        cached: tokens of its prompt that the engine had cached; None before its first output.
    """

    dropped: int = 0
    cached: int | None = None

    @property
    def sampled(self) -> int:
        """Tokens the engine drew for it."""
        return self.drawn + self.dropped


class Drawing:
    """The children of one request while vLLM draws them.

    Args:
        request: what to draw.
        facts: of the engine.
        text: bytes of the tokens.
        stop_ids: tokens that end a response.
        stop: further stop condition: which of these rows, each with a new token, end with it.
        alpha: strength of steering by the engine's logits processor; None for none.
        seeded: whether each child's draws have a seed of their own.
        ledger: counts what the engine encodes.

    Attributes:
        token_ids: what each child's request begins with.
        rows: the children.
        failed: why the engine gave one of them up; None where it has not.
    """

    def __init__(
        self,
        request: Request,
        *,
        facts: EngineFacts,
        text: TokenText,
        stop_ids: frozenset[int],
        stop: Callable[[Sequence[EngineRow]], Sequence[bool]] | None = None,
        alpha: float | None = None,
        seeded: bool,
        ledger: Ledger,
    ) -> None:
        sampling = request.sampling
        if sampling.temperature > 2:
            raise ValueError(f"temperature={sampling.temperature}: vLLM samples at temperatures in [0, 2]")
        self.request = request
        self._facts, self._stop_ids, self._ledger = facts, stop_ids, ledger
        self._stop, self._alpha = stop, alpha
        self._seeded = seeded and sampling.temperature > 0
        unsure = sampling.steps.confidence is not None
        self._top = max(sampling.confidence_tokens, int(unsure))  # most probable tokens to be told of
        node = request.node
        self.token_ids = [*node.tree.prompt_ids, *node.path_ids()]
        self.rows = EngineRow.of(request, text, stop_ids)
        self.failed: str | None = None

    @property
    def done(self) -> bool:
        """Return True if every child has ended, or one cannot."""
        return self.failed is not None or all(row.done for row in self.rows)

    def params(self, row: EngineRow) -> Any:
        """vLLM's SamplingParams for a child."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request, sampling = self.request, self.request.sampling
        longest = sampling.steps.max_tokens if request.until == "step" else None
        longest = 1 if request.ranked else longest
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=self._seed(row) if self._seeded else None,
            max_tokens=row.left if longest is None else min(row.left, longest),
            stop_token_ids=sorted(self._stop_ids),
            ignore_eos=True,  # the ids above are all that ends a response
            logprobs=max(self._top, len(self.rows) if request.ranked else 0),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if self._alpha is None else {"prm_alpha": self._alpha},
        )

    def _seed(self, row: EngineRow) -> int:
        """A seed from everything that a draw depends on. vLLM's generators begin anew with each request, so the
        response position is part of it, even where a child goes on in its parent's lineage."""
        node = self.request.node
        return stream((self.request.sampling.seed, node.tree.stream, row.lineage, node.end)) & _SEEDS

    def take(self, row: EngineRow, output: Any) -> None:
        """Feed a child what the engine has drawn for it since the last time.

        Args:
            row: the child.
            output: a RequestOutput of kind DELTA.
        """
        if row.cached is None:
            row.cached = int(output.num_cached_tokens or 0)
            self._ledger.encoded(self.request.node, len(self.token_ids), row.cached)
        (completion,) = output.outputs
        logprobs = completion.logprobs or ()
        for token, table in zip(completion.token_ids, logprobs, strict=True):
            if row.done:
                row.dropped += 1
            else:
                self._draw(row, int(token), table)
        reason = completion.finish_reason
        if reason is None or row.done:
            return
        if reason == "length" and row.chain:  # of the context, which ends before the cap
            row.interrupt("length")
        else:
            self.failed = f"vLLM ended a request before its step was complete: {reason}"

    def _draw(self, row: EngineRow, token: int, table: Any) -> None:
        """One token of a child."""
        best = sorted(table, key=lambda known: -table[known].logprob) if len(table) > 1 else [token]
        if row.rank is not None:
            token = best[row.rank]
        logprob = float(table[token].logprob)
        if row.cut_before(exp(table[best[0]].logprob), exp(logprob)):
            row.dropped += 1
            return
        count = min(self._top, len(best))
        row.record(token, logprob, -sum(table[known].logprob for known in best[:count]) / count if count else None)
        row.settle(self._stop is not None and self._stop([row])[0])

    def interrupt(self) -> list[Node]:
        """Return what has been drawn so far as nodes; a child that has drawn nothing gives none."""
        for row in self.rows:
            row.interrupt()
        return self.finish()

    def drop(self) -> None:
        """Count what was drawn, of which nothing is kept."""
        meter = self.request.node.tree.meter
        meter.add("sampled", self._facts.id, sum(row.sampled for row in self.rows))
        meter.add("encoded", self._facts.id, sum(max(row.sampled - 1, 0) for row in self.rows))

    def finish(self) -> list[Node]:
        """Put what was drawn into the tree: the last node of each child's chain (twins repeated).

        Raises:
            RuntimeError: the engine gave one of the children up.
        """
        if self.failed is not None:
            raise RuntimeError(self.failed)
        made = nodes_of(self.request, self.rows, self._facts.id)
        for row, nodes in made:
            self._ledger.drawn(nodes, row.sampled)
        return [nodes[-1] for _, nodes in made]
