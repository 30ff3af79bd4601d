"""evaluate, summarise and write_report: on a policy and scorers with known answers, and on the demo pair."""

from __future__ import annotations

import json
import sys
from collections import Counter
from statistics import fmean

import pytest
from fakes import RULE, FakePolicy, FakeScorer, ids
from records import untimed

import prm_search as ps
from prm_search.evaluation import Cell, Plan, compare, evaluate, outcomes, summarise, write_report
from prm_search.evaluation.plan import shape
from prm_search.evaluation.report import markdown
from prm_search.evaluation.responses import Answered, Response, evaluate_responses
from prm_search.evaluation.samples import Sample, choose
from prm_search.evaluation.statistics import clustered_wilson, pass_at_k
from prm_search.strategies import Beam, Lookahead
from prm_search.training.rollouts import Problem
from prm_search.tree import Prompt

PROBLEMS = [Problem(Prompt(token_ids=ids(text)), "b") for text in ("x", "y", "z", "y")]
EVERY = ("greedy", "majority", "best_of_n", "weighted", "beam", "lookahead")


def answer(text: str) -> str | None:
    """The last letter."""
    return next((c for c in reversed(text) if c in "ab"), None)


def judge(text: str, reference: str) -> tuple[str | None, bool]:
    return answer(text), answer(text) == reference


def plan(**given: object) -> Plan:
    options = {
        "strategies": EVERY, "budgets": (4, 1, 8), "seeds": (0, 7), "values": ("q", "min"), "steps": RULE,
        "max_new_tokens": 24,
    }  # fmt: skip
    return Plan(**options | given)


def run(problems=PROBLEMS, **given: object) -> list[dict]:
    options = {"policy": FakePolicy(), "scorers": FakeScorer(), "plan": plan(), "judge": judge, "answer": answer}
    return list(evaluate(problems, **options | given))


def in_order(records: list[dict]) -> list[dict]:
    return sorted(records, key=lambda record: record["index"])


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return run()


# -- records -----------------------------------------------------------------------------------------------------------


def test_one_record_a_unit(records):
    units = plan().units(len(PROBLEMS), ["prm"])
    assert sorted(record["index"] for record in records) == list(range(len(units)))
    for record in records:
        unit = units[record["index"]]
        assert (record["kind"], record["problem"], record["seed"]) == (unit.kind, unit.problem, unit.seed)
    # greedy once; two seeds of samples and of 2 strategies x 2 values x 3 budgets
    assert Counter(record["kind"] for record in records) == {"greedy": 4, "samples": 8, "search": 96}
    json.dumps(records, allow_nan=False)


def test_samples_are_the_draws_of_best_of_n(records):
    results = ps.search(
        [p.prompt for p in PROBLEMS], policy=FakePolicy(), scorer=FakeScorer(), strategy=ps.BestOfN(8), steps=RULE,
        max_new_tokens=24, temperature=1.0, seed=7,
    )  # fmt: skip
    for record in (r for r in records if r["kind"] == "samples" and r["seed"] == 7):
        result = results[record["problem"]]
        drawn = Counter((n.path_text(), n.q, n.end, n.finish) for n in result.candidates for _ in range(n.count))
        got = Counter((s["text"], s["values"]["prm"]["q"], s["tokens"], s["finish"]) for s in record["samples"])
        assert got == drawn
        assert record["scoring"]["prm"]["prm_tokens"] == result.usage.encoded_tokens["prm"]
        assert record["scoring"]["prm"]["reference_tokens"] == result.usage.encoded_tokens["reference"]


def test_first_samples_are_what_a_smaller_budget_draws_and_pays_for(records):
    fewer = {(r["problem"], r["seed"]): r for r in run(plan=plan(budgets=(4,))) if r["kind"] == "samples"}
    for record in (r for r in records if r["kind"] == "samples"):
        small = fewer[record["problem"], record["seed"]]
        assert record["samples"][:4] == small["samples"]
        scored = record["prompt_tokens"] + sum(s["new_tokens"] for s in record["samples"][:4])
        assert scored == small["scoring"]["prm"]["prm_tokens"]
        at_four = [each for each in record["chosen"] if each["n"] == 4]
        assert at_four == small["chosen"]
    ours, theirs = outcomes(records), outcomes(run(plan=plan(budgets=(4,))))
    cell = Cell("best_of_n", 4, "prm", "min")
    costs = [sorted((o.problem, o.seed, o.policy_tokens, o.prm_tokens) for o in x[cell]) for x in (ours, theirs)]
    for one, other in zip(*costs, strict=True):
        assert one == pytest.approx(other)


