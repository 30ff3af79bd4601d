"""Runs on Ray: records are the same whatever the number of workers, their order and their deaths."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import RULE, FakePolicy, ids, sampling
from records import lines, untimed, write
from workers import (
    Doomed,
    Poisoned,
    Strict,
    cannot_load,
    first_letter,
    killed_while_loading,
    last_vote,
    scorer,
    text_of,
    two_machines,
)

from prm_search import distributed
from prm_search.commands.records import Item
from prm_search.commands.tune_run import halves
from prm_search.demo import chains, pair_dir
from prm_search.distributed import Cluster, ClusterBench, ClusterError, FailedProblems
from prm_search.evaluation import Plan, evaluate
from prm_search.evaluation.tuning.pick import Table, pick_within
from prm_search.evaluation.tuning.run import Bench
from prm_search.evaluation.tuning.trials import Config, Grid, Trial
from prm_search.problems import Problem
from prm_search.strategies import BestOfN
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
    expected = zip(alone.splitlines(keepends=True), places, strict=True)
    assert rolled(crew(1), done=done) == "".join(line for line, place in expected if place not in done)


@pytest.mark.parametrize("error", [None, RuntimeError("the device is gone")], ids=["killed", "raised"])
def test_a_poisoned_problem_fails_alone_after_three_tries(crew, alone, notices, tmp_path, error):
    place = next(i for i, problem in enumerate(PROBLEMS) if problem.prompt.token_ids == ids("p"))
    failures: list[distributed.Failure] = []
    found = rolled(crew(1), policy=partial(Poisoned, str(tmp_path), error), batch=4, on_failure=failures.append)
    expected = alone.splitlines(keepends=True)
    assert found == "".join(line for i, line in enumerate(expected) if i // N != place)
    assert [failure.place for failure in failures] == [place]
    assert ("died" if error is None else "RuntimeError: the device is gone") in failures[0].reason
    beside = [path.read_text() for path in sorted(tmp_path.iterdir())]
    # A process that is killed takes its last records with it. The driver may not know then that the problem had begun.
    assert len(beside) == 3 or (error is None and len(beside) == 4)
    assert beside[-1] == repr([ids("p")])
    assert "failed 3 times" in notices[-1]


def test_without_on_failure_the_run_ends_with_the_failed_problems(crew, tmp_path):
    with crew(1) as cluster:
        policy = partial(Poisoned, str(tmp_path), ValueError("no such letter"))  # after which the worker goes on
        flow = distributed.rollout(PROBLEMS[4:7], cluster=cluster, policy=policy, batch=1, **HOW)
        drawn = [next(flow).problem for _ in range(2 * N)]
        with pytest.raises(FailedProblems, match=r"problems\[1\] failed: worker 0 on 127.0.0.1: no such letter"):
            next(flow)
    assert sorted(drawn) == [0] * N + [2] * N
    assert len(list(tmp_path.iterdir())) == 3


def test_a_problem_that_kills_its_only_worker_three_times_is_not_the_workers_fault(crew, tmp_path):
    with crew(1) as cluster:
        policy = partial(Poisoned, str(tmp_path), None)
        with pytest.raises(FailedProblems, match=r"problems\[0\] failed: worker 0 on 127.0.0.1: died"):
            next(distributed.rollout([PROBLEMS[5]], cluster=cluster, policy=policy, **HOW))
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
        with pytest.raises(ClusterError, match=r"^every worker was lost 5 times in a row: died"):
            next(flow)
    assert sum("while it loaded its models" in line for line in notices) == 5


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
    told: list[Any] = []
    records = evaluated(
        crew(3),
        policy=partial(Doomed, str(tmp_path / "mark"), 40),
        tell=text_of,
        on_told=lambda *each: told.append(each),
    )
    assert records == text(map(untimed, evaluated_alone))
    assert (tmp_path / "mark").exists()
    assert len(notices) == 1
    units = PLAN.units(5, ["prm", "other"])
    assert sorted(units.index(unit) for unit, _ in told) == list(range(len(units)))  # each once
    for unit, (shown, policy, names) in told:
        assert (policy, names) == ("Doomed", ["prm", "other"])
        if unit.kind != "samples":
            assert shown == evaluated_alone[units.index(unit)]["response"]


def test_an_evaluation_goes_on_from_its_samples(crew, evaluated_alone):
    """Searches are cut at the tokens of samples that an earlier run drew."""
    done = {record["index"]: record for record in evaluated_alone if record["kind"] == "samples" or record["index"] % 3}
    rest = [record for record in evaluated_alone if record["index"] not in done]
    assert evaluated(crew(1), done=done) == text(map(untimed, rest))


def test_what_is_told_needs_somebody_who_listens(crew):
    with crew(1) as cluster, pytest.raises(ValueError, match="tell and on_told belong together"):
        distributed.evaluate(PROBLEMS, cluster=cluster, policy=FakePolicy, plan=PLAN, judge=first_letter, tell=text_of)


def test_a_scorer_has_the_name_of_its_records(crew):
    with crew(1) as cluster, pytest.raises(ClusterError, match="the one under 'other' is named 'prm'"):
        evaluated(cluster, scorers={"other": scorer})


# -- trials ------------------------------------------------------------------------------------------------------------


GRID = Grid((60,), ("best_of_n", "beam", "particle_filter"), ("q", "min"))
RULES: dict[str, Any] = {"judge": first_letter, "answer": last_vote, "sampling": sampling(seed=5)}


def tuned(bench: Any, **given: Any) -> str:
    """The scale, the records by their indices, and the configuration that they make best, as text."""
    scale = bench.scale(PROBLEMS, GRID.values, **given)
    trials = GRID.trials(scale, bench.names)
    records = sorted(bench.records(trials, PROBLEMS, **given), key=lambda record: record["index"])
    lost = [place for place in range(len(PROBLEMS)) if all(record["problem"] != place for record in records)]
    picked = pick_within(Table.of(trials, records, len(PROBLEMS), lost), scale, tokens=60, bins=2)
    return text([untimed(scale.card()), *map(untimed, records)]) + repr(picked)


@pytest.fixture(scope="module")
def tuned_alone() -> str:
    return tuned(Bench(FakePolicy(), {"prm": scorer()}, **RULES))


def bench_of(cluster: Cluster, **given: Any) -> Any:
    return ClusterBench(
        **{"cluster": cluster, "policy": FakePolicy, "scorers": {"prm": scorer}, "batch": 2} | RULES | given
    )


def test_trials_and_the_pick_are_those_of_one_process_though_a_worker_dies(crew, tuned_alone, notices, tmp_path):
    for workers, policy in ((1, FakePolicy), (2, partial(Doomed, str(tmp_path / "mark"), 60))):
        with crew(workers) as cluster, bench_of(cluster, policy=policy) as bench:
            assert tuned(bench) == tuned_alone
    assert (tmp_path / "mark").exists()
    assert len(notices) == 1


def test_a_problem_of_trials_that_poisons_fails_alone_and_by_its_place(crew, tmp_path):
    place = next(i for i, problem in enumerate(PROBLEMS) if problem.prompt.token_ids == ids("p"))
    trial = Trial(BestOfN(2), None, None, None, (Config(BestOfN(2), None, None, "majority", 1.0, 60),))
    others = [each for each in range(len(PROBLEMS)) if each != place]
    failed: dict[int, str] = {}
    policy = partial(Poisoned, str(tmp_path), ValueError("no such letter"))  # after which the worker goes on
    with crew(2) as cluster, bench_of(cluster, policy=policy, batch=4) as bench:
        records = list(bench.records([trial], PROBLEMS, on_failure=failed.__setitem__))
    alone = Bench(FakePolicy(), {"prm": scorer()}, **RULES).records([trial], PROBLEMS, wanted=set(others))
    assert sorted(untimed(records), key=lambda record: record["index"]) == sorted(
        untimed(list(alone)), key=lambda record: record["index"]
    )
    assert list(failed) == [place]
    assert failed[place].endswith(": no such letter")
    assert len(list(tmp_path.iterdir())) == 3


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """The demo's pair and policy, computing in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("exact") / "pair"
    shutil.copytree(pair_dir(), folder)
    for name in ("policy", "prm"):
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(workdir: Path) -> Path:
    """A folder with problems and responses, where commands run."""
    asked = chains.problems(5, split="prm", length=3)
    rows = [{"id": f"p{i}", "question": each.prompt, "answer": each.answer} for i, each in enumerate(asked)]
    write("problems.jsonl", rows)
    answers = [";".join(f"a+{i}={i}" for i in range(1, 2 + k)) for k in range(5)]
    write("responses.jsonl", [{"prompt": each.prompt, "response": answers[k]} for k, each in enumerate(asked)])
    Path("judging.py").write_text("def right(text, answer):\n    return text.rstrip().endswith(answer)\n")
    return workdir


