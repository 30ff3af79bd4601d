"""The numbers of a reward model's head at the end of a path, from vLLM's pooling engines. Imports no vLLM itself.

Two kinds of engines give them: sequence classifiers pool the last token and read the prefix cache; token classifiers
pool every token. vLLM lets the latter skip the cache, since it has no hidden rows for cached tokens, and with step
pooling it has none. Here only the last token is wanted, so an engine of this process that pools all tokens may read it
(skip_reading_prefix_cache=False); over HTTP there is no such field, and every path is encoded whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prm_search.integrations.vllm.logprob_requests import LogprobAnswer

CLASSIFY, TOKEN_CLASSIFY = "classify", "token_classify"


@dataclass(frozen=True)
class PoolRequest:
    """The head's numbers at the last of token_ids, before any activation.

    Attributes:
        token_ids: the path.
        outputs: how many numbers there are.
    """

    token_ids: tuple[int, ...]
    outputs: int


def pooling_task(engine: Any, tasks: Any) -> str:
    """Return the task by which an engine gives its head's numbers.

    Args:
        engine: an LLMEngine or an AsyncLLM.
        tasks: names of the tasks that it says it supports.

    Raises:
        ValueError: it pools for another purpose.
    """
    task = engine.vllm_config.model_config.get_pooling_task(tasks)
    if task not in (CLASSIFY, TOKEN_CLASSIFY):
        raise ValueError(
            f"the engine's pooling task is {task!r}: a step PRM with a head needs {CLASSIFY!r} or {TOKEN_CLASSIFY!r} "
            "(VLLMStepPRM.from_pretrained starts one)"
        )
    return str(task)


def pooling_fields(engine: Any, task: str) -> dict[str, Any]:
    """PoolingParams of a request, by name."""
    pooler = engine.vllm_config.model_config.pooler_config
    whole = task == TOKEN_CLASSIFY and getattr(pooler, "tok_pooling_type", None) != "ALL"
    return {"task": task, "use_activation": False, "skip_reading_prefix_cache": whole}


def read_pooled(ask: PoolRequest, output: Any) -> LogprobAnswer:
    """The answer in a vLLM PoolingRequestOutput."""
    return LogprobAnswer(_last(ask, np.asarray(output.outputs.data.float().cpu())), int(output.num_cached_tokens or 0))


def pooling_body(model: str, ask: PoolRequest) -> dict[str, Any]:
    """Body of a request to /pooling."""
    return {"model": model, "input": list(ask.token_ids), "use_activation": False, "encoding_format": "float"}


def read_pooled_json(ask: PoolRequest, body: Mapping[str, Any]) -> LogprobAnswer:
    """The answer in the JSON of /pooling."""
    details = body.get("usage", {}).get("prompt_tokens_details") or {}
    return LogprobAnswer(_last(ask, np.asarray(body["data"][0]["data"], np.float64)), details.get("cached_tokens") or 0)


def _last(ask: PoolRequest, numbers: np.ndarray) -> np.ndarray:
    """[outputs] of the last token. Raises ValueError where there is another number of them."""
    if not len(numbers):
        raise ValueError("the engine pools no token of the path: its step_tag_id is not that of this format's marker")
    row = numbers if numbers.ndim == 1 else numbers[-1]
    if row.shape != (ask.outputs,):
        raise ValueError(f"the engine gives {row.size} numbers for a token, where this format needs {ask.outputs}")
    return row.astype(np.float32)