def test_equal_problems_draw_differently(records):
    first, second = (
        next(r["samples"] for r in records if r["kind"] == "samples" and r["problem"] == i) for i in (1, 3)
    )
    assert [s["text"] for s in first] != [s["text"] for s in second]


def test_a_search_samples_no_more_than_its_samples(records):
    samples = {(r["problem"], r["seed"]): r["samples"] for r in records if r["kind"] == "samples"}
    found = [r for r in records if r["kind"] == "search"]
    for record in found:
        allowed = sum(s["tokens"] for s in samples[record["problem"], record["seed"]][: record["n"]])
        assert record["budget_tokens"] == allowed
        assert 0 < record["policy_tokens"] <= allowed
    assert any(record["stopped"] == "tokens" for record in found)  # the budget bites somewhere


def test_an_uncapped_search_runs_to_its_end(records):
    free = [r for r in run(plan=plan(capped=False)) if r["kind"] == "search"]
    cut = {r["index"] for r in records if r["kind"] == "search" and r["stopped"] == "tokens"}
    assert cut
    for record in free:
        assert record["budget_tokens"] is None
        assert record["stopped"] != "tokens"
    bounded = {r["index"]: r["policy_tokens"] for r in records if r["kind"] == "search"}
    assert all(r["policy_tokens"] >= bounded[r["index"]] for r in free)
    assert any(r["policy_tokens"] > bounded[r["index"]] for r in free if r["index"] in cut)


def test_a_beam_of_one_is_a_sample(records):
    cells = outcomes(records)
    for value in ("q", "min"):
        for strategy in ("beam", "best_of_n"):
            one = cells[Cell(strategy, 1, "prm", value)]
            assert {(o.problem, o.seed, o.right, o.policy_tokens) for o in one} == {
                (o.problem, o.seed, o.right, o.policy_tokens) for o in cells[Cell("majority", 1)]
            }


def test_a_cut_response_is_wrong_and_does_not_vote():
    found = run(plan=plan(max_new_tokens=2, strategies=("greedy", "majority")), judge=lambda text, right: (right, True))
    cut = [s for r in found if r["kind"] == "samples" for s in r["samples"] if s["finish"] == "length"]
    assert cut
    assert all((s["answer"], s["right"]) == (None, False) for s in cut)
    summary = summarise(found)
    drawn = [s for r in found if r["kind"] == "samples" for s in r["samples"]]
    assert (summary.samples, summary.full_samples) == (len(drawn), len(cut))
    greedy = [r["finish"] == "length" for r in found if r["kind"] == "greedy"]
    assert summary.row("greedy", 1).full == fmean(greedy)
    one = summary.row("majority", 1)
    assert one.full == fmean(r["samples"][0]["finish"] == "length" for r in found if r["kind"] == "samples") > 0
    page = markdown(summary)
    assert f"**{len(cut)} of {len(drawn)} samples** ended at the length limit" in page
    assert f"{one.seconds:.1f}* |  | {one.full:.0%} |" in page  # a share of eight samples' seconds


def test_batches_and_what_is_done_change_nothing(records):
    assert untimed(in_order(run(batch=1))) == untimed(in_order(records))
    done = {r["index"]: r for r in records if r["index"] % 3 == 0 or r["kind"] == "samples"}
    rest = run(done=done)
    assert {r["index"] for r in rest} == set(range(len(records))) - set(done)
    assert untimed(in_order([*rest, *done.values()])) == untimed(in_order(records))


def test_a_record_is_given_out_when_it_is_finished():
    policy = FakePolicy()
    flow = evaluate(PROBLEMS, policy=policy, scorers=FakeScorer(), plan=plan(), judge=judge, answer=answer, batch=1)
    next(flow)
    calls = policy.forward_calls
    next(flow)
    assert policy.forward_calls > calls
    flow.close()
    assert not policy.trees