PROCESS = r"#[0-9a-f]+\.[0-9]+"  # names the process whose model drew a step


def nameless(records: list[dict[str, Any]]) -> list[str]:
    """Records as text, without the process."""
    return [re.sub(PROCESS, "", text([untimed(record)])) for record in records]


def test_the_commands_give_the_files_of_one_process(machines, run, folder, pair):
    on_ray = ("--ray", machines, "--gpus-per-worker", "0", "--workers")
    sampled = ("--policy", pair / "policy", "--data", "problems.jsonl", "--max-new-tokens", "24", "--batch", "2")
    commands = {
        "rollout": ("rollout", *sampled, "--n", "2", "--label", "judging.py:right"),
        "score": ("score", "--pair", pair, "--data", "responses.jsonl", "--batch", "2", "--json"),
        "eval": ("eval", *sampled, "--pair", pair, "--label", "exact", "--budgets", "1,2",
                 "--strategies", "best_of_n,beam"),
    }  # fmt: skip
    for name, command in commands.items():
        records = "records.jsonl" if name == "eval" else ""
        kept = [("--html", f"{out}.html", "--record", f"{out}.draws") if name == "eval" else () for out in ("l", "r")]
        status, printed, error = run(*command, "--out", "here", *kept[0])
        assert status == 0, error
        status, on_workers, error = run(*command, "--out", "there", *kept[1], *on_ray, 2 if name == "rollout" else 1)
        assert status == 0, error
        here, there = lines(Path("here", records)), lines(Path("there", records))
        assert [record["index"] for record in there] == list(range(len(here)))
        assert text(map(untimed, there)) == text(map(untimed, here))
        if name == "score":
            assert on_workers == printed
        if name == "eval":
            trees = [nameless(lines(f"{out}/trees.jsonl")) for out in ("here", "there")]
            assert trees[0] == trees[1]
            assert [json.loads(tree)["index"] for tree in trees[0]] == list(range(len(here)))
            drawn = [sorted(nameless(lines(f"{out}.draws"))) for out in ("l", "r")]
            assert drawn[0] == drawn[1]
            assert len(drawn[0]) == len(here)
            shown = [re.findall(r'"text":\[[^]]*\]', Path(page).read_text()) for page in ("l.html", "r.html")]
            assert shown[0] == shown[1]
            assert len(shown[0]) == len(here)
        for path in (Path("here"), Path("there")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_tune_writes_what_one_process_does_and_leaves_out_what_fails(machines, run, folder, pair):
    """One problem more, of which the judge knows nothing: all else is as without it."""
    rows = [{"question": each.prompt, "answer": each.answer} for each in chains.problems(7, split="gate", length=3)]
    choosing, confirm = halves([Item("", Prompt(text=row["question"])) for row in rows])
    assert (len(choosing), len(confirm)) == (4, 3)
    bad = next(i for i, row in enumerate(rows) if row["question"] == choosing[1].prompt.text)
    write("all.jsonl", [row | {"answer": "none"} if i == bad else row for i, row in enumerate(rows)])
    write("six.jsonl", rows[:bad] + rows[bad + 1 :])
    Path("judging.py").write_text(
        "def right(text, answer):\n    if answer == 'none':\n        raise ValueError('no answer is right')\n"
        "    return text.rstrip().endswith(answer)\n"
    )
    command = (
        "tune", "--policy", pair / "policy", "--pair", pair, "--label", "judging.py:right", "--strategies",
        "best_of_n,beam", "--values", "min", "--max-new-tokens", "24", "--budget", "32", "--bins", "1",
    )  # fmt: skip
    status, _, error = run(*command, "--data", "six.jsonl", "--out", "here")
    assert status == 0, error
    on_ray = ("--ray", machines, "--gpus-per-worker", "0", "--workers", "1")
    status, _, error = run(*command, "--data", "all.jsonl", "--out", "there", *on_ray)
    assert status == 2
    line = f"all.jsonl, line {bad + 1}"
    assert f"{line} failed: worker 0 on 127.0.0.1: no answer is right" in error
    assert error.splitlines()[-1] == f"prm-search: 1 of 7 failed and were left out: {line}"
    for name in ("trials.jsonl", "confirm.jsonl"):
        here, there = lines(Path("here", name)), lines(Path("there", name))
        assert [record["index"] for record in there] == sorted(record["index"] for record in there)
        kept = [record for record in there if name == "confirm.jsonl" or record["problem"] != 1]
        for record in (*here, *kept):
            del record["index"], record["key"], record["problem"]
        assert text(map(untimed, kept)) == text(map(untimed, here))
    assert Path("there", "guidance.yaml").read_text() == Path("here", "guidance.yaml").read_text()
    page = Path("there/tune.md").read_text()
    assert f"left out, since they failed: {line}" in page
    status, _, error = run(*command, "--data", "all.jsonl", "--out", "there", "--report-only")
    assert status == 0, error
    assert Path("there/tune.md").read_text() == page


def test_a_response_that_cannot_be_scored_fails_alone_by_its_line(machines, run, folder, pair):
    bad = {"prompt": "=1a?", "response": [10**6]}
    write("responses.jsonl", [*lines("responses.jsonl")[:3], bad])
    status, printed, error = run(
        "score", "--pair", pair, "--data", "responses.jsonl", "--out", "scores", "--json", "--ray", machines,
        "--workers", "1", "--gpus-per-worker", "0",
    )  # fmt: skip
    assert status == 2
    assert [record["index"] for record in lines("scores")] == [0, 1, 2]
    assert len(printed.splitlines()) == 3
    assert "responses.jsonl, line 4 failed: " in error
    assert error.splitlines()[-1] == "prm-search: 1 of 4 failed: responses.jsonl, line 4"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--workers", "2"), "--workers needs --ray"),
        (("--gpus-per-worker", "1"), "--gpus-per-worker needs --ray"),
        (("--ray", "--workers", "0"), "--workers 0: at least 1 is needed"),
        (("--ray", "nowhere"), "--ray: address='127.0.0.2:1': this process is connected to"),
        (("--ray", "--workers", "99"), "--workers: workers=99, gpus_per_worker=1: the cluster has room for 2 workers"),
    ],
)
def test_command_lines_that_make_no_sense(machines, run, folder, options, line):
    status, _, error = run("rollout", "--policy", "demo", "--data", "problems.jsonl", "--out", "out", *options)
    assert status == 2
    assert line.replace("127.0.0.2:1", options[1]) in error
    assert len(error.splitlines()) == 1
    assert not Path("out").exists()


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
