"""Search strategies. Adding one = one file here and one entry in `STRATEGIES`."""

from __future__ import annotations

from .adaptive_branch import AdaptiveBranch
from .base import Expand, Parallel, Run, Strategy
from .beam import Beam
from .best_of_n import BestOfN
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
    "self_consistency": SelfConsistency,
    "deep_conf": DeepConf,
    "steer": Steer,
}

__all__ = [
    "DVTS", "MCTS", "STRATEGIES", "AdaptiveBranch", "Beam", "BestOfN", "DeepConf", "Expand", "Lookahead", "Parallel",
    "ParticleFilter", "Rebase", "Run", "SelfConsistency", "Steer", "Strategy", "resolve_strategy",
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
