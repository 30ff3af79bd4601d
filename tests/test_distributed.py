"""Runs on Ray: records are the same whatever the number of workers, their order and their deaths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from fakes import RULE, FakePolicy, ids, sampling
from records import untimed
from workers import (
    Doomed,
    Poisoned,
    Strict,
    cannot_load,
    first_letter,
    killed_while_loading,
    last_vote,
    scorer,
    two_machines,
)

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
    """Two logical machines of four CPUs and a GPU that is not there; this process is connected to them."""
    with two_machines(cpus=4, gpus=1) as address, Cluster(address, workers=1):
        yield address


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def crew(machines: str, notices: list[str]) -> Any:
    """A Cluster of some workers."""
    return lambda workers: Cluster(machines, workers=workers, gpus_per_worker=0, notice=notices.append)


def rolled(cluster: Cluster, **given: Any) -> str:
    """Records of distributed rollouts by their indices, as text."""
    with cluster:
        drawn = list(
            distributed.rollout(PROBLEMS, **{"cluster": cluster, "policy": FakePolicy, "batch": 2} | HOW | given)
        )
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
    assert notices[0].startswith("worker ")
    assert "died" in notices[0]
    assert "to be tried again" in notices[0]
    assert "\n" not in notices[0]


def test_what_is_done_already_is_left_out_and_equal_prompts_still_draw_differently(crew, alone):
    places = [(i, k) for i in range(len(PROBLEMS)) for k in range(N)]
    done = {(i, k) for i, k in places if (i + k) % 2 or i == 3}
    lines = zip(alone.splitlines(keepends=True), places, strict=True)
    assert rolled(crew(1), done=done) == "".join(line for line, place in lines if place not in done)


@pytest.mark.parametrize("error", [None, "the device is gone"], ids=["killed", "raised"])
def test_a_poisoned_problem_fails_alone_after_three_tries(crew, alone, notices, tmp_path, error):
    place = next(i for i, problem in enumerate(PROBLEMS) if problem.prompt.token_ids == ids("p"))
    failures: list[distributed.Failure] = []
    found = rolled(crew(1), policy=partial(Poisoned, str(tmp_path), error), batch=4, on_failure=failures.append)
    lines = alone.splitlines(keepends=True)
    assert found == "".join(line for i, line in enumerate(lines) if i // N != place)
    assert [failure.place for failure in failures] == [place]
    assert (error or "died") in failures[0].reason
    beside = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert len(beside) == 3
    assert beside[2] == repr([ids("p")])
    assert "failed 3 times" in notices[-1]


def test_without_on_failure_the_run_ends_with_the_failed_problems(crew, tmp_path):
    with crew(1) as cluster:
        policy = partial(Poisoned, str(tmp_path), "gone")
        flow = distributed.rollout(PROBLEMS[4:7], cluster=cluster, policy=policy, batch=1, **HOW)
        drawn = [next(flow).problem for _ in range(2 * N)]
        with pytest.raises(FailedProblems, match=r"problems\[1\] failed: worker 0 on 127.0.0.1: RuntimeError: gone"):
            next(flow)
    assert sorted(drawn) == [0] * N + [2] * N
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unfit_prompt_is_refused_by_its_place_before_anything_is_drawn(crew, notices):
    with crew(2) as cluster, pytest.raises(ValueError, match=r"^problems\[9\]: zz is no prompt$"):
        next(distributed.rollout(PROBLEMS, cluster=cluster, policy=Strict, **HOW))
    assert notices == []


def test_workers_that_cannot_load_end_the_run_with_one_line(crew, notices):
    with crew(1) as cluster:
        flow = distributed.rollout(PROBLEMS, cluster=cluster, policy=partial(cannot_load, "no such folder"), **HOW)
        with pytest.raises(ClusterError, match=r"^worker \d: no such folder$"):
            next(flow)
        flow = distributed.rollout(PROBLEMS, cluster=cluster, policy=killed_while_loading, **HOW)
        with pytest.raises(ClusterError, match=r"^every worker was lost 3 times in a row: died"):
            next(flow)
    assert sum("while it loaded its models" in line for line in notices) == 3


# -- evaluation and scores ---------------------------------------------------------------------------------------------


def evaluated(cluster: Cluster, **given: Any) -> str:
    options = {
        "policy": FakePolicy, "scorers": {"prm": scorer, "other": partial(scorer, "other")}, "plan": PLAN,
        "judge": first_letter, "answer": last_vote, "batch": 3, "cluster": cluster,
    }  # fmt: skip
    with cluster:
        records = list(distributed.evaluate(PROBLEMS[:5], **options | given))
    return text(map(untimed, sorted(records, key=lambda record: record["index"])))


@pytest.fixture(scope="module")
def evaluated_alone() -> list[dict[str, Any]]:
    flow = evaluate(
        PROBLEMS[:5], policy=FakePolicy(), scorers=[scorer(), scorer("other")], plan=PLAN, judge=first_letter,
        answer=last_vote,
    )  # fmt: skip
    return sorted(flow, key=lambda record: record["index"])


def test_an_evaluation_is_that_of_one_process_though_a_worker_dies(crew, evaluated_alone, notices, tmp_path):
    assert evaluated(crew(3), policy=partial(Doomed, str(tmp_path / "mark"), 40)) == text(map(untimed, evaluated_alone))
    assert (tmp_path / "mark").exists()
    assert len(notices) == 1


def test_an_evaluation_goes_on_from_its_samples(crew, evaluated_alone):
    """Searches are cut at the tokens of samples that an earlier run drew."""
    done = {record["index"]: record for record in evaluated_alone if record["kind"] == "samples" or record["index"] % 3}
    rest = [record for record in evaluated_alone if record["index"] not in done]
    assert evaluated(crew(1), done=done) == text(map(untimed, rest))


def test_a_scorer_has_the_name_of_its_records(crew):
    with crew(1) as cluster, pytest.raises(ClusterError, match="the one under 'other' is named 'prm'"):
        evaluated(cluster, scorers={"other": scorer})


# -- what a cluster cannot do ------------------------------------------------------------------------------------------


def test_a_worker_that_does_not_see_its_gpu_says_so(machines):
    with Cluster(machines, workers=1) as cluster, pytest.raises(ClusterError) as raised:
        next(distributed.rollout(PROBLEMS, cluster=cluster, policy=FakePolicy, **HOW))
    assert "worker 0: gpus_per_worker=1: Ray assigned GPU 0, and torch sees 0" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"workers": 3, "gpus_per_worker": 1}, "workers=3, gpus_per_worker=1: the cluster has room for 2 workers"),
        ({"workers": 1, "gpus_per_worker": 2}, "the cluster has room for 0 workers; each takes 1 CPU and 2 GPUs, and "),
        ({"workers": 9, "gpus_per_worker": 0}, "room for 8 workers; each takes 1 CPU and 0 GPUs, and 127.0.0.1 has 4"),
    ],
)
def test_workers_for_which_there_is_no_room(machines, options, line):
    with pytest.raises(ClusterError) as raised, Cluster(machines, **options):
        pass
    assert line in str(raised.value)


def test_numbers_of_workers_by_default(machines):
    with Cluster(machines) as cluster:
        assert (cluster.workers, cluster.gpus_per_worker) == (2, 1)
    with Cluster(machines, gpus_per_worker=0.25) as cluster:
        assert cluster.workers == 8
    with Cluster(machines, gpus_per_worker=0) as cluster:
        assert cluster.workers == 2


def test_versions_other_than_the_drivers_are_refused(crew, monkeypatch):
    monkeypatch.setattr("prm_search.distributed.crew.versions", lambda: {"prm-search": "9.9", "numpy": None})
    with crew(1) as cluster, pytest.raises(ClusterError) as raised:
        next(distributed.rollout(PROBLEMS, cluster=cluster, policy=FakePolicy, **HOW))
    assert "worker 0: versions differ from the driver's: prm-search " in str(raised.value)
    assert " here, 9.9 there; numpy " in str(raised.value)


def test_another_address_than_the_one_this_process_is_connected_to(machines):
    with pytest.raises(ClusterError, match=r"is connected to 127\.0\.0\.1:"), Cluster("127.0.0.2:1"):
        pass


@pytest.mark.parametrize("policy", [FakePolicy(), 3])
def test_a_model_is_not_sent_to_workers(crew, policy):
    with crew(1) as cluster, pytest.raises(TypeError, match=r"^policy must be a name, or a function"):
        distributed.rollout(PROBLEMS, cluster=cluster, policy=policy, **HOW)


def test_a_cluster_that_is_not_open():
    with pytest.raises(ValueError, match="cluster is not open"):
        distributed.rollout(PROBLEMS, cluster=Cluster(), policy=FakePolicy, **HOW)
