"""Reward-guided decoding with implicit process rewards. Start at `search`; docs/index.md has the overview."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

# At once (it has no torch): a later import of the submodule `search` would put that in the place of the function.
from .search import Result, asearch, search

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
    "AdaptiveBranch": ".strategies",
    "MCTS": ".strategies",
    "ParticleFilter": ".strategies",
    "ByDifficulty": ".strategies",
    "Rebase": ".strategies",
    "SelfConsistency": ".strategies",
    "DraftPolicy": ".policies.draft",
    "PolicyPool": ".policies.joint",
    "DeepConf": ".strategies",
    "Steer": ".strategies",
    "Expand": ".strategies",
    "Parallel": ".strategies",
    "Strategy": ".strategies",
    "Budget": ".driver.budget",
    "Calibrated": ".calibration",
    "Calibration": ".calibration",
    "ConstantReference": ".scorers.implicit.implicit_prm",
    "Driver": ".driver.driver",
    "HFPolicy": ".policies.hf",
    "Ensemble": ".scorers.ensemble",
    "GenerativeVerifier": ".scorers.explicit.verifier",
    "ImplicitPRM": ".scorers.implicit.implicit_prm",
    "Judge": ".scorers.explicit.judge",
    "JudgeFormat": ".scorers.explicit.judge_formats",
    "Backoff": ".policies.endpoint.retry",
    "OpenAIPolicy": ".policies.endpoint.policy",
    "OutcomeRM": ".scorers.explicit.outcome_rm",
    "PRMFormat": ".scorers.explicit.formats",
    "StepPRM": ".scorers.explicit.step_prm",
    "StepScores": ".scorers.explicit.step_scores",
    "Node": ".tree",
    "PRMGuidance": ".guidance",
    "Policy": ".protocols",
    "Prompt": ".tree",
    "ReplayPolicy": ".policies.replay",
    "ReplayScorer": ".scorers.replay",
    "Sampling": ".protocols",
    "Scorer": ".protocols",
    "Scores": ".scorers.implicit.implicit_prm",
    "SearchTree": ".tree",
    "VerifierFormat": ".scorers.explicit.verifier_formats",
    "Steered": ".policies.hf",
    "StepRule": ".steps",
    "Usage": ".usage",
    "disable": ".integrations.huggingface",
    "enable": ".integrations.huggingface",
    "generate": ".integrations.huggingface",
}
_MODULES = ("answers", "integrations", "steps", "strategies", "triton_kernels", "values")

__all__ = ["Result", "__version__", "asearch", "search", *_PUBLIC, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        member = getattr(import_module(_PUBLIC[name], __name__), name)
    elif name in _MODULES:
        member = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = member
    return member


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    # "as": re-exported for type checkers
    from .calibration import Calibrated as Calibrated, Calibration as Calibration
    from .driver.budget import Budget as Budget
    from .driver.driver import Driver as Driver
    from .guidance import PRMGuidance as PRMGuidance
    from .integrations.huggingface import disable as disable, enable as enable, generate as generate
    from .policies.draft import DraftPolicy as DraftPolicy
    from .policies.endpoint.policy import OpenAIPolicy as OpenAIPolicy
    from .policies.endpoint.retry import Backoff as Backoff
    from .policies.hf import HFPolicy as HFPolicy, Steered as Steered
    from .policies.joint import PolicyPool as PolicyPool
    from .policies.replay import ReplayPolicy as ReplayPolicy
    from .protocols import Policy as Policy, Sampling as Sampling, Scorer as Scorer
    from .scorers.ensemble import Ensemble as Ensemble
    from .scorers.explicit.formats import PRMFormat as PRMFormat
    from .scorers.explicit.judge import Judge as Judge
    from .scorers.explicit.judge_formats import JudgeFormat as JudgeFormat
    from .scorers.explicit.outcome_rm import OutcomeRM as OutcomeRM
    from .scorers.explicit.step_prm import StepPRM as StepPRM
    from .scorers.explicit.step_scores import StepScores as StepScores
    from .scorers.explicit.verifier import GenerativeVerifier as GenerativeVerifier
    from .scorers.explicit.verifier_formats import VerifierFormat as VerifierFormat
    from .scorers.implicit.implicit_prm import (
        ConstantReference as ConstantReference,
        ImplicitPRM as ImplicitPRM,
        Scores as Scores,
    )
    from .scorers.replay import ReplayScorer as ReplayScorer
    from .steps import StepRule as StepRule
    from .strategies import (
        DVTS as DVTS,
        MCTS as MCTS,
        AdaptiveBranch as AdaptiveBranch,
        Beam as Beam,
        BestOfN as BestOfN,
        ByDifficulty as ByDifficulty,
        DeepConf as DeepConf,
        Expand as Expand,
        Lookahead as Lookahead,
        Parallel as Parallel,
        ParticleFilter as ParticleFilter,
        Rebase as Rebase,
        SelfConsistency as SelfConsistency,
        Steer as Steer,
        Strategy as Strategy,
    )
    from .tree import Node as Node, Prompt as Prompt, SearchTree as SearchTree
    from .usage import Usage as Usage
