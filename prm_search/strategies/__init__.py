"""Search strategies. Adding one = one file here and one entry in `STRATEGIES`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .adaptive_branch import AdaptiveBranch
from .base import Expand, Parallel, Run, Strategy
from .beam import Beam
from .best_of_n import BestOfN
from .by_difficulty import ByDifficulty
from .deep_conf import DeepConf
from .dvts import DVTS
from .lookahead import Lookahead
from .mcts import MCTS
from .particle_filter import ParticleFilter
from .rebase import Rebase
from .self_consistency import SelfConsistency
from .steer import Steer

STRATEGIES: dict[str, type[Strategy]] = {
    "best_of_n": BestOfN,
    "beam": Beam,
    "lookahead": Lookahead,
    "dvts": DVTS,
    "particle_filter": ParticleFilter,
    "mcts": MCTS,
    "adaptive_branch": AdaptiveBranch,
    "rebase": Rebase,
    "by_difficulty": ByDifficulty,
    "self_consistency": SelfConsistency,
    "deep_conf": DeepConf,
    "steer": Steer,
}

__all__ = [
    "DVTS", "MCTS", "STRATEGIES", "AdaptiveBranch", "Beam", "BestOfN", "ByDifficulty", "DeepConf", "Expand",
    "Lookahead", "Parallel", "ParticleFilter", "Rebase", "Run", "SelfConsistency", "Steer", "Strategy",
    "named_strategy", "plain_strategy", "resolve_strategy",
]  # fmt: skip


def resolve_strategy(strategy: Strategy | str) -> Strategy:
    """A strategy, or the default configuration of the one with this name.

    Raises:
        ValueError: no strategy has this name.
        TypeError: it is neither a name nor an object with a `run(root)`.
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r} is unknown; it is one of {', '.join(sorted(STRATEGIES))}")
        return STRATEGIES[strategy]()
    if isinstance(strategy, type) or not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be a name or a configured strategy such as Beam(width=4), got {strategy!r}")
    return strategy


def named_strategy(fields: Mapping[str, Any]) -> Strategy:
    """The strategy that plain values say: its "name", and any of its fields beside it. A bin's strategy is such an
    object too.

    Raises:
        ValueError: no strategy has this name, a field is unknown, or a value is out of range.
        TypeError: a value is of the wrong kind.
    """
    values = dict(fields)
    name = str(values.pop("name", None)).replace("-", "_")
    kind = type(resolve_strategy(name))
    own = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in own:
            raise ValueError(f"strategy: {key} is no field of {name}; it has {', '.join(own)}")
    if kind is ByDifficulty and isinstance(values.get("strategies"), list | tuple):
        values["strategies"] = [
            named_strategy(inner) if isinstance(inner, Mapping) else resolve_strategy(inner)
            for inner in values["strategies"]
        ]
    return kind(**values)


def plain_strategy(strategy: Strategy) -> dict[str, Any]:
    """Return what `named_strategy` reads: the name, and the fields that differ from their defaults.

    Raises:
        ValueError: it is none of STRATEGIES, or its value is a function.
    """
    name = next((name for name, kind in STRATEGIES.items() if type(strategy) is kind), None)
    if name is None:
        raise ValueError(f"{strategy!r} is none of the library's strategies, so a file cannot name it")
    plain: dict[str, Any] = {"name": name}
    for field in dataclasses.fields(strategy):  # type: ignore[arg-type]
        value = getattr(strategy, field.name)
        if callable(value):
            raise ValueError(f"{strategy!r}: a file cannot hold the function {field.name}")
        if value != field.default:
            plain[field.name] = _listed(value)
    return plain


def _listed(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return [plain_strategy(item) if isinstance(item, Strategy) else item for item in value]
