"""Runs on Ray: records are the same whatever the number of workers, their order and their deaths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import RULE, FakePolicy, FakeScorer, ids, sampling
from records import untimed
from workers import Doomed, Poisoned, Strict, cannot_load, first_letter, killed_while_loading, last_vote, scorer, two_machines

from prm_search import distributed
from prm_search.distributed import Cluster, ClusterError, FailedProblems
from prm_search.evaluation import Plan, evaluate
from prm_search.problems import Problem
from prm_search.training.rollouts import sample_rollouts
from prm_search.tree import Prompt

pytest.importorskip("ray")

PROBLEMS = [Problem(Prompt(token_ids=ids(text)), "b") for text in ("x", "y", "z", "y", "xy", "p", "ab", "x", "q", "zz")]
N = 3
HOW: dict[str, Any] = {"n": N, "sampling": sampling(seed=5), "label": first_letter}
PLAN = Plan(
    strategies=("greedy", "majority", "best_of_n", "beam"), budgets=(1, 4), seeds=(0, 7), steps=RULE, max_new_tokens=24
)  # fmt: skip


@pytest.fixture(scope="module")
def machines() -> Iterator[str]:
    """Two logical machines of four CPUs, to which this process is connected while the file runs."""
    with two_machines(cpus=4) as address, Cluster(address, workers=1):
        yield address


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def crew(machines: str, notices: list[str]) -> Any:
    """A Cluster of some workers."""
    return lambda workers: Cluster(machines, workers=workers, notice=notices.append)


def rolled(cluster: Cluster, **given: Any) -> str:
    """Records of distributed rollouts by their indices, as text."""
    with cluster:
        drawn = list(distributed.rollout(PROBLEMS, **{"cluster": cluster, "policy": FakePolicy, "batch": 2} | HOW | given))
    return text(sample.record() for sample in sorted(drawn, key=lambda sample: (sample.problem, sample.sample)))


def text(records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def alone() -> str:
    """What one process gives."""
    drawn = sample_rollouts(PROBLEMS, policy=FakePolicy(), **HOW)
    return text(sample.record() for sample in sorted(drawn, key=lambda sample: (sample.problem, sample.sample)))


def test_one_two_and_four_workers_give_the_bytes_of_one_process(crew, alone, notices):
    for workers in (1, 2, 4):
        cluster = crew(workers)
        assert rolled(cluster) == alone
        assert cluster.forward_calls > 0
    assert notices == []


def test_a_worker_killed_in_the_middle_changes_no_byte(crew, alone, notices, tmp_path):
    mark = tmp_path / "mark"
    assert rolled(crew(2), policy=partial(Doomed, str(mark), 8)) == alone
    assert mark.exists()
    assert len(notices) == 1
