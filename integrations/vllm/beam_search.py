"""Beam search inside vLLM keeps no extra arguments: a request that wants it and steering too is refused by name.

vLLM makes BeamSearchParams of such a request, which have no `extra_args`, and samples beams by requests of its own: the
logits processor never learns that steering was asked for. The one place that still has both is the HTTP request.
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from typing import Any

from prm_search.integrations.vllm.steering_config import REQUEST_KEYS

_SERVER = "vllm.entrypoints.openai"
_REQUESTS = (
    (f"{_SERVER}.completion.protocol", "CompletionRequest"),
    (f"{_SERVER}.chat_completion.protocol", "ChatCompletionRequest"),
)


def refuse_steered_beams() -> None:
    """Make vLLM's HTTP requests refuse prm_* arguments beside use_beam_search. Nothing to do where no server runs.

    LLM.beam_search needs no such care: its parameters take no extra arguments.
    """
    if not any(name.startswith(_SERVER) for name in sys.modules):
        return
    for module, name in _REQUESTS:
        request = getattr(import_module(module), name)
        make = getattr(request, "to_beam_search_params", None)
        if make is not None and not hasattr(make, "refuses_steering"):
            request.to_beam_search_params = _careful(make)


def _careful(make: Any) -> Any:
    @functools.wraps(make)
    def to_beam_search_params(request: Any, *args: Any, **options: Any) -> Any:
        keys = [key for key in REQUEST_KEYS if key in (request.vllm_xargs or {})]
        if keys:
            raise ValueError(
                f"{', '.join(keys)}: vLLM's beam search keeps no extra arguments, so use_beam_search cannot be "
                "steered or observed; leave one of the two out (a search by reward is prm_guidance)"
            )
        return make(request, *args, **options)

    to_beam_search_params.refuses_steering = True  # type: ignore[attr-defined]
    return to_beam_search_params
