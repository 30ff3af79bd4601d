"""Many machines: rollouts, evaluations and scores by workers that Ray starts.

`rollout`, `evaluate`, `evaluate_responses` and `score` do what the functions of the same names elsewhere do, on a
`Cluster`; `ClusterBench` does what the Bench of tune does. Ray is imported when a Cluster is opened.
"""

from __future__ import annotations

from .cluster import Cluster, ClusterError, Failure
from .evaluate import evaluate, evaluate_responses
from .rollout import rollout
from .runs import FailedProblems
from .score import score
from .tune import ClusterBench

__all__ = [
    "Cluster", "ClusterBench", "ClusterError", "FailedProblems", "Failure", "evaluate", "evaluate_responses", "rollout",
    "score",
]  # fmt: skip
