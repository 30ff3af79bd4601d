"""A vLLM engine as our integration sees one, over a ToyLM: prefix cache by blocks, garbage where vLLM has garbage.

`install(monkeypatch)` puts a module `vllm` in place that has SamplingParams; FakeLLM stands for vllm.LLM, FakeAsyncLLM
for AsyncLLM. `v2=True` answers as Model Runner V2: rows of tokens that were not cached only, scores of given ids.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import EOS, ToyLM

from prm_search.rng import uniforms

GARBAGE = 1e30  # what rows of cached tokens hold under V1: nothing that a test could take for a log-probability


class ByteTokenizer:
    """A tokenizer of bytes, with what TokenText and encode_prompt ask of one. Token 0 ends the sequence."""

    all_special_ids = (EOS,)
    all_special_tokens = ("</s>",)
    eos_token_id = EOS
    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {"</s>": EOS} | {chr(i): i for i in range(1, 128)}

    def convert_ids_to_tokens(self, token_id: int) -> bytes | None:
        return b"</s>" if token_id == EOS else bytes([token_id])

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


@dataclass
class SamplingParams:
    """The fields that are used, with vLLM's defaults and the checks that matter."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: Any = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    skip_reading_prefix_cache: bool | None = None
    detokenize: bool = True
    flat_logprobs: bool = False
    output_kind: str = "CUMULATIVE"
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.temperature <= 2
        assert self.max_tokens >= 1
        scored = self.prompt_logprobs is not None or self.prompt_logprob_token_ids is not None
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = scored
        assert not (self.prompt_logprobs is not None and self.detokenize and not self.skip_reading_prefix_cache), (
            "vLLM crashes on the garbage rows of a cached prompt"
        )


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import vllm` find this module's SamplingParams."""
    module, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.SamplingParams = params.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    params.RequestOutputKind = SimpleNamespace(DELTA="DELTA", FINAL_ONLY="FINAL_ONLY")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)


@dataclass
class Running:
    """A request in the engine."""

    name: str
    prompt: list[int]
    params: SamplingParams
    cached: int
    number: int
    tokens: list[int] = field(default_factory=list)


class FakeEngine:
    """Draws one token of every request a step.

    Args:
        lm: the model.
        block: tokens of a cache block.
        burst: tokens that are drawn before the front end hears of them; more than one overshoots.
        v2: answer as Model Runner V2 does.
        name, context, device, chunked, logprobs_mode, prefix_caching, logits_processors: what its vllm_config says.
        fail_at: the request that it gives up ("abort"), by its number.

    Attributes:
        log: (prompt tokens, cached, params) of every request, in order.
        blocks: the prefixes in the cache.
        aborted: names of aborted requests.
    """

    def __init__(
        self,
        lm: ToyLM | None = None,
        *,
        name: str = "toy",
        block: int = 4,
        context: int = 4096,
        burst: int = 1,
        v2: bool = False,
        device: str = "cpu",
        chunked: bool = False,
        logprobs_mode: str = "raw_logprobs",
        prefix_caching: bool = True,
        logits_processors: list[Any] | None = None,
        fail_at: int | None = None,
    ) -> None:
        self.lm, self.burst, self.v2 = lm or ToyLM(), burst, v2
        self.block, self.context, self.prefix_caching, self.fail_at = block, context, prefix_caching, fail_at
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                model=name,
                max_model_len=context,
                get_vocab_size=lambda: 128,
                logprobs_mode=logprobs_mode,
                max_logprobs=20,
                logits_processors=logits_processors,
                try_get_generation_config=lambda: {},
            ),
            cache_config=SimpleNamespace(block_size=block, enable_prefix_caching=prefix_caching),
            device_config=SimpleNamespace(device_type=device),
            scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked),
            use_v2_model_runner=v2,
        )
        self.running: dict[str, Running] = {}
        self.blocks: set[tuple[int, ...]] = set()
        self.log: list[tuple[int, int, SamplingParams]] = []
        self.aborted: list[str] = []
        self.steps = 0

    def get_tokenizer(self) -> ByteTokenizer:
        return ByteTokenizer()

    def add_request(self, name: str, prompt: dict[str, list[int]], params: SamplingParams) -> str:
        ids = prompt["prompt_token_ids"]
        assert 0 < len(ids) < self.context
        assert name not in self.running
        cached = 0
        if self.prefix_caching and not params.skip_reading_prefix_cache:
            while cached + self.block < len(ids) and tuple(ids[: cached + self.block]) in self.blocks:
                cached += self.block
        self._keep(ids)
        self.log.append((len(ids), cached, params))
        self.running[name] = Running(name, list(ids), params, cached, len(self.log) - 1)
        return name

    def _keep(self, ids: Sequence[int]) -> None:
        self.blocks.update(tuple(ids[:end]) for end in range(self.block, len(ids) + 1, self.block))

    def abort_request(self, names: Sequence[str]) -> None:
        for name in names:
            if self.running.pop(name, None) is not None:
                self.aborted.append(name)

    def step(self) -> list[SimpleNamespace]:
        self.steps += 1
        return [self._advance(request) for request in list(self.running.values())]

    def _advance(self, request: Running) -> SimpleNamespace:
        params = request.params
        new: list[int] = []
        tables: list[dict[int, SimpleNamespace]] = []
        reason = None
        if request.number == self.fail_at:
            reason = "abort"
        while reason is None and len(new) < self.burst:
            context = [*request.prompt, *request.tokens]
            probs = self.lm.probs(context)
            place = self._draw(probs, request)
            token = self.lm.vocabulary[place]
            request.tokens.append(token)
            new.append(token)
            tables.append(self._table(probs, place, params))
            if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
                reason = "stop"
            elif len(request.tokens) == params.max_tokens or len(context) + 1 == self.context:
                reason = "length"
        if reason is not None:
            del self.running[request.name]
            self._keep([*request.prompt, *request.tokens[:-1]])
        completion = SimpleNamespace(token_ids=new, logprobs=tables, finish_reason=reason)
        return SimpleNamespace(
            request_id=request.name,
            outputs=[completion],
            finished=reason is not None,
            num_cached_tokens=request.cached,
            prompt_logprobs=self._prompt_logprobs(request),
            prompt_token_id_logprobs=self._prompt_scores(request),
        )

    def _draw(self, probs: np.ndarray, request: Running) -> int:
        if request.params.temperature == 0:
            return int(probs.argmax())
        weights = probs ** (1 / request.params.temperature)
        seed = request.params.seed if request.params.seed is not None else self.steps
        (u,) = uniforms([seed], [0], [0], [len(request.tokens)])
        return int(np.searchsorted(np.cumsum(weights / weights.sum())[:-1], u, side="right"))

    def _table(self, probs: np.ndarray, place: int, params: SamplingParams) -> dict[int, SimpleNamespace]:
        known = dict(zip(self.lm.vocabulary, probs.tolist(), strict=True))
        wanted = [self.lm.vocabulary[place]]
        if params.logprob_token_ids is not None:
            assert params.logprobs in (None, len(params.logprob_token_ids))
            wanted += params.logprob_token_ids
        elif params.logprobs:
            wanted += sorted(known, key=lambda token: -known[token])[: params.logprobs]
        return {token: SimpleNamespace(logprob=math.log(known.get(token, 1e-9))) for token in wanted}

    def logprob(self, ids: Sequence[int], at: int) -> float:
        """log p of token `at` of a sequence."""
        probs = self.lm.probs(ids[:at])
        return math.log(probs[self.lm.vocabulary.index(ids[at])]) if ids[at] in self.lm.vocabulary else -20.0

    def _prompt_logprobs(self, request: Running) -> list[dict[int, SimpleNamespace] | None] | None:
        if request.params.prompt_logprobs is None:
            return None
        ids = request.prompt
        rows: list[dict[int, SimpleNamespace] | None] = [None]
        for at in range(1, len(ids)):
            known = at > request.cached  # the row before a token is only there if that was encoded now
            if known:
                rows.append({ids[at]: SimpleNamespace(logprob=self.logprob(ids, at))})
            elif not self.v2:
                rows.append({10**9: SimpleNamespace(logprob=GARBAGE)})
        return rows

    def _prompt_scores(self, request: Running) -> np.ndarray | None:
        wanted, start = request.params.prompt_logprob_token_ids, request.params.prompt_logprob_start
        if wanted is None:
            return None
        assert self.v2, "V1 refuses prompt_logprob_token_ids"
        if request.cached > start:
            return None
        ids = request.prompt
        assert len(wanted) == len(ids) - 1 - start
        assert [row[0] for row in wanted] == ids[start + 1 :]
        return np.array([[self.logprob(ids, at)] for at in range(start + 1, len(ids))], np.float32)


class FakeLLM:
    """vllm.LLM."""

    def __init__(self, engine: FakeEngine) -> None:
        self.llm_engine = engine


class FakeAsyncLLM:
    """AsyncLLM: one step of the engine for whoever waits."""

    def __init__(self, engine: FakeEngine) -> None:
        self.core = engine
        self.vllm_config = engine.vllm_config
        self._queues: dict[str, asyncio.Queue[SimpleNamespace]] = {}

    def get_tokenizer(self) -> ByteTokenizer:
        return self.core.get_tokenizer()

    async def generate(self, prompt: dict[str, list[int]], params: SamplingParams, name: str) -> AsyncIterator[Any]:
        self.core.add_request(name, prompt, params)
        queue = self._queues[name] = asyncio.Queue()
        try:
            while True:
                while queue.empty():
                    for output in self.core.step():
                        if output.request_id in self._queues:
                            self._queues[output.request_id].put_nowait(output)
                    await asyncio.sleep(0)
                output = queue.get_nowait()
                yield output
                if output.finished:
                    return
        finally:
            del self._queues[name]
            self.core.abort_request([name])