def test_pairs_share_the_samples():
    one, other = FakeScorer(name="one"), FakeScorer(name="other")
    policy = FakePolicy()
    both = run(policy=policy, scorers=[one, other])
    drawn = policy.forward_calls
    alone = run(policy=(single := FakePolicy()), scorers=FakeScorer(name="other"), plan=plan())
    cells, of_other = outcomes(both), outcomes(alone)
    for cell, found in of_other.items():
        assert [(o.problem, o.seed, o.right, o.prm_tokens) for o in cells[cell]] == [
            (o.problem, o.seed, o.right, o.prm_tokens) for o in found
        ]
    assert {cell.pair for cell in cells} == {None, "one", "other"}
    assert drawn < 2 * single.forward_calls
    assert not one.trees
    assert not other.trees


BAD = {
    "no scorer": ({"scorers": []}, ValueError, "scorers is empty: best_of_n"),
    "one name": ({"scorers": [FakeScorer(), FakeScorer()]}, ValueError, "scorers are named"),
    "no scorer at all": ({"scorers": [3]}, TypeError, "scorers"),
    "policy": ({"policy": 3}, TypeError, "policy"),
    "batch": ({"batch": 0}, ValueError, "batch=0"),
    "answer": ({"answer": "any"}, ValueError, "answer='any'"),
    "prompt": ({"policy": FakePolicy(context=1)}, ValueError, r"prompts\[0\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_before_anything_is_sampled(case):
    given, kind, word = BAD[case]
    options = {"policy": FakePolicy(), "scorers": FakeScorer(), "plan": plan(), "judge": judge, "answer": answer}
    with pytest.raises(kind, match=word):
        evaluate(PROBLEMS, **options | given)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"strategies": ("best",)}, "best"), ({"strategies": ()}, "strategies"), ({"budgets": (0,)}, "budgets=0"),
        ({"budgets": (1, 1)}, "budgets"), ({"seeds": ()}, "seeds"), ({"values": ("worst",)}, "worst"),
        ({"weights": ("flat",)}, "flat"), ({"shapes": {3: (1, 3)}}, "shapes: 3"), ({"shapes": {4: (0, 4)}}, "width=0"),
        ({"temperature": -1.0}, "temperature"), ({"weight_temperature": 0.0}, "weight_temperature"),
        ({"lookahead_steps": 0}, "lookahead_steps"),
    ],
)  # fmt: skip
def test_bad_plans(given, word):
    with pytest.raises(ValueError, match=word):
        plan(**given)


def test_shapes_draw_n_children_a_level():
    assert [shape(n) for n in (1, 2, 4, 8, 16, 64, 12, 7)] == [
        (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (8, 8), (3, 4), (1, 7)
    ]  # fmt: skip
    given = plan(shapes={8: (1, 8)}, lookahead_rollouts=3)
    assert given.strategy(Cell("beam", 8, "prm", "min")) == Beam(1, 8, value="min")
    assert given.strategy(Cell("lookahead", 4, "prm", "q")) == Lookahead(1, 1, rollouts=3, value="q")


# -- choosing ----------------------------------------------------------------------------------------------------------


def sample(text: str, value: float, right: bool = False, finish: str = "stop") -> Sample:
    return Sample(text, answer(text), right, 2, 2, finish, {"prm": {"q": value}})


GIVEN = [sample("a", -1.0), sample("b", 0.0), sample("b;", 0.5), sample("a;a", 3.0), sample("bb", 9.0, finish="length")]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell("majority", 1), "a"),
        (Cell("majority", 2), "a"),  # a tie: the first drawn, whatever its value
        (Cell("majority", 3), "b"),
        (Cell("best_of_n", 3, "prm", "q"), "b;"),
        (Cell("best_of_n", 5, "prm", "q"), "a;a"),  # complete ones before cut ones
        (Cell("weighted", 4, "prm", "q", "softmax"), "a;a"),
        (Cell("weighted", 4, "prm", "q", "sigmoid"), "a;a"),
    ],
)
def test_choices_by_hand(cell, text):
    assert choose(GIVEN, cell).text == text


def test_too_few_samples_or_no_such_value():
    with pytest.raises(ValueError, match="needs as many"):
        choose(GIVEN, Cell("majority", 6))
    with pytest.raises(ValueError, match="not scored"):
        choose(GIVEN, Cell("best_of_n", 2, "other", "q"))


