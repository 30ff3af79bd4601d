"""Answers in OpenAI's schema, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..driver.result import Event, Result
from ..tree import Node
from ..usage import Usage
from ..values import step_rewards
from ..viewer.page_tree import token_texts
from .logprobs import TokenLogprobs
from .request import SearchRequest
from .service import Job, answered, failure
from .text import TextStream


def whole(job: Job, results: Sequence[Result]) -> dict[str, Any]:
    """The answer of a request that is not streamed.

    Args:
        job: the request.
        results: one a prompt.
    """
    ask = job.ask
    choices = []
    for number, result in enumerate(results):
        for place, node in enumerate(chosen(ask, result)):
            text, logprobs, stopped_by = _told(job, node)
            content = {"message": {"role": "assistant", "content": text}} if ask.kind == "chat" else {"text": text}
            choice: dict[str, Any] = {"index": number * ask.n + place, **content, "logprobs": logprobs}
            choice |= {"finish_reason": finish_reason(node), "stop_reason": stopped_by}
            if ask.token_ids:
                choice |= {"token_ids": node.path_ids(), "prompt_token_ids": list(result.tree.prompt_ids)}
            choices.append(choice)
    answer = _head(job, "chat.completion" if ask.kind == "chat" else "text_completion")
    answer |= {"choices": choices, "usage": usage(job, results)}
    return answer | ({"prm_search": [search_facts(job, result) for result in results]} if ask.guided else {})


def _told(job: Job, node: Node) -> tuple[str, dict[str, Any] | None, str | None]:
    """A choice's text, its log-probabilities where they are asked for, and the stop string that ended it."""
    ask, token_text = job.ask, job.service.engine.token_text
    stream = TextStream(token_text, ask.stop, keep=ask.keep_stop)
    text = stream.feed(node.path_ids()) + stream.end()
    if not ask.logprobs:
        return text, None, stream.stopped_by
    logprobs = TokenLogprobs(token_text, ask.kind)
    logprobs.feed(node.path())
    every = ask.token_ids or not stream.stopped
    return text, logprobs.told(None if every else len(text)), stream.stopped_by


def chosen(ask: SearchRequest, result: Result) -> list[Node]:
    """The ends of the choices for one prompt.

    Guided: the best n candidates of which no two are the same, which may be fewer. Otherwise the n samples, in the
    order in which they were drawn.
    """
    if not ask.guided:
        drawn = sorted(result.candidates, key=lambda node: node.index)
        return [node for node in drawn for _ in range(node.count)][: ask.n]
    distinct: dict[tuple[int, ...], Node] = {}
    for node in result.candidates:
        distinct.setdefault(tuple(node.path_ids()), node)
    return list(distinct.values())[: ask.n]


def finish_reason(node: Node) -> str:
    """OpenAI's word: "length" also for what a budget cut."""
    return "stop" if node.finish == "stop" else "length"


def usage(job: Job, results: Sequence[Result]) -> dict[str, Any]:
    """Return what the request cost: prompt and sampled tokens, and under prm_search what each model did for them."""
    total = job.usage
    prompts = sum(len(result.tree.prompt_ids) for result in results)
    sampled = sum(total.sampled_tokens.values())
    return {
        "prompt_tokens": prompts,
        "completion_tokens": sampled,
        "total_tokens": prompts + sampled,
        "prm_search": _costs(total),
    }


def _costs(usage: Usage) -> dict[str, Any]:
    return {
        "sampled_tokens": usage.sampled_tokens,
        "encoded_tokens": usage.encoded_tokens,
        "cached_tokens": usage.cached_tokens,
        "reencoded_tokens": usage.reencoded_tokens,
        "forward_calls": usage.forward_calls,
        "seconds": {phase: round(spent, 6) for phase, spent in usage.seconds.items()},
    }


