"""Schedule: what is handed out, losses and tries, without any process. And clusters that are not there."""

from __future__ import annotations

import socket
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from prm_search.distributed.cluster import Cluster, ClusterError
from prm_search.distributed.schedule import TRIES, Loss, Schedule


def test_a_worker_holds_what_it_works_on_and_as_much_again_and_is_filled_up_by_halves():
    schedule = Schedule(range(100), workers=2, batch=4)
    assert schedule.next(0) == tuple(range(8))
    assert schedule.next(0) == ()
    schedule.finished(0, 0)
    assert schedule.next(0) == ()  # not for each problem
    schedule.finished(0, 2)
    assert schedule.next(0) == (8, 9)


def test_towards_the_end_workers_hold_no_more_than_their_share():
    schedule = Schedule(range(10), workers=4, batch=4)
    assert [schedule.next(worker) for worker in range(4)] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)]
    for place in (0, 1, 2):
        schedule.finished(0, place)
    assert schedule.next(0) == ()
    assert schedule.active


def test_only_problems_that_may_have_been_under_way_use_a_try():
    schedule = Schedule(range(40), workers=1, batch=4, ahead=16)
    assert schedule.next(0) == tuple(range(20))
    for place in (0, 2):
        schedule.finished(0, place)
    assert schedule.lost(0, "died") == Loss((1, 3, 4, 5), (), tuple(range(6, 20)))
    assert [schedule.next(worker) for worker in (1, 2, 3)] == [(1, 3), (4, 5), tuple(range(6, 26))]
    assert schedule.next(1) == ()  # nothing beside what may kill


def test_the_last_try_is_alone():
    schedule = Schedule(range(9), workers=1, batch=9)
    schedule.next(0)
    assert schedule.lost(0, "first").retried == tuple(range(9))
    assert schedule.next(0) == (0, 1, 2)
    schedule.finished(0, 1)
    assert schedule.lost(0, "second") == Loss((0, 2))
    assert [schedule.next(worker) for worker in range(5)] == [(3, 4, 5), (6, 7, 8), (0,), (2,), ()]
    assert schedule.lost(2, "third") == Loss((), (0,))
    assert schedule.failed == {0: "third"}


def test_a_refused_problem_fails_at_once():
    schedule = Schedule([4, 7], workers=1, batch=2)
    assert schedule.next(0) == (4, 7)
    schedule.refused(0, 4, "too long")
    assert schedule.failed == {4: "too long"}
    schedule.finished(0, 7)
    assert not schedule.active


@given(st.data())
def test_every_problem_ends_once_and_only_poison_fails(data):
    """Workers take chunks, finish problems in order and die in any order; some problems kill whoever has them."""
    problems = data.draw(st.integers(0, 30))
    workers, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    poison = data.draw(st.sets(st.integers(0, max(problems - 1, 0)), max_size=3)) if problems else set()
    schedule = Schedule(range(problems), workers=workers, batch=batch)
    finished, deaths, tries = Counter[int](), 0, Counter[int]()
    while schedule.active:
        worker = data.draw(st.integers(0, workers - 1))
        schedule.next(worker)
        held = schedule.held(worker)
        if not held:
            continue
        begun = held[:batch]
        deadly = [place for place in begun if place in poison]
        if deadly:
            tries.update(deadly)
            loss = schedule.lost(worker, "died")
            assert set(loss.retried) | set(loss.failed) == set(begun)
            assert set(loss.failed) <= set(deadly)
            assert len(begun) == 1 or not loss.failed
            deaths += 1
        else:
            schedule.finished(worker, begun[0])
            finished[begun[0]] += 1
    assert finished == Counter(set(range(problems)) - poison)
    assert set(schedule.failed) == poison
    assert all(tries[place] == TRIES for place in poison)
    assert deaths <= TRIES * len(poison)


@pytest.mark.parametrize("name", ["workers", "batch", "ahead"])
def test_numbers_below_one_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name}=0: an integer >= 1"):
        Schedule([1], **{"workers": 1, "batch": 1, name: 0})


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="stands in the list twice"):
        Schedule([1, 1], workers=1, batch=1)
    schedule = Schedule([1], workers=1, batch=1)
    schedule.next(0)
    with pytest.raises(KeyError):
        schedule.finished(1, 1)


# -- clusters that are not there ---------------------------------------------------------------------------------------


def test_an_address_that_nobody_answers_at():
    pytest.importorskip("ray")
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(ClusterError) as raised, Cluster(address):
            pass
    assert str(raised.value) == f"address={address!r}: no Ray cluster answers there (Connection refused)"


@pytest.mark.parametrize("address", ["nowhere", "host:port", "host:0", ":6379", "host:99999"])
def test_addresses_that_are_none(address):
    pytest.importorskip("ray")
    with pytest.raises(ClusterError, match="HOST:PORT, auto or local is needed"), Cluster(address):
        pass


def test_ray_client_is_refused():
    pytest.importorskip("ray")
    with pytest.raises(ClusterError, match="Ray Client is not supported"), Cluster("ray://127.0.0.1:10001"):
        pass


def test_versions_of_ray_that_differ_are_one_line(monkeypatch):
    ray = pytest.importorskip("ray")

    def init(**options: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9\n    Python: 3.9\n")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError) as raised, Cluster("local"):
        pass
    assert str(raised.value) == (
        "address='local': Version mismatch: The cluster was started with: Ray: 2.9 Python: 3.9"
    )


@pytest.mark.parametrize("gpus", [-1, 1.5, float("inf"), True, "1"])
def test_gpus_that_cannot_be(gpus):
    with pytest.raises(ValueError, match=r"^gpus_per_worker="):
        Cluster(gpus_per_worker=gpus)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'prm-search\[ray\]'"), Cluster():
        pass