# -- the table ---------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_records_say(records):
    summary = summarise(records)
    assert (summary.problems, summary.seeds) == (4, [0, 7])
    row = summary.row("best_of_n", 8, pair="prm", value="min")
    chosen = [
        (r["problem"], r["seed"], each["right"])
        for r in records
        if r["kind"] == "samples"
        for each in r["chosen"]
        if (each["strategy"], each["n"], each["value"]) == ("best_of_n", 8, "min")
    ]
    assert row.answers == len(chosen) == 8
    assert row.accuracy == fmean(right for *_, right in chosen)
    clusters = [[right for i, _, right in chosen if i == problem] for problem in range(4)]
    assert (row.low, row.high) == clustered_wilson(clusters)
    assert row.by_seed == {str(s): fmean(right for _, seed, right in chosen if seed == s) for s in (0, 7)}
    labels = [[s["right"] for s in r["samples"]] for r in records if r["kind"] == "samples"]
    for each in summary.pass_at:
        assert each.mean == pytest.approx(fmean(pass_at_k(8, sum(x), each.k) for x in labels))
        assert each.low <= each.mean <= each.high
    firsts = [any(s["right"] for s in r["samples"][:4]) for r in records if r["kind"] == "samples"]
    assert row.oracle_gap == pytest.approx(summary.pass_at[-1].mean - row.accuracy)
    four = summary.row("best_of_n", 4, pair="prm", value="q")
    assert four.oracle_gap == pytest.approx(fmean(firsts) - four.accuracy)
    for each in summary.rows:
        if each.cell.strategy in ("majority", "best_of_n", "weighted"):
            assert each.oracle_gap >= 0  # a vote chooses among those very samples
            assert each.shared is (each.cell.n < 8)
    assert not summary.row("beam", 8, value="q").shared
    assert not summary.row("greedy", 1).shared
    majority = summary.row("majority", 8)
    assert row.against_majority.difference == pytest.approx(row.accuracy - majority.accuracy)
    assert majority.against_majority is None
    assert majority.prm_tokens == 0 < row.prm_tokens
    assert row.total_tokens == row.policy_tokens + row.prm_tokens + row.reference_tokens
    beam = summary.row("beam", 8, value="min")
    rivals = {value: summary.row("best_of_n", 8, value=value).accuracy for value in ("q", "min")}
    assert rivals[beam.rival] == max(rivals.values())
    assert beam.against_best_of_n.difference == pytest.approx(beam.accuracy - rivals[beam.rival])
    assert (row.against_best_of_n, row.rival) == (None, None)
    assert summary.row("greedy", 1).answers == 4
    with pytest.raises(KeyError, match="2 rows"):
        summary.row("beam", 8)


def test_a_part_of_the_records_is_summarised_and_paired_by_problem(records):
    part = [r for r in records if r["kind"] != "search" or r["problem"] < 2]
    cells = outcomes(part)
    found = compare(cells[Cell("beam", 4, "prm", "q")], cells[Cell("majority", 4)])
    assert found is not None
    assert found.problems == 2
    assert summarise(part).row("beam", 4, value="q").problems == 2
    assert compare(cells[Cell("beam", 4, "prm", "q")], []) is None
    with pytest.raises(ValueError, match="records"):
        summarise([])


