"""Models by recipe: what a worker is sent in place of a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..protocols import Policy, Scorer

Load = Callable[[], Any]  # a function without arguments that loads a model where it is called


def policy_loader(policy: str | Load) -> Load:
    """A function that loads the policy of that name, or the one that was passed.

    Raises:
        TypeError: policy is a model, which is not sent to workers, or neither a name nor a function.
    """
    return _loader("policy", policy, Policy, _hf_policy)


def scorer_loader(scorer: str | Load, name: str = "prm") -> Load:
    """The same of a scorer, which a name or folder stands for as load_scorer reads it; `name` is of its rewards."""
    return _loader("scorer", scorer, Scorer, partial(_scorer, name=name))


def _loader(name: str, value: str | Load, kind: Any, load: Callable[[str], Any]) -> Load:
    if isinstance(value, str):
        return partial(load, value)
    if isinstance(value, kind) or not callable(value):
        raise TypeError(
            f"{name} must be a name, or a function without arguments that loads it in each worker, got "
            f"{type(value).__name__}: models are not sent to workers"
        )
    return value


def _hf_policy(name: str) -> Any:
    from ..models.placement import placement
    from ..policies.hf import HFPolicy

    return HFPolicy.from_pretrained(name, **placement())


def _scorer(model: str, name: str) -> Any:
    from ..models.placement import placement
    from ..scorers.load import load_scorer

    return load_scorer(model, name=name, **placement())