def search_facts(job: Job, result: Result) -> dict[str, Any]:
    """Return what the search for one prompt says beside its text."""
    facts: dict[str, Any] = {"stopped": result.stopped, "value": finite(result.value), "answer": result.answer}
    if result.tree.notes:
        facts["notes"] = result.tree.notes
    if job.ask.progress and result.node is not None:
        facts["path"] = [node.index for node in result.node.path()]
    if job.ask.candidates:
        facts["candidates"] = [_candidate(job, node) for node in result.candidates]
    return facts


def finite(number: float | None) -> float | None:
    """The number; None for infinities and NaN, which JSON has no words for."""
    return None if number is None or not math.isfinite(number) else float(number)


def _candidate(job: Job, node: Node) -> dict[str, Any]:
    ask = job.ask
    stream = TextStream(job.service.engine.token_text, ask.stop, keep=ask.keep_stop)
    path = node.path()
    texts = [stream.feed(step.token_ids) for step in path]
    texts[-1] += stream.end()
    rewards = step_rewards(node)
    return {
        "text": "".join(texts),
        "value": finite(node.value),
        "q": finite(node.q),
        "finish_reason": finish_reason(node),
        "count": node.count,
        "answer": None if ask.settings.answer is None else ask.settings.answer("".join(texts)),
        "steps": [
            {
                "text": text,
                "tokens": len(step.token_ids),
                "reward": finite(reward),
                "q": finite(step.q),
                "value": finite(step.value),
            }
            for text, step, reward in zip(texts, path, rewards, strict=True)
        ],
    }


def _step(node: Node) -> dict[str, Any]:
    """A step of the growing tree. One that is told again has changed: it was drawn once more."""
    return {
        "id": node.index,
        "parent": None if node.parent is None else node.parent.index,
        "depth": node.depth,
        "text": node.text,
        "tokens": len(node.token_ids),
        "reward": finite(node.reward),
        "rewards": {name: finite(node.reward_of(name)) for name in node.rewards},
        "q": finite(node.q),
        "value": finite(node.value),
        "count": node.count,
        "finish": node.finish,
        "rollout": node.rollout,
        "token_rewards": list(map(finite, node.token_rewards.tolist())),
        "pieces": list(token_texts(node, node.tree.primary)),
    }


async def events(job: Job) -> AsyncIterator[tuple[str, bool]]:
    """The answer as server-sent events: deltas, an error where there is one, [DONE]; each with whether all is well."""
    try:
        async for event in _Chunks(job).stream():
            yield event, True
    except Exception as error:
        yield _event(failure(error).body()), False
    yield "data: [DONE]\n\n", True