def test_report(records, tmp_path):
    summary = write_report(records, tmp_path / "new", title="Toys", about={"policy": "toy"}, expected=len(records) + 2)
    page = (tmp_path / "new/report.md").read_text()
    for word in ("# Toys", "policy: toy", "2 records are missing", "| beam min | 8 |", "accuracy-total-tokens.png"):
        assert word in page
    card = json.loads((tmp_path / "new/report.json").read_text())
    assert len(card["rows"]) == len(summary.rows) == 1 + 3 + 4 * 2 * 3
    row = next(r for r in card["rows"] if (r["strategy"], r["n"], r["value"]) == ("beam", 8, "q"))
    assert row["accuracy"] == summary.row("beam", 8, value="q").accuracy
    assert row["against_majority"]["p"] <= 1
    for name in ("accuracy-policy-tokens.png", "accuracy-total-tokens.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


def test_report_without_matplotlib_says_so(records, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "prm_search.evaluation.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(records, tmp_path)
    assert "There are no plots" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


# -- responses that exist ----------------------------------------------------------------------------------------------


TEXTS = ("a*7=5;b+3=8", "a*7=5;b+3=9", "a*7=5;b+3=8")


def test_responses_are_scored_as_the_pair_scores_them(demo_pair):
    asked = Answered(Prompt(text="=5a*7b+3?"), [Response(text) for text in TEXTS], "8")
    chains = Plan(strategies=("majority", "best_of_n"), budgets=(1, 3), values=("q", "min"), steps=ps.StepRule(";"))
    (record,) = evaluate_responses([asked], scorers=demo_pair, plan=chains, judge=digit_judge, answer=digit)
    scores = demo_pair.score([asked.prompt] * 3, TEXTS, steps=chains.steps)
    for got, wanted in zip(record["samples"], scores, strict=True):
        assert got["values"]["prm"]["q"] == pytest.approx(wanted.reward, abs=1e-6)
        assert got["values"]["prm"]["min"] == pytest.approx(min(wanted.step_rewards), abs=1e-6)
        assert got["tokens"] == len(wanted.token_ids) == 8
    assert [s["right"] for s in record["samples"]] == [True, False, True]
    prompt = len(demo_pair.tokenizer("=5a*7b+3?")["input_ids"])
    assert record["scoring"]["prm"]["prm_tokens"] == record["scoring"]["prm"]["reference_tokens"] == prompt + 24
    assert record["prompt_tokens"] == prompt
    assert summarise([record]).row("majority", 3).accuracy == 1.0


def digit(text: str) -> str:
    return text[-1]


def digit_judge(text: str, reference: str) -> tuple[str | None, bool]:
    return text[-1], text[-1] == reference


def test_labels_of_the_file_come_before_the_judge(demo_pair):
    asked = Answered(Prompt(text="=5a*7b+3?"), [Response(TEXTS[0], right=False), Response(TEXTS[1], right=True)])
    chains = Plan(strategies=("majority",), budgets=(2,), steps=ps.StepRule(";"))
    (record,) = evaluate_responses([asked], scorers=demo_pair, plan=chains, answer=digit)
    assert [s["right"] for s in record["samples"]] == [False, True]


def test_bad_responses_are_named(demo_pair):
    chains = Plan(strategies=("majority",), budgets=(2,), steps=ps.StepRule(";"))
    asked = Answered(Prompt(text="=5a*7b+3?"), [Response(text) for text in TEXTS], "8")
    with pytest.raises(ValueError, match=r"problems\[0\]: a response has no label"):
        evaluate_responses([asked], scorers=demo_pair, plan=chains)
    with pytest.raises(ValueError, match=r"problems\[0\] has 3 responses; a budget of 4"):
        evaluate_responses(
            [asked], scorers=demo_pair, plan=plan(strategies=("majority",), budgets=(4,)), judge=digit_judge
        )
    with pytest.raises(ValueError, match="beam would sample"):
        evaluate_responses([asked], scorers=demo_pair, plan=plan(strategies=("beam",)), judge=digit_judge)
    long = Answered(asked.prompt, [Response("a*7=5;" * 40)] * 2, "8")
    with pytest.raises(ValueError, match=r"problems\[1\]: "):
        list(evaluate_responses([asked, long], scorers=demo_pair, plan=chains, judge=digit_judge, answer=digit))


# -- the shipped pair --------------------------------------------------------------------------------------------------


def test_the_shipped_pair_beats_majority_and_its_reference_costs_nothing(demo_pair):
    """On 16 held-out problems, as the demo's test has it: a fixed seed, differences far beyond chance."""
    from prm_search.demo import pair_dir
    from prm_search.demo.chains import answer as chain_answer, problems
    from prm_search.problems import Judge

    policy = ps.HFPolicy.from_pretrained(pair_dir() / "policy")
    asked = [Problem(Prompt(text=p.prompt), p.answer) for p in problems(16)]
    chains = Plan(
        strategies=("majority", "best_of_n", "beam"), budgets=(16,), values=("min",), steps=ps.StepRule(";"),
        max_new_tokens=64,
    )  # fmt: skip
    found = evaluate(
        asked, policy=policy, scorers=demo_pair, plan=chains, judge=Judge("exact", chain_answer), answer=chain_answer
    )
    summary = summarise(found)
    majority, best, beam = (summary.row(name, 16) for name in ("majority", "best_of_n", "beam"))
    assert majority.accuracy + 0.2 <= beam.accuracy
    assert best.reference_tokens == beam.reference_tokens == 0
    assert beam.prm_tokens < best.prm_tokens < best.policy_tokens
    assert beam.policy_tokens <= best.policy_tokens


def test_toy_answers_are_not_all_alike(records):
    """What the comparisons above rest on: right and wrong answers, shared steps."""
    samples = [s for r in records if r["kind"] == "samples" for s in r["samples"]]
    assert {s["right"] for s in samples} == {True, False}
    assert any(s["new_tokens"] < s["tokens"] for s in samples)
