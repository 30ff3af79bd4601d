"""Reward-guided decoding with implicit process rewards. See DESIGN in docs/ and `search`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("prm-search")
except PackageNotFoundError:  # a checkout on sys.path without an install
    __version__ = "0+unknown"

# Public name -> module. Imported on first use, so that `import prm_search` needs neither torch nor transformers.
_PUBLIC = {
    "BestOfN": ".strategies",
    "Beam": ".strategies",
    "DVTS": ".strategies",
    "Lookahead": ".strategies",
    "Steer": ".strategies",
    "Expand": ".strategies",
    "Parallel": ".strategies",
    "Strategy": ".strategies",
    "Budget": ".budget",
    "Driver": ".driver",
    "HFPolicy": ".policy",
    "ImplicitPRM": ".implicit_prm",
    "Node": ".tree",
    "PRMGuidance": ".guidance",
    "Policy": ".protocols",
    "Prompt": ".tree",
    "Result": ".search",
    "Sampling": ".protocols",
    "Scorer": ".protocols",
    "Scores": ".implicit_prm",
    "SearchTree": ".tree",
    "Steered": ".policy",
    "StepRule": ".steps",
    "Usage": ".usage",
    "asearch": ".search",
    "disable": ".integrations.huggingface",
    "enable": ".integrations.huggingface",
    "generate": ".integrations.huggingface",
    "search": ".search",
}
_MODULES = ("answers", "integrations", "steps", "strategies", "triton_kernels", "values")

__all__ = ["__version__", *_PUBLIC, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        found = getattr(import_module(_PUBLIC[name], __name__), name)
    elif name in _MODULES:
        found = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from .budget import Budget
    from .driver import Driver
    from .guidance import PRMGuidance
    from .implicit_prm import ImplicitPRM, Scores
    from .integrations.huggingface import disable, enable, generate
    from .policy import HFPolicy, Steered
    from .protocols import Policy, Sampling, Scorer
    from .search import Result, asearch, search
    from .steps import StepRule
    from .strategies import DVTS, Beam, BestOfN, Expand, Lookahead, Parallel, Steer, Strategy
    from .tree import Node, Prompt, SearchTree
    from .usage import Usage
