"""tune's pick and confirmation on tables that are worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import RULE, FakePolicy, FakeScorer

from prm_search.evaluation.tuning.confirm import Limit, confirming, contests, verdicts
from prm_search.evaluation.tuning.guidance import plain_config, read_config
from prm_search.evaluation.tuning.pick import Table, affordable, baseline, pick, pick_within
from prm_search.evaluation.tuning.pilot import Pilot, scale_of
from prm_search.evaluation.tuning.race import Dropped, Race
from prm_search.evaluation.tuning.report import write_tuning
from prm_search.evaluation.tuning.run import Asked, Bench
from prm_search.evaluation.tuning.trials import Config, Grid, Scale, Trial
from prm_search.problems import Problem
from prm_search.protocols import RequestFailed, Sampling
from prm_search.strategies import Beam, BestOfN, ByDifficulty, DeepConf, SelfConsistency, Steer
from prm_search.tree import Prompt

SCALE = Scale(tokens=32.0, steps=8.0, seconds=0.001, spread={"prm": {"q": 1.0, "min": 0.25}})


def config(strategy: Any, tokens: int = 512, **fields: Any) -> Config:
    given = {"scorer": "prm", "value": "q", "select": "best", "weight_temperature": 1.0, "tokens": tokens}
    return Config(strategy, **(given | fields))


def table(rows: Sequence[tuple[Config, Sequence[int], float]], difficulty: Sequence[float]) -> Table:
    """Configs with their outcomes and the policy tokens of a problem; a second is a thousand tokens."""
    tokens = np.array([[cost] * len(right) for _, right, cost in rows], float)
    costs = {"policy_tokens": tokens, "prm_tokens": tokens, "reference_tokens": 0 * tokens, "seconds": tokens / 1000}
    return Table(
        tuple(one for one, _, _ in rows), np.array([right for _, right, _ in rows], bool), costs,
        {("prm", "q"): np.array(difficulty)},
    )  # fmt: skip


# Easy problems (a high mean value) are for best-of-N, hard ones for a beam; and so it is in both halves.
EASY, HARD = [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]
DIFFICULTY = [2.0, 2.1, 2.2, 2.3, 0.1, 0.2, 0.3, 0.4]
PLAIN, BEAM = config(BestOfN(16)), config(Beam(3, 4), tokens=384)
BY_BIN = table([(PLAIN, EASY, 512), (BEAM, HARD, 384)], DIFFICULTY)


def test_bins_are_used_where_they_hold_up_on_the_other_half() -> None:
    choice, judged = pick_within(BY_BIN, SCALE, tokens=512, bins=2)
    assert judged == {"uniform": 0.5, "bins": 1.0}
    strategy = choice.config.strategy
    assert isinstance(strategy, ByDifficulty)
    assert strategy.strategies == (Beam(3, 4), BestOfN(16))  # the hardest first
    assert 0.4 <= strategy.thresholds[0] <= 2.0
    assert (choice.bins, choice.config.tokens) == ((1, 0), 512)
    assert choice.config.title() == (
        "by_difficulty thresholds=[1.2] strategies=[beam width=3, best_of_n n=16], q, best"
    )


def test_bins_of_a_smaller_budget_have_the_whole_one_for_their_probe() -> None:
    small = [config(BestOfN(8), tokens=256), config(Beam(2, 4), tokens=256)]
    found = table([(small[0], EASY, 256), (small[1], HARD, 256), (PLAIN, [0] * 8, 512)], DIFFICULTY)
    choice, _ = pick_within(found, SCALE, tokens=512, bins=2)
    assert choice.bins == (1, 0)
    assert choice.config.tokens == 512
    choice, _ = pick_within(found, SCALE, seconds=0.6, bins=2)
    assert choice.config.tokens == 256 + 4 * 32


def test_bins_that_fit_one_half_alone_are_not_used() -> None:
    noise = [0, 1, 0, 1, 1, 0, 1, 0]  # of the problems of one half
    rows = [(PLAIN, [1, 1, 0, 1, 1, 1, 0, 1], 512.0), (BEAM, noise, 384.0)]
    choice, judged = pick_within(table(rows, DIFFICULTY), SCALE, tokens=512, bins=2)
    assert judged["bins"] <= judged["uniform"]
    assert choice.config == PLAIN


def test_a_bin_has_to_leave_room_for_the_probe() -> None:
    full = config(Beam(4, 4))
    choice, judged = pick_within(table([(PLAIN, EASY, 512), (full, HARD, 512)], DIFFICULTY), SCALE, tokens=512, bins=2)
    assert "bins" not in judged  # 512 and 4 x 28 tokens of the probe are more than 512
    assert choice.config in (PLAIN, full)


def test_equals_go_to_the_cheaper_one_and_then_to_the_first() -> None:
    dear, cheap, twin = config(Beam(4, 4)), config(Beam(2, 4), tokens=256), config(Beam(1, 8), tokens=256)
    rows = [(PLAIN, [0] * 8, 512.0), (dear, EASY, 512.0), (cheap, EASY, 256.0), (twin, EASY, 256.0)]
    choice, _ = pick(table(rows, DIFFICULTY), range(4), "policy_tokens", [])
    assert choice.config == cheap


def test_a_budget_keeps_what_was_made_for_it_or_took_no_longer() -> None:
    assert affordable(BY_BIN, tokens=512) == [0, 1]
    assert affordable(BY_BIN, seconds=0.6) == [0, 1]
    with pytest.raises(ValueError, match="no best-of-N is within 400 tokens a problem"):
        affordable(BY_BIN, tokens=400)
    with pytest.raises(ValueError, match=r"no best-of-N is within 0\.4 seconds"):
        affordable(BY_BIN, seconds=0.4)
    with pytest.raises(ValueError, match="one of them is needed"):
        affordable(BY_BIN)


def test_plain_best_of_n_is_the_largest_under_its_best_value() -> None:
    small = config(BestOfN(8), tokens=256)
    other = Config(BestOfN(16), "prm", "min", "best", 1.0, 512)
    vote = config(BestOfN(16), select="majority")
    rows = [(small, [1] * 8, 256.0), (PLAIN, EASY, 512.0), (other, [1] * 5 + [0] * 3, 512.0), (vote, [1] * 8, 512.0)]
    assert baseline(table(rows, DIFFICULTY), range(4), "policy_tokens") == 2


def records(
    trials: Sequence[Trial], right: dict[Config, Sequence[int]], difficulty: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """What a run of these trials would have written."""
    return [
        {
            "index": number * len(next(iter(right.values()))) + place,
            "ways": [
                {"right": bool(right[one][place]), "policy_tokens": 500, "prm_tokens": 80, "reference_tokens": 0,
                 "seconds": 0.1}
                for one in trial.configs
            ],
            "difficulty": {"prm": {"q": 0.0 if difficulty is None else difficulty[place]}},
        }
        for number, trial in enumerate(trials)
        for place in range(len(next(iter(right.values()))))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wins", "losses", "beats"), [(12, 0, True), (12, 10, False), (4, 0, False)], ids=["clear", "even", "few"]
)
def test_the_verdict_says_with_an_interval_whether_anything_beats_best_of_n(
    wins: int, losses: int, beats: bool
) -> None:
    full = config(Beam(4, 4))
    found = contests(table([(PLAIN, EASY, 512), (full, [1] * 8, 512)], DIFFICULTY), SCALE, [Limit(512)], bins=1)
    assert (found[0].plain, found[0].pick.config) == (PLAIN, full)
    trials = confirming(found)
    assert [trial.strategy for trial in trials] == [BestOfN(16), Beam(4, 4)]
    rest = 40 - wins - losses
    right = {PLAIN: [0] * wins + [1] * losses + [1] * rest, full: [1] * wins + [0] * losses + [1] * rest}
    (verdict,) = verdicts(found, trials, records(trials, right), 40)
    assert verdict.comparison.difference == pytest.approx((wins - losses) / 40)
    assert verdict.beats is beats
    assert verdict.chosen == (full if beats else PLAIN)
    assert verdict.sentence.startswith(f"512 tokens: {'beam' if beats else 'nothing beats plain best-of-N'}")
    assert (
        f"[{verdict.comparison.low:+.3f}, {verdict.comparison.high:+.3f}] on 40 held-out problems" in verdict.sentence
    )


def test_a_table_needs_every_record() -> None:
    trials = [Trial(BestOfN(16), None, None, None, (PLAIN,))]
    with pytest.raises(ValueError, match="1 records are missing"):
        Table.of(trials, records(trials, {PLAIN: [1, 0]})[:1], 2)


# -- the race ----------------------------------------------------------------------------------------------------------

SAMPLES = Trial(BestOfN(16), None, None, None, (PLAIN, config(BestOfN(16), select="majority")))
LONG, SHORT = config(Beam(4, 4)), config(Beam(2, 4), tokens=256)
TRIALS = [SAMPLES, *(Trial(one.strategy, "prm", "q", one.tokens, (one,)) for one in (LONG, SHORT))]
ALL, NONE = [1] * 32, [0] * 32


def raced(
    race: Race, right: dict[Config, Sequence[int]], difficulty: Sequence[float] = (0.0,) * 32, **given: Any
) -> Any:
    """The end of a race, whose records come as it asks for them, the last first; and the records."""
    written = {record["index"]: record for record in records(TRIALS, right, difficulty)}
    there: dict[int, dict[str, Any]] = {}
    while (now := race.standing(there, **given)).missing:
        assert not set(now.missing) & set(there)
        assert len(now.missing) <= now.left
        there |= {index: written[index] for index in reversed(now.missing)}
    return now, there


def right(long: Sequence[int], short: Sequence[int], plain: Sequence[int] = ALL) -> dict[Config, Sequence[int]]:
    return {PLAIN: plain, SAMPLES.configs[1]: NONE, LONG: long, SHORT: short}


def test_what_is_clearly_behind_at_a_quarter_is_not_tried_on_the_rest() -> None:
    race = Race(TRIALS, 32, bins=1)
    end, there = raced(race, right(NONE, ALL))
    assert (end.trials, end.dropped) == ((0, 2), (Dropped(1, 8),))
    assert len(there) == 2 * 32 + 8
    found = race.table(there, end.trials)
    assert LONG not in found.configs
    assert found.accuracy().tolist() == [1.0, 0.0, 1.0]  # whole samples stay, the vote among them too
    (line,) = race.dropped_lines(there)
    assert (line[0], line[1].config, line[1].accuracy) == (8, LONG, 0.0)
    assert race.standing(dict(sorted(there.items()))) == end  # in whatever order they came


def test_seven_to_none_is_not_clear_and_eight_at_the_half_are() -> None:
    late = [1, *NONE[1:]]
    assert raced(Race(TRIALS, 32, bins=1), right(late, ALL))[0].dropped == (Dropped(1, 16),)
    even = [1, 0] * 16  # of two that differ as often the one way as the other
    other = [0, 1] * 16
    assert raced(Race(TRIALS, 32, bins=1), right(even, other, other))[0].dropped == ()


def test_the_leader_costs_no_more() -> None:
    end, _ = raced(Race(TRIALS, 32, bins=1), right(ALL, NONE))
    assert end.dropped == ()  # what was made for fewer tokens than all that is better
    cheap = SAMPLES.configs[0]
    assert cheap.tokens > SHORT.tokens
    assert raced(Race(TRIALS, 32, bins=1, cost="seconds"), right(ALL, NONE))[0].dropped == (Dropped(2, 8),)


def test_what_is_best_in_a_bin_of_difficulty_stays() -> None:
    hard = [0.0 if place % 8 == 0 else 1.0 + place % 8 / 8 for place in range(32)]
    plain = [int(place % 8 != 0) for place in range(32)]
    beam = [1 - one for one in plain]
    outcomes = right(beam, beam, plain)
    assert raced(Race(TRIALS, 32, bins=1), outcomes, hard)[0].dropped == (Dropped(1, 16),)
    assert raced(Race(TRIALS, 32, bins=8), outcomes, hard)[0].dropped == ()
    assert raced(Race(TRIALS, 32, bins=8), right(NONE, NONE, plain), hard)[0].dropped == (Dropped(1, 16),)


def test_a_race_leaves_problems_out_and_can_be_switched_off() -> None:
    end, there = raced(Race(TRIALS, 32, bins=1), right(NONE, ALL), left_out={0, 31})
    assert end.dropped == (Dropped(1, 16),)  # seven at the quarter
    assert not {index % 32 for index in there} & {0, 31}
    end, there = raced(Race(TRIALS, 32, bins=1, on=False), right(NONE, ALL))
    assert (end.dropped, len(there)) == ((), 3 * 32)
    assert Race(TRIALS, 20, bins=1).ends == [10, 15, 20]  # of five problems the test can tell nothing


def test_the_page_says_what_was_dropped(tmp_path: Path) -> None:
    race = Race(TRIALS, 32, bins=1)
    end, there = raced(race, right(NONE, ALL))
    found = race.table(there, end.trials)
    held = contests(found, SCALE, [Limit(512)], bins=1)
    trials = confirming(held)
    outcomes = {one: ALL for trial in trials for one in trial.configs}
    judged = verdicts(held, trials, records(trials, outcomes), 32)
    write_tuning(tmp_path, found, judged, {}, title="T", dropped=race.dropped_lines(there))
    page = (tmp_path / "tune.md").read_text()
    assert "## Dropped on the way" in page
    (dropped,) = json.loads((tmp_path / "tune.json").read_text())["dropped"]
    assert (dropped["title"], dropped["problems"], dropped["accuracy"]) == (LONG.title(), 8, 0.0)


def test_a_grid_tries_shapes_of_each_budget_and_reads_votes_off_the_same_trees() -> None:
    trials = Grid((128, 512), ("best_of_n", "beam", "dvts", "steer"), ("q", "min")).trials(SCALE, ["prm"])
    samples, *searches = trials
    assert (samples.strategy, samples.scorer) == (BestOfN(16), None)  # drawn once, at the largest budget
    assert {one.strategy for one in samples.configs} == {BestOfN(4), BestOfN(16)}
    assert {(one.select, one.value) for one in samples.configs} == {
        ("best", "q"), ("best", "min"), ("weighted", "q"), ("weighted", "min"), ("majority", None)
    }  # fmt: skip
    assert {t.strategy for t in searches if t.tokens == 512 and isinstance(t.strategy, Beam)} == {
        Beam(1, 16), Beam(2, 8), Beam(4, 4), Beam(8, 2)
    }  # fmt: skip
    assert {t.strategy for t in searches if isinstance(t.strategy, Steer)} == {
        Steer(alpha, n) for alpha in (0.5, 1.0) for n in (4, 16)
    }
    assert [len(t.configs) for t in searches if isinstance(t.strategy, Beam)] == [1] * 12
    for one in (each for trial in trials for each in trial.configs):
        assert read_config(plain_config(one)) == one


def test_votes_without_a_scorer_are_tried_once_whatever_the_scorers() -> None:
    trials = Grid((128, 512), ("best_of_n", "beam", "self_consistency", "deep_conf"), ("q", "min")).trials(
        Scale(32.0, 8.0, 0.001, {name: {"q": 1.0, "min": 0.25} for name in ("prm", "other")}, 64), ["prm", "other"]
    )
    votes = [trial for trial in trials if isinstance(trial.strategy, SelfConsistency | DeepConf)]
    assert [(trial.strategy, trial.tokens) for trial in votes if trial.tokens == 512] == [
        (SelfConsistency(16, stop="beta"), 512), (SelfConsistency(16, weight="confidence"), 512),
        (DeepConf(4, 32, keep=0.1, window=8), 512), (DeepConf(4, 32, keep=0.9, window=8), 512),
    ]  # fmt: skip
    assert len(votes) == 8
    assert {(trial.scorer, trial.value, trial.whole) for trial in votes} == {(None, None, False)}
    assert [trial.whole for trial in trials].count(True) == 1
    for one in (each for trial in votes for each in trial.configs):
        assert one.select == one.strategy.select
        assert read_config(plain_config(one)) == one


def test_votes_by_confidence_read_what_the_policy_tells() -> None:
    grid = Grid((512,), ("best_of_n", "self_consistency", "deep_conf"), ("q",))
    votes = [trial.strategy for trial in grid.trials(replace(SCALE, top_tokens=5), ["prm"])[1:]]
    assert [getattr(one, "top", None) for one in votes if one.confidence_tokens] == [5, 5, 5]
    assert [trial.strategy for trial in grid.trials(SCALE, ["prm"])[1:]] == [SelfConsistency(16, stop="beta")]
    assert bench().scale([Problem(Prompt(token_ids=(5,)), "a")], ("q",)).top_tokens == FakePolicy().top_tokens


def test_a_vote_that_is_decided_costs_what_it_drew() -> None:
    problems = [Problem(Prompt(token_ids=(5, place)), "a") for place in range(4)]
    agreed = Bench(
        FakePolicy(), {"prm": FakeScorer()}, lambda text, answer: (text, True), lambda text: "same",
        Sampling(RULE, max_new_tokens=12, seed=1),
    )  # fmt: skip
    trials = Grid((600,), ("best_of_n", "self_consistency"), ("q",)).trials(replace(SCALE, top_tokens=4), ["prm"])
    table = Table.of(trials, agreed.records(trials, problems), 4)
    costs = dict(zip(table.configs, table.costs["policy_tokens"].mean(axis=1), strict=True))
    (stopped,) = (cost for one, cost in costs.items() if getattr(one.strategy, "stop", None) == "beta")
    (drawn,) = (cost for one, cost in costs.items() if getattr(one.strategy, "weight", None) == "confidence")
    assert 0 < stopped < drawn / 2  # four equal answers decide
    votes = [config.scorer is None and config.name == "self_consistency" for config in table.configs]
    assert not table.costs["prm_tokens"][votes].any()
    assert set(table.difficulty) == {("prm", "q")}  # of whole samples alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budgets": (0,)}, "budgets"), ({"budgets": ()}, "budgets"), ({"budgets": (8, 8)}, "none twice"),
        ({"budgets": (8,), "strategies": ["beams"]}, "strategies: 'beams' is unknown"),
        ({"budgets": (8,), "values": ["best"]}, "values: 'best' is unknown"),
        ({"budgets": (8,), "alphas": (-1.0,)}, "alphas"),
    ],
)  # fmt: skip
def test_a_grid_names_what_makes_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**fields)


def bench(policy: FakePolicy | None = None, **given: Any) -> Bench:
    return Bench(
        policy or FakePolicy(), {"prm": FakeScorer()}, lambda text, answer: (text, text.endswith(answer)),
        lambda text: text[-1:], Sampling(RULE, max_new_tokens=24, seed=1), **given,
    )  # fmt: skip


def test_a_run_goes_on_where_it_was_stopped_and_batches_change_nothing() -> None:
    problems = [Problem(Prompt(token_ids=(5, place)), "a") for place in range(5)]
    scale = bench().scale(problems, ("q", "min"))
    assert scale.tokens > 1
    trials = Grid((60,), ("best_of_n", "beam", "particle_filter"), ("q", "min")).trials(scale, ["prm"])
    whole = {record["index"]: record for record in bench(batch=5).records(trials, problems, {})}
    assert set(whole) == set(range(len(trials) * 5))
    half = {index: record for index, record in whole.items() if index % 2}
    rest = {record["index"]: record for record in bench(batch=2).records(trials, problems, half)}
    assert set(rest) == set(whole) - set(half)

    def told(record: dict[str, Any]) -> Any:
        ways = [{name: value for name, value in way.items() if name != "seconds"} for way in record["ways"]]
        return record | {"ways": ways}

    assert all(told(rest[index]) == told(whole[index]) for index in rest)
    found = Table.of(trials, [*half.values(), *rest.values()], 5)
    searches = np.array([config.name != "best_of_n" for config in found.configs])
    assert (found.costs["policy_tokens"][searches] <= 60).all()


def test_equal_prompts_of_a_run_that_goes_on_draw_what_they_would_have_drawn() -> None:
    problems = [Problem(Prompt(token_ids=(5, 1)), "a")] * 3
    trial = Trial(BestOfN(3), None, None, None, (config(BestOfN(3), select="majority", scorer=None, value=None),))
    whole = {record["index"]: record for record in bench().records([trial], problems)}
    assert len({record["ways"][0]["policy_tokens"] for record in whole.values()}) > 1
    (last,) = bench().records([trial], problems, whole.keys() - {2})
    assert last["ways"][0] | {"seconds": 0} == whole[2]["ways"][0] | {"seconds": 0}


def test_the_scale_is_the_same_in_whatever_order_problems_end() -> None:
    asked = {place: Asked(Prompt(token_ids=(5, place)), 0, "a") for place in range(6)}
    pilot = [{"problem": place, **outcome} for place, outcome in bench().outcomes(Pilot(("q", "min")), asked)]
    scales = [scale_of(records, ["prm"], ("q", "min")) for records in (pilot, pilot[::-1])]
    assert scales[0] == scales[1]
    with pytest.raises(ValueError, match="no problem of the pilot was answered"):
        scale_of([], ["prm"], ("q",))


class Failing(FakePolicy):
    """Gives up on whatever it is asked about one prompt, as an endpoint does."""

    def failures(self) -> list[tuple[Any, RequestFailed]]:
        asked = [request for request in self.requests if request.node.tree.prompt_ids == (5, 2)]
        return [(request, RequestFailed("HTTP 500")) for request in asked]


def test_a_problem_that_the_policy_gives_up_on_is_named_once_and_has_no_further_records() -> None:
    problems = [Problem(Prompt(token_ids=(5, place)), "a") for place in range(4)]
    failed: list[tuple[int, str]] = []
    scale = bench(Failing()).scale(problems, ("q", "min"), on_failure=lambda *each: failed.append(each))
    trials = Grid((60,), ("best_of_n", "beam"), ("q", "min")).trials(scale, ["prm"])
    found = list(bench(Failing()).records(trials, problems, on_failure=lambda *each: failed.append(each)))
    assert failed == [(2, "a request failed: HTTP 500")] * 2  # of the pilot, and of the first trial
    assert {record["problem"] for record in found} == {0, 1, 3}
    assert len(found) == 3 * len(trials)
    assert Table.of(trials, found, 4, {2}).right.shape[1] == 3
    with pytest.raises(RequestFailed, match="HTTP 500"):
        list(bench(Failing()).records(trials, problems))
    with pytest.raises(RequestFailed, match="HTTP 500"):
        bench(Failing()).scale(problems, ("q",))


def test_fewer_samples_are_the_first_of_more() -> None:
    problems = [Problem(Prompt(token_ids=(5, place)), "a") for place in range(6)]
    few, many = (config(BestOfN(n), tokens=n) for n in (2, 6))
    alone = Trial(BestOfN(2), None, None, None, (few,))
    together = Trial(BestOfN(6), None, None, None, (few, many))
    one, both = (sorted(bench().records([t], problems, {}), key=lambda r: r["problem"]) for t in (alone, together))
    for a, b in zip(one, both, strict=True):
        for name in ("right", "policy_tokens"):
            assert a["ways"][0][name] == b["ways"][0][name]
        assert b["ways"][0]["policy_tokens"] < b["ways"][1]["policy_tokens"]


def test_a_bench_needs_a_scorer() -> None:
    with pytest.raises(ValueError, match="scorers is empty"):
        Bench(FakePolicy(), {}, lambda text, answer: (text, True), str, Sampling(RULE))
