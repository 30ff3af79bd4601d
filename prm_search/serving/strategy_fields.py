"""The strategy of a request: its options as fields of the body, and how many children it draws at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ..strategies import STRATEGIES, BestOfN, Expand, Parallel, Run, Steer, Strategy
from ..tree import Prompt, SearchTree
from .errors import RequestError, invalid, too_large
from .limits import Limits
from .request_fields import named_within
from .schema import GuidanceBody

TOKENS = ("window", "top")  # options of strategies that count tokens, not children


def strategy_of(guide: GuidanceBody, limits: Limits) -> tuple[Strategy, float | None]:
    """The strategy, and the strength of steering. Steer is BestOfN over a steered policy, here as in `search`."""
    name = guide.strategy
    if name not in STRATEGIES:
        raise invalid("prm_guidance.strategy", f"{name!r} is unknown; it is one of {', '.join(STRATEGIES)}")
    made = STRATEGIES[name]
    fields, names = _fields(name)
    options = {}
    for option, value in (guide.model_extra or {}).items():
        param = f"prm_guidance.{option}"
        if option not in names:
            message = f"strategy {name!r} has no such option; it takes {', '.join(names)}"
            raise RequestError(400, f"{param}: {message}", param=param, code="unknown_parameter")
        if isinstance(value, list | dict):
            raise invalid(param, f"a {type(value).__name__} is not taken here")
        if isinstance(fields[names[option]].default, bool) and not isinstance(value, bool):
            raise invalid(param, f"true or false is needed, got {value!r:.80}")
        if isinstance(value, int) and value > limits.children and names[option] not in TOKENS:
            raise too_large(param, f"{value}: at most {limits.children} here")
        if value is not None or "None" in str(fields[names[option]].type):  # null is a value of some options
            options[names[option]] = value
    strategy = named_within("prm_guidance", lambda: made(**options), {own: option for option, own in names.items()})
    most = children(strategy)
    if most > limits.children:
        raise too_large("prm_guidance", f"{most} children at once: at most {limits.children} here")
    if isinstance(strategy, Steer) and strategy.candidates is not None:
        if guide.alpha is not None:
            raise invalid("prm_guidance.alpha", "steer with candidates chooses tokens, and has no use for a strength")
        return strategy, None
    if isinstance(strategy, Steer) and strategy.below is not None:
        raise invalid("prm_guidance.below", "it needs candidates beside it here")
    if not isinstance(strategy, Steer):
        alpha = None if guide.alpha is None else named_within("prm_guidance", lambda: Steer(guide.alpha)).alpha  # type: ignore[arg-type]
        return strategy, alpha
    alpha = 1.0 if guide.alpha is None else guide.alpha
    return BestOfN(strategy.n), named_within("prm_guidance", lambda: Steer(alpha)).alpha


def _fields(name: str) -> tuple[dict[str, dataclasses.Field[Any]], dict[str, str]]:
    """The fields of a strategy, and what a request calls those that it may set: "lookahead_steps" is "steps"."""
    made = STRATEGIES[name]
    fields = {field.name: field for field in dataclasses.fields(made)}  # type: ignore[arg-type]
    own = [
        field_name for field_name in fields if field_name != "value" and (made is not Steer or field_name != "alpha")
    ]
    names = {
        f"{name}_{field_name}" if field_name in GuidanceBody.model_fields else field_name: field_name
        for field_name in own
    }
    return fields, names


def strategy_options(name: str) -> Iterator[tuple[str, str, Any]]:
    """The options of a strategy that a plain value can say: what a request calls each, its kind, its default.

    Args:
        name: of the strategy.

    Yields:
        (option, "bool", "number" or "text", default).
    """
    fields, names = _fields(name)
    for option, field_name in names.items():
        default, declared = fields[field_name].default, str(fields[field_name].type)
        if isinstance(default, bool):
            yield option, "bool", default
        elif isinstance(default, int | float) or (default is None and declared.startswith(("int", "float"))):
            yield option, "number", default
        elif isinstance(default, str):
            yield option, "text", default


def children(strategy: Strategy) -> int:
    """Children that a strategy draws at once, rollouts of each included."""
    return _first(strategy.run(SearchTree(Prompt(token_ids=(0,))).root)) * getattr(strategy, "rollouts", 1)


def _first(run: Run) -> int:
    try:
        ask = next(run)
    except StopIteration:
        return 0
    finally:
        run.close()
    if isinstance(ask, Parallel):
        return sum(map(_first, ask.runs))
    assert isinstance(ask, Expand)
    return len(ask.nodes) * ask.n if isinstance(ask.n, int) else sum(ask.n)
