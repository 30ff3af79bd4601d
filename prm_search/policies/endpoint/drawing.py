"""One Request as HTTP requests: the children of a node in one, and further ones where a server ends them too early."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ...drawing import nodes_of
from ...policy import RequestFailed
from ...rng import stream
from ...sampling import Request
from ...tokens import TokenText
from ...tree import Node, Prompt
from .client import Counts, Endpoint, Route, ServerToken, deltas
from .facts import ServerFacts
from .retry import Cut, described
from .rows import ChunkReader, EndpointRow, IdReader, Reader, TokenReader, text_of
from .vocabulary import TextVocabulary

_SEEDS = (1 << 63) - 1  # servers take signed 64-bit integers
THOUGHTS = (
    "the server's chat template drops <think> blocks of an answer that is to be continued: give tokenizer=, for "
    "mode='completions'"
)
COUNTED = "policy tokens are the server's count of them: it returned text, not token ids"
LEFT = "a server may have drawn, and may charge for, some tokens behind a step's end that never came here"


@dataclass(frozen=True)
class Way:
    """The form of a tree's requests.

    Attributes:
        route: which of the server's.
        ids: prompts and answers are token ids.
        tokens: text comes with its tokens and their log-probabilities.
        keeps: stop strings may be left to the server: it keeps them in its text, or names the one that it dropped.
        kept: it keeps them.
    """

    route: Route
    ids: bool
    tokens: bool
    keeps: bool
    kept: bool


class Drawing:
    """The children of one request while a server draws them.

    Args:
        request: what to draw.
        endpoint: the server.
        facts: what it can do.
        way: how to ask it.
        written: the prompt as a text, for the completions route; None for others.
        text: bytes of the tokens.
        vocabulary: of a server that gives text.
        stop_ids: tokens that end a response.
        seeds: whether each request has a seed of its own.
        max_stops: stop strings of one request at most.
        id: of the policy.

    Attributes:
        rows: the children.
    """

    def __init__(
        self,
        request: Request,
        *,
        endpoint: Endpoint,
        facts: ServerFacts,
        way: Way,
        written: str | None,
        text: TokenText,
        vocabulary: TextVocabulary,
        stop_ids: frozenset[int],
        seeds: bool,
        max_stops: int,
        id: Hashable,
    ) -> None:
        self.request, self.id = request, id
        self._endpoint, self._facts, self._way, self._written = endpoint, facts, way, written
        self._text, self._vocabulary = text, vocabulary
        self._seeds = seeds and request.sampling.temperature > 0
        self._max_stops = max_stops
        self.rows = EndpointRow.of(request, text, stop_ids)
        self._readers: dict[EndpointRow, Reader] = {}  # of rows that a server is at

    async def draw(self) -> None:
        """Draw every child to its end.

        Raises:
            RequestFailed: the server refused, or failed as often as it was tried.
        """
        if self.request.ranked:
            await self._retried(self._rank, self._seed(self.rows[0]))
            return
        # Without tokens a server's count is the sum of all choices; at temperature 0 vLLM takes one choice alone.
        together = self._facts.n and (self._way.ids or self._way.tokens) and self.request.sampling.temperature > 0
        groups: dict[int, list[EndpointRow]] = {}
        for place, row in enumerate(self.rows):
            groups.setdefault(row.left if together else -place, []).append(row)
        await _all([lambda rows=rows: self._group(rows) for rows in groups.values()])  # type: ignore[misc]

    async def _group(self, rows: Sequence[EndpointRow]) -> None:
        """Draw children whose requests are the same but for their luck: together at first, then each by itself."""
        await self._leg(rows)
        await _all([lambda row=row: self._on(row) for row in rows])  # type: ignore[misc]

    async def _on(self, row: EndpointRow) -> None:
        while not row.done:
            await self._leg([row])

    async def _leg(self, rows: Sequence[EndpointRow]) -> None:
        """One request, tried until it succeeds: the rows are done then, or the server ended them too early."""
        states = [row.mark() for row in rows]
        seed = self._seed(rows[0])
        await self._retried(lambda: self._try(rows, states, seed), seed)

    async def _retried(self, attempt: Callable[[], Awaitable[None]], seed: int) -> None:
        """Try until it succeeds. Raises RequestFailed where it does not."""
        try:
            await self._endpoint.retried(attempt, lambda tried: stream((seed, tried)) / 2**64)
        except (asyncio.CancelledError, RequestFailed):
            raise
        except Exception as error:
            raise RequestFailed(f"{self._endpoint.base_url}: {described(error)}") from error

    async def _try(self, rows: Sequence[EndpointRow], states: Sequence[EndpointRow], seed: int) -> None:
        """One try for those rows that none has brought on yet."""
        for row, state in zip(rows, states, strict=True):
            if row in self._readers and not row.done:
                row.reset(state)
        left = [row for row in rows if not row.done]
        body, skip, limit = self._body(left, seed)
        readers = [self._reader(row, limit, skip) for row in left]
        self._readers.update(zip(left, readers, strict=True))
        counts = Counts()
        async with self._endpoint.stream(self._way.route, body) as chunks:
            async for chunk in chunks:
                if getattr(chunk, "usage", None) is not None:
                    counts = Counts.of(chunk.usage)
                for delta in deltas(self._way.route, chunk):
                    if 0 <= delta.index < len(readers):
                        readers[delta.index].read(delta)
                if all(reader.ready or reader.ended for reader in readers) and not all(r.ended for r in readers):
                    break  # the server would go on, for nobody
        if not all(reader.ready or reader.ended for reader in readers):
            raise Cut("the stream ended before its answers did")
        self._count(counts)
        for row, reader in zip(left, readers, strict=True):
            reader.close(counts.completion if len(left) == 1 else None)
            del self._readers[row]

    async def _rank(self) -> None:
        """Give each child the token that it stands for: the likeliest one, the next, ..."""
        if not self._way.ids:
            raise RequestFailed("the likeliest tokens are asked for, and this server is sent text: it gives no ids")
        count = len(self.rows)
        body = self._body(self.rows[:1], 0)[0] | {"max_tokens": 1, "temperature": 0, "logprobs": count}
        body |= {"return_tokens_as_token_ids": True}
        del body["stream_options"]
        body.pop("stop", None)
        answer = await self._endpoint.create(self._way.route, body)
        self._count(Counts.of(answer.usage))
        (delta,) = deltas(self._way.route, answer)
        tops = delta.tokens[0].tops if delta.tokens else ()
        ids = [int(token.removeprefix("token_id:")) for token, _ in tops if token.startswith("token_id:")]
        if len(ids) < count:
            raise RequestFailed(f"the {count} likeliest tokens are asked for, and the server tells {len(ids)}")
        for row, token, (_, logprob) in zip(self.rows, ids, tops, strict=False):
            row.put(token, ServerToken(None, logprob, tops))

    def _reader(self, row: EndpointRow, limit: int, skip: bytes) -> Reader:
        if self._way.ids:
            return IdReader(row, limit)
        make: Callable[..., Reader] = TokenReader if self._way.tokens else ChunkReader
        return make(row, limit, self._vocabulary, skip, self._way.kept)

    def _count(self, counts: Counts) -> None:
        meter = self.request.node.tree.meter
        if counts.prompt is not None:
            meter.add("encoded", self.id, counts.prompt - counts.cached)
            meter.add("cached", self.id, counts.cached)

    # -- the body -----------------------------------------------------------------------------------------------------

    def _body(self, rows: Sequence[EndpointRow], seed: int) -> tuple[dict[str, Any], bytes, int]:
        """The request for some rows that stand at one place; text that its answers may repeat; tokens asked for."""
        row, sampling, way = rows[0], self.request.sampling, self._way
        prompt, skip = self._prompt(row)
        longest = sampling.steps.max_tokens if self.request.until == "step" else None
        limit = row.left if longest is None else min(row.left, longest - row.in_step)
        body: dict[str, Any] = {**prompt, self._facts.limit_field if way.route == "chat" else "max_tokens": limit}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if way.ids or sampling.top_k:
            body["top_k"] = sampling.top_k or (-1 if way.ids else 0)  # said, or the server's own default would hold
        if way.ids or sampling.min_p:
            body["min_p"] = sampling.min_p
        if len(rows) > 1:
            body["n"] = len(rows)
        if self._seeds:
            body["seed"] = seed
        if way.ids:
            body["return_token_ids"] = True
        if way.ids or way.tokens:
            tops = max(sampling.confidence_tokens, int(sampling.steps.confidence is not None))
            if way.route == "chat":
                body |= {"logprobs": True, **({"top_logprobs": tops} if tops else {})}
            else:
                body["logprobs"] = tops
        stops = [] if skip else self._stops()
        if stops:
            body |= {"stop": stops, "include_stop_str_in_output": True} if way.kept else {"stop": stops}
        body["stream_options"] = {"include_usage": True, **({"continuous_usage_stats": True} if way.ids else {})}
        return body, skip, limit

    def _prompt(self, row: EndpointRow) -> tuple[dict[str, Any], bytes]:
        prompt, way = self.request.node.tree.prompt, self._way
        if way.ids:
            return {"prompt": row.ids()}, b""
        path = text_of(self._text, row)
        if self._written is not None:
            return {"prompt": self._written + path}, b""
        return continued(self._facts, prompt, path)

    def _stops(self) -> list[str]:
        """Stop strings that are left to the server: as many as it takes. What it does not know of is found here."""
        sampling = self.request.sampling
        if not self._way.keeps:
            return []
        own = sampling.steps.delimiter if self.request.until == "step" else None
        delimiters = (own,) if isinstance(own, str) else own or ()
        return list(dict.fromkeys([*sampling.stop, *delimiters]))[: self._max_stops]

    def _seed(self, row: EndpointRow) -> int:
        """A seed from everything that a draw depends on; a server begins its random numbers anew with each request."""
        tree = self.request.node.tree
        return stream((self.request.sampling.seed, tree.stream, row.lineage, row.position)) & _SEEDS

    # -- the end ------------------------------------------------------------------------------------------------------

    def interrupt(self) -> list[Node]:
        """Return what has been drawn so far as nodes; a child that has drawn nothing gives none."""
        for reader in self._readers.values():
            if not reader.row.done:
                reader.abort()
        for row in self.rows:
            row.interrupt()
        return self.finish()

    def drop(self) -> None:
        """Count what was drawn, of which nothing is kept."""
        self.request.node.tree.meter.add("sampled", self.id, sum(row.sampled for row in self.rows))

    def finish(self) -> list[Node]:
        """Put what was drawn into the tree: the last node of each child's chain (twins repeated)."""
        meter = self.request.node.tree.meter
        if not self._way.ids:
            meter.note(COUNTED)
        if not self._way.keeps:
            meter.note(LEFT)
        for row in self.rows:
            row.forget_unknown()
            for note in row.notes:
                meter.note(note)
        return [nodes[-1] for _, nodes in nodes_of(self.request, self.rows, self.id)]


def continued(facts: ServerFacts, prompt: Prompt, answer: str) -> tuple[dict[str, Any], bytes]:
    """A chat whose answer goes on, as the server takes it, and the end of the answer that its template drops.

    Raises:
        RequestFailed: the template drops a part of the answer that cannot be done without.
    """
    messages = [dict(message) for message in prompt.messages or ()]
    if not answer:
        return {"messages": messages}, b""
    if facts.drops_thoughts and "</think>" in answer:
        raise RequestFailed(THOUGHTS)
    bare = answer.rstrip() if facts.trims else answer
    last = {"role": "assistant", "content": bare or answer}
    skip = answer[len(bare) :].encode() if bare else b""
    if facts.continues == "prefix":
        return {"messages": [*messages, last | {"prefix": True}]}, skip
    own = {"add_generation_prompt": False, "continue_final_message": True}
    return {"messages": [*messages, last], **own}, skip


async def _all(works: Sequence[Callable[[], Any]]) -> None:
    """Do some works together; the first error ends the others, and is raised when they have ended."""
    tasks = [asyncio.ensure_future(work()) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
