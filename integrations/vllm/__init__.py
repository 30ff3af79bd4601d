"""vLLM: token steering inside its engine, step search over it, and reward-guided beams behind its server.

Importing this imports no vLLM; the names below do, on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "AsyncVLLMPolicy": ".policy",
    "VLLMImplicitPRM": ".scorer",
    "VLLMPolicy": ".policy",
    "VLLMServer": ".server",
    "VLLMStepPRM": ".step_prm",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    member = globals()[name] = getattr(import_module(_PUBLIC[name], __name__), name)
    return member


def __dir__() -> list[str]:
    return list(__all__)


if TYPE_CHECKING:
    from prm_search.integrations.vllm.policy import AsyncVLLMPolicy as AsyncVLLMPolicy, VLLMPolicy as VLLMPolicy
    from prm_search.integrations.vllm.scorer import VLLMImplicitPRM as VLLMImplicitPRM
    from prm_search.integrations.vllm.server import VLLMServer as VLLMServer
    from prm_search.integrations.vllm.step_prm import VLLMStepPRM as VLLMStepPRM
