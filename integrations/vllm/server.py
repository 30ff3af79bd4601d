"""VLLMServer: a model behind vLLM's OpenAI server, asked by its token-in/token-out route."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from prm_search.checks import integer
from prm_search.integrations.vllm.engines import Ledger
from prm_search.integrations.vllm.logprob_requests import Ask, LogprobAnswer, SpanRequest, http_fields, read_json
from prm_search.integrations.vllm.pooling import PoolRequest, pooling_body, read_pooled_json
from prm_search.integrations.vllm.scoring_engine import Pending, ScoredEngine


class VLLMServer(ScoredEngine):
    """One model of a vLLM server, for VLLMImplicitPRM and VLLMStepPRM. Needs the package httpx (extra `serve`).

    The server of a language model has to be started with `--enable-scale-out --enable-prompt-tokens-details`: the first
    opens the route /inference/v1/generate, the second makes it say how many tokens it had cached, which decides what
    can be trusted. A pooling server (`--runner pooling`) is asked by /pooling, and needs neither.

    Args:
        url: of the server, without /v1.
        model: its name there; None for the only one.
        api_key: sent as a bearer token.
        v2: whether it runs Model Runner V2 (vLLM's default on a GPU): then only the wanted rows are computed. A server
            does not say which it runs.
        concurrency: requests under way at most.
        timeout: seconds that one request may take.

    Attributes:
        root: hub id or folder of the model, as the server says.

    Raises:
        ImportError: httpx is missing.
        ConnectionError: the server is not reachable, or answers in an unknown way.
        ValueError: it serves no model of that name, or several and none is named.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        v2: bool = False,
        concurrency: int = 64,
        timeout: float = 600.0,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError("VLLMServer needs the package httpx") from error

        integer("concurrency", concurrency, 1, "a number of requests >= 1")
        self.url = url.rstrip("/")
        self.v2 = v2
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=concurrency))
        self._errors = (httpx.HTTPError,)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="prm-search-vllm")
        cards = {card["id"]: card for card in self._request("GET", "/v1/models").get("data", ())}
        if model is None and len(cards) == 1:
            (model,) = cards
        if model not in cards:
            raise ValueError(f"model={model!r}: {self.url} serves {', '.join(cards) or 'no model'}")
        self.model = model
        self.root = str(cards[model].get("root") or model)
        length = cards[model].get("max_model_len")
        self.context = None if length is None else int(length) - 1
        name = f"{self.url}#{model}"
        super().__init__(name, Ledger(name))

    def begin(self, asks: Sequence[Ask | PoolRequest]) -> Pending:
        """See ScoredEngine.begin."""
        self.forward_calls += len(asks)
        waiting = [self._pool.submit(self._one, ask) for ask in asks]

        def cancel() -> None:
            for future in waiting:
                future.cancel()

        def result() -> list[LogprobAnswer]:
            try:
                return [future.result() for future in waiting]
            except BaseException:
                cancel()
                raise

        return Pending(result, cancel)

    def close(self) -> None:
        """Close its connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _one(self, ask: Ask | PoolRequest) -> LogprobAnswer:
        if isinstance(ask, PoolRequest):
            return read_pooled_json(ask, self._request("POST", "/pooling", pooling_body(str(self.model), ask)))
        body = {"model": self.model, "token_ids": list(ask.token_ids), "sampling_params": http_fields(ask, v2=self.v2)}
        try:
            answer = self._request("POST", "/inference/v1/generate", body)
        except _ServerFailed:
            if isinstance(ask, SpanRequest) and ask.cached:
                # Rows of cached tokens are whatever was in memory, and JSON has no NaN: it is asked without the cache.
                return LogprobAnswer(np.full(len(ask.token_ids) - ask.start, np.nan, np.float32), -1)
            raise
        scores = answer.get("prompt_token_id_logprobs")
        table = None if scores is None else np.load(io.BytesIO(base64.b64decode(scores)), allow_pickle=False)
        return read_json(ask, answer, table, v2=self.v2)

    def _request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, self.url + path, json=body)
        except self._errors as error:
            raise ConnectionError(f"{self.url}{path}: {error}") from error
        if answer.status_code in (403, 404, 405) and method == "POST":
            how = "--runner pooling" if path == "/pooling" else "--enable-scale-out"
            raise ValueError(f"{self.url} refuses {path}: start it with {how} ({answer.text:.200})")
        status = answer.status_code
        if status >= 500 or (status == 400 and "not JSON compliant" in answer.text):  # how vLLM 0.32 puts its own NaN
            raise _ServerFailed(f"{self.url}{path}: {answer.status_code} {answer.text:.200}")
        if answer.status_code != 200:
            raise ValueError(f"{self.url}{path}: {answer.status_code} {answer.text:.200}")
        reply = answer.json()
        if not isinstance(reply, dict):
            raise ConnectionError(f"{self.url}{path}: no vLLM server answers there")
        return reply


class _ServerFailed(ConnectionError):
    """The request was good, and the server could not answer it."""