class _Chunks:
    """Builds the chunks of one stream."""

    def __init__(self, job: Job) -> None:
        self.job, self.ask = job, job.ask
        token_text = job.service.engine.token_text
        self.texts = [TextStream(token_text, self.ask.stop, keep=self.ask.keep_stop) for _ in job.ask.prompts]
        self.logprobs = [TokenLogprobs(token_text, job.ask.kind) for _ in job.ask.prompts]
        self.characters = [0] * len(job.ask.prompts)  # told
        self.steps = [0] * len(job.ask.prompts)  # whose tokens have their log-probabilities
        self.told: list[list[int]] = [[] for _ in job.ask.prompts]
        self.results: dict[int, Result] = {}

    async def stream(self) -> AsyncIterator[str]:
        """Every chunk in order, as events. Those that grow with the search are made off the event loop."""
        ask, job = self.ask, self.job
        await job.begun()
        if ask.kind == "chat" and ask.in_steps:
            yield _event(self._chunk(0, {"role": "assistant", "content": ""}))
        while len(self.results) < len(ask.prompts):
            number, event = await job.events.get()
            if isinstance(event, BaseException):
                raise event
            if event.result is None:
                if ask.progress:
                    yield await asyncio.to_thread(self._progress, number, event)
                if ask.in_steps:
                    new_text, ids = self._tell(number, job.searches[number].committed())
                    if new_text or (ids and ask.token_ids):
                        logprobs = self._logprobs(number)
                        yield _event(self._chunk(number, self._delta(new_text), logprobs=logprobs, ids=ids))
            else:
                self.results[number] = result = answered(event.result)
                for chunk in await asyncio.to_thread(self._end, number, result):
                    yield chunk
        if ask.include_usage:
            results = [self.results[number] for number in range(len(ask.prompts))]
            yield _event(self._chunk(None) | {"usage": usage(job, results)})

    def _tell(self, number: int, steps: Sequence[Node]) -> tuple[str, list[int]]:
        """The text, and the token ids, that these settled steps add to what was told."""
        told = self.told[number]
        ids = [i for step in steps for i in step.token_ids]
        if ids[: len(told)] != told:
            raise RuntimeError("the search took back a step that was settled")
        fresh = ids[len(told) :]
        told += fresh
        self.logprobs[number].feed(steps[self.steps[number] :])
        self.steps[number] = len(steps)
        new_text = self.texts[number].feed(fresh)
        self.characters[number] += len(new_text)
        return new_text, fresh

    def _logprobs(self, number: int, *, last: bool = False) -> dict[str, Any] | None:
        """Return what comes with the text that has been told; at the end, with the rest."""
        if not self.ask.logprobs:
            return None
        whole = self.ask.token_ids or (last and not self.texts[number].stopped)
        return self.logprobs[number].told(None if whole else self.characters[number])

    def _end(self, number: int, result: Result) -> list[str]:
        """Return what remains to be told of one prompt, as events."""
        ask, job = self.ask, self.job
        chunks = []
        for place, node in enumerate(chosen(ask, result)):
            index = number * ask.n + place
            if ask.in_steps:
                (new_text, ids), rest = self._tell(number, node.path()), self.texts[number].end()
                self.characters[number] += len(rest)
                new_text, logprobs = new_text + rest, self._logprobs(number, last=True)
                stopped_by = self.texts[number].stopped_by
            else:
                new_text, logprobs, stopped_by = _told(job, node)
                ids = node.path_ids()
                if ask.kind == "chat":
                    chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
            if new_text or logprobs or ask.token_ids:
                chunks.append(self._chunk(index, self._delta(new_text), logprobs=logprobs, ids=ids))
            last = self._chunk(index, {} if ask.kind == "chat" else {"text": ""}, finish_reason(node))
            last["choices"][0]["stop_reason"] = stopped_by
            chunks.append(last)
        if chunks and ask.guided:
            chunks[-1]["prm_search"] = [search_facts(job, result)]
        return list(map(_event, chunks))

    def _progress(self, number: int, event: Event) -> str:
        told = {
            "prompt": number,
            "steps": list(map(_step, event.nodes)),
            "usage": _costs(self.job.usage_so_far(number)),
        }
        return _event(self._chunk(None) | {"prm_search": [told]})

    def _delta(self, text: str) -> dict[str, Any]:
        return {"content": text} if self.ask.kind == "chat" else {"text": text}

    def _chunk(
        self,
        index: int | None,
        delta: dict[str, Any] | None = None,
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
        ids: Sequence[int] = (),
    ) -> dict[str, Any]:
        """A chunk with one choice, or with none."""
        chat = self.ask.kind == "chat"
        chunk = _head(self.job, "chat.completion.chunk" if chat else "text_completion")
        content = {"delta": delta} if chat else delta or {}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        if self.ask.token_ids and index is not None:
            choice["token_ids"] = list(ids)
        return chunk | {"choices": [] if index is None else [choice]}


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.ask.model or job.service.models[0]}


def dumps(value: Any, depth: int = 5) -> str:
    """JSON, made in pieces: one call for a whole answer would keep every other thread waiting, the event loop's too."""
    if depth and value and isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)}: {dumps(item, depth - 1)}' for key, item in value.items())}}}"
    if depth and value and isinstance(value, list):
        return f"[{', '.join(dumps(item, depth - 1) for item in value)}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {dumps(chunk)}\n\n"
