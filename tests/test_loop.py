"""SearchLoop.run, encode_all and Usage: what search, generate and evaluation share."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from fakes import Clock, FakePolicy, FakeScorer, ids

from prm_search.driver.loop import Job, SearchLoop
from prm_search.driver.search_settings import SearchSettings
from prm_search.prompt import Prompt, numbered
from prm_search.search import encode_all, search
from prm_search.steps import StepRule
from prm_search.strategies import Beam
from prm_search.tree import SearchTree
from prm_search.usage import Usage

SETTINGS = SearchSettings.make(strategy=Beam(2, 2), steps=StepRule(";", 6), max_new_tokens=24, temperature=1.0)
PROMPTS = ["a", "ab", "a", "b;", "ba"]


def jobs() -> list[Job]:
    encoded = encode_all(PROMPTS, lambda prompt: prompt.with_ids(ids(prompt.text or "")))
    return [Job(prompt, SETTINGS, occurrence, place) for place, (prompt, occurrence) in enumerate(encoded)]


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_every_job_is_given_out_with_the_result_that_search_gives(batch: int) -> None:
    wanted = search(
        PROMPTS, policy=FakePolicy(), scorer=FakeScorer(), strategy=Beam(2, 2), steps=StepRule(";", 6),
        max_new_tokens=24, temperature=1.0,
    )  # fmt: skip
    with SearchLoop(FakePolicy(), FakeScorer()) as loop:
        found = {job.place: result for job, result in loop.run(jobs(), batch)}
        assert not loop.active
    assert [found[place].tree.to_json() for place in range(len(PROMPTS))] == [each.tree.to_json() for each in wanted]


def test_no_more_than_batch_are_under_way_and_jobs_are_asked_for_one_by_one() -> None:
    policy, asked, begun = FakePolicy(), [], []

    def lazily() -> Iterator[Job]:
        for job in jobs():
            asked.append(job.place)
            yield job

    def seen(job: Job, tree: SearchTree) -> None:
        assert all(request.node.tree is not tree for request in policy.requests)  # nothing is drawn for it yet
        begun.append((job.place, tree.prompt_ids))
        assert len(policy.trees) <= 1  # the one that goes on beside it

    with SearchLoop(policy, FakeScorer()) as loop:
        for job, result in loop.run(lazily(), 2, seen):
            assert (job.place, result.tree.prompt_ids) in begun
            assert len(asked) <= len(begun) <= 5
    assert [place for place, _ in begun] == asked == [0, 1, 2, 3, 4]
    assert policy.trees == set()


def test_a_caller_that_stops_listening_leaves_nothing_behind() -> None:
    policy = FakePolicy()
    with SearchLoop(policy, FakeScorer()) as loop:
        next(loop.run(jobs(), 3))
    assert (policy.trees, policy.requests) == (set(), {})


def test_searches_that_are_under_way_already_are_in_the_way() -> None:
    with SearchLoop(FakePolicy()) as loop:
        loop.add(Prompt(token_ids=(97,)), SETTINGS)
        with pytest.raises(ValueError, match="other searches"):
            next(loop.run(jobs(), 2))


def test_the_seconds_of_jobs_are_shares_of_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(tick=1.0)
    monkeypatch.setattr("prm_search.driver.loop.time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    with SearchLoop(FakePolicy(), FakeScorer(), clock=lambda: 0.0) as loop:
        spent = [job.seconds for job, _ in loop.run(jobs(), 2)]
    assert sum(spent) == pytest.approx(clock.now / 2)  # a step reads it twice and takes one second
    assert min(spent) >= 1


def test_committed_is_empty_once_a_search_has_ended() -> None:
    with SearchLoop(FakePolicy(), FakeScorer()) as loop:
        tree = loop.add(Prompt(token_ids=(97,)), SETTINGS)
        while loop.active:
            loop.step()
        assert loop.committed(tree) == []


def test_equal_prompts_are_numbered_and_wrong_ones_are_named() -> None:
    assert [count for _, count in numbered([Prompt(token_ids=(i,)) for i in (1, 2, 1, 1, 2)])] == [0, 0, 1, 2, 1]

    def encode(prompt: Prompt) -> Prompt:
        if prompt.text == "bad":
            raise ValueError("no room")
        return prompt.with_ids([1])

    assert [(prompt.token_ids, n) for prompt, n in encode_all(["a", "b"], encode)] == [((1,), 0), ((1,), 1)]
    with pytest.raises(ValueError, match=r"^prompts\[1\]: no room"):
        encode_all(["a", "bad"], encode)
    with pytest.raises(TypeError, match=r"^line 2: prompt must be"):
        encode_all(["a", 5], encode, lambda place: f"line {place + 1}")


def test_usages_are_added_name_by_name() -> None:
    one = Usage({"policy": 1}, {"prm": 2}, {}, {"prm": 3}, {"policy": 4}, {"policy": 0.5})
    two = Usage({"policy": 10, "d": 0}, {"prm": 20, "reference": 5}, {"prm": 7}, {}, {"scorer": 1}, {"policy": 0.25})
    assert one + two == Usage(
        {"policy": 11, "d": 0}, {"prm": 22, "reference": 5}, {"prm": 7}, {"prm": 3}, {"policy": 4, "scorer": 1},
        {"policy": 0.75},
    )  # fmt: skip
    assert sum([one, two], Usage()) == one + two
    assert (one.of_role("prm"), one.of_role("policy")) == (5, 0)
