"""Extractors, equivalence and the three ways to select."""

from __future__ import annotations

import math
import os
import signal
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from prm_search.answers import boxed, equivalence, equivalent, hashes, last_number, normalize, resolve_answer, select
from prm_search.answers.equivalence import alike, form
from prm_search.answers.numbers import parse_number
from prm_search.tree import Node, SearchTree


def candidates(*rows: tuple, finish: str = "stop") -> list[Node]:
    """Finished nodes of one tree from (text, value) or (text, value, count)."""
    tree, nodes = SearchTree("p"), []
    for i, (text, value, *count) in enumerate(rows):
        node = tree.add(tree.root, [i], text=text, finish=finish)
        node.lineages = tuple(range(count[0] if count else 1))
        node.value = value
        nodes.append(node)
    return nodes


class TestExtractors:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (r"so \boxed{42}.", "42"),
            (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
            (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
            (r"\boxed{a_{b_{c}}} is it", "a_{b_{c}}"),
            (r"\fbox{7}", "7"),
            (r"$\boxed 7$", "7"),
            (r"\boxed{3} cut: \boxed{\frac{1", "3"),
            (r"\boxed{\frac{1}{2}", None),
            (r"\boxed{}", None),
            (r"\boxed{ }", None),
            ("boxed{3}", None),
            ("", None),
        ],
    )
    def test_boxed(self, text, answer):
        assert boxed(text) == answer

    @given(
        st.recursive(
            st.sampled_from(["a", "1", r"\{", r"\}"]),
            lambda x: st.lists(x, max_size=3).map("".join).map(lambda s: "{" + s + "}"),
        )
    )
    def test_boxed_takes_any_balanced_contents(self, inner):
        assert boxed(f"so \\boxed{{{inner}}} }} .") == (inner.strip() or None)

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("1 + 1 = 2\n#### 2", "2"),
            ("#### 1\n#### 1,234 \nmore", "1,234"),
            ("####", None),
            ("####\n5", None),
            ("2", None),
        ],
    )
    def test_hashes(self, text, answer):
        assert hashes(text) == answer

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("first 3, then 4.", "4"),
            ("it costs $1,234.50 in all.", "1,234.50"),
            ("x = -7", "-7"),
            ("x = \u22127", "-7"),
            ("5-3", "3"),
            ("(2)-1", "1"),
            ("about .5", ".5"),
            ("3/4 of it", "3/4"),
            ("1,2,3", "3"),
            ("12,3456", "3456"),
            ("none", None),
            ("so -$5", "-5"),
            ("so $-5", "-5"),
            (r"so -\$5.", "-5"),
            ("-\u20ac5.20", "-5.20"),
            ("5 - $3", "3"),
            ("it is 1.5e-3", "1.5e-3"),
            ("1e5", "1e5"),
            ("-1e-7.", "-1e-7"),
            ("in 2e", "2"),
            ("2 1/2", "5/2"),
            ("x = -2 1/2 cups", "-5/2"),
            ("1,234 1/2", "2469/2"),
            (r"2\frac{1}{2}", "5/2"),
            ("2\u00bd", "5/2"),
            (r"-\frac{3}{4}", "-3/4"),
            ("3 \u00d7 10^5", "3e5"),
            (r"6.63\times10^{-34}", "6.63e-34"),
            ("3 \u00d7 10\u2075", "3e5"),
            ("10^5", "1e5"),
            ("3\u00d74=12", "12"),
            ("12.5%", "12.5"),
            ("5...", "5"),
            ("pages 3\u20135", "5"),
            ("12 4/3", "4/3"),
        ],
    )
    def test_last_number(self, text, answer):
        assert last_number(text) == answer

    @given(st.integers() | st.decimals(allow_nan=False, allow_infinity=False, places=2))
    def test_last_number_finds_a_number_at_the_end(self, number):
        assert Fraction(
            last_number(f"3 apples, so {number:f}" if not isinstance(number, int) else f"so {number}")
        ) == Fraction(number)

    def test_by_name_callable_and_none(self):
        assert resolve_answer("boxed") is boxed
        assert resolve_answer("####") is hashes
        assert resolve_answer("number") is last_number
        assert resolve_answer(str.strip) is str.strip
        assert resolve_answer(None) is None
        with pytest.raises(ValueError, match=r"'box'.*'boxed'"):
            resolve_answer("box")
        with pytest.raises(TypeError, match="int"):
            resolve_answer(3)  # type: ignore[arg-type]


class TestSpelling:
    @pytest.mark.parametrize(
        "same",
        [
            ["1/2", "0.5", ".50", r"\frac{1}{2}", r"\dfrac12", r"$\tfrac{1}2$", "2/4", "x = 0.5"],
            ["1234", "1,234", "1,234.00", r"\$1,234", "1234.", r"1234\text{ cm}", r"\text{1234}", r"\(1234\)"],
            ["-3", "\u22123", r"-3^\circ", r"-3\%"],
            [r"\left( 1, 2 \right)", "(1,2)", "( 1,\\ 2 )"],
            [r"\text{Monday}", " Monday. "],
            [r"\sqrt2", r"\sqrt{2}"],
        ],
    )
    def test_one_for_each_answer(self, same):
        assert len({normalize(answer) for answer in same}) == 1, [normalize(a) for a in same]

    @pytest.mark.parametrize(
        ("a", "b"),
        [("1 1/2", "11/2"), ("1, 234", "1,234"), ("Monday", "monday"), ("3 4", "34"), ("(1,2)", "(2,1)"), ("3/0", "0")],
    )
    def test_different_answers_stay_different(self, a, b):
        assert normalize(a) != normalize(b)

    @pytest.mark.parametrize(
        ("a", "b"),
        [
            ("18 dollars", "18"), ("18 dollars", "$18"), (r"18\text{ dollars}", "18.00"), ("18 USD", "18"),
            ("3.0e2", "300"), (r"3.0\times10^{2}", "300"), (r"3 \cdot 10^2", "3e2"), ("3 \u00d7 10\u2075", "300,000"),
            (r"6.63\times10^{-34}", "6.63e-34"), ("10^{-2}", ".01"), ("1{,}234", "1234"), ("-$5", "-5"), ("$-5", "-5"),
            ("2 1/2", "5/2"), (r"2\frac12", "2.5"), ("2\u00bd", "5/2"), ("50%", "50"), ("50%", "0.5"), (r"50\%", "1/2"),
            ("12 percent", "12%"), ("$3 million", "3,000,000"), ("2 dozen", "24"), (r"90^\circ", "90 degrees"),
            ("5 cm", "5 centimeters"), ("5cm", "5"), ("5 m", "5 meters"), ("10 m\u00b2", "10 square meters"),
            ("60 miles per hour", "60 miles/hour"), ("18 apples", "18"), (r"\text{18 dollars}", "18"), ("18.", "18"),
        ],
    )  # fmt: skip
    def test_numbers_are_one_however_they_are_written(self, a, b, monkeypatch):
        monkeypatch.setattr(equivalence, "_WORKER", None)  # asking would fail
        assert equivalent(a, b)
        assert equivalent(b, a)
        assert alike(form(a), form(b))

    @pytest.mark.parametrize(
        ("a", "b"),
        [
            (r"6.63\times10^{-34}", r"1.05\times10^{-34}"), ("1e-30", "2e-30"), ("5 cm", "5 m"), ("5 cm", "5 km"),
            ("$18", "18 euros"), ("3 million", "3"), ("3 million", "3 billion"), ("50%", "5"), ("0.5%", "0.5000001"),
            ("3 dogs", "3 gods"), ("5 m", "5 s"), ("2 1/2", "1"), ("5 pi", "5"), ("2x", "2 dollars"), ("1e3", "1e-3"),
        ],
    )  # fmt: skip
    def test_different_numbers_and_units_are_never_merged(self, a, b, monkeypatch):
        worker = equivalence._Worker()
        worker._usable = False
        monkeypatch.setattr(equivalence, "_WORKER", worker)
        assert not equivalent(a, b)
        assert not equivalent(b, a)

    @pytest.mark.parametrize("text", ["5 or 6", "5 squared", "5 more", "5abc", "2x", "3 4", "3/0", "1e401", "-$-5", ""])
    def test_what_is_no_number_with_a_unit(self, text):
        assert parse_number(text) is None

    @given(st.integers(1, 9999), st.integers(-300, 300), st.integers(1, 9999))
    def test_tiny_and_huge_numbers_are_compared_exactly(self, a, power, b):
        assert equivalent(f"{a}e{power}", f"{a}\\times10^{{{power}}}")
        assert equivalent(f"{a}e{power}", f"{b}e{power}") is (a == b)

    @given(st.fractions())
    def test_numbers_keep_their_value(self, number):
        assert Fraction(normalize(str(number))) == number
        assert normalize(f"\\frac{{{abs(number.numerator)}}}{{{number.denominator}}}") == str(abs(number))

    @given(st.text(max_size=30))
    def test_nothing_breaks_it(self, text):
        assert equivalent(text, text)
        normalize(text)

    @pytest.mark.parametrize("text", ["9" * 5000, "1e999999999", "1." + "0" * 200, "1" * 60 + "/" + "7" * 60])
    def test_long_numbers_are_left_alone_or_exact(self, text):
        assert normalize(text) == text


class TestMathVerify:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("math_verify")

    @pytest.mark.parametrize(
        ("a", "b", "same"),
        [
            (r"\sqrt{8}", r"2\sqrt{2}", True),
            ("x+1", "1+x", True),
            ("2^3", "8", True),
            (r"\frac{\pi}{2}", r"\pi/2", True),
            ("(1,2)", "(2,1)", False),
            ("[1,2)", "(1,2)", False),
            ("x+1", "x+2", False),
            (r"\frac{\sqrt2}{10^{30}}", r"10^{-30}\sqrt2", True),
            (r"10^{-30}\sqrt{2}", r"10^{-30}\sqrt{3}", False),
            (r"(10^{-20}\sqrt2, 2)", r"(10^{-20}\sqrt3, 2)", False),
            (r"10^{-20}x", r"3\cdot10^{-20}x", False),
            (r"\{1,2\}", r"\{2,1\}", True),
        ],
    )
    def test_decides_what_spelling_cannot(self, a, b, same):
        assert equivalent(a, b) is same
        assert equivalent(b, a) is same

    @pytest.mark.parametrize(
        ("a", "b"), [("Monday", "dynamo"), ("3 dogs", "3 gods"), ("3", "4"), (r"\text{dog 1}", "god 1")]
    )
    def test_words_and_plain_numbers_are_not_its_business(self, a, b, monkeypatch):
        monkeypatch.setattr(equivalence, "_WORKER", None)  # asking would fail
        assert not equivalent(a, b)

    def test_works_in_threads_and_leaves_alarms_alone(self):
        replies = []
        if hasattr(signal, "SIGALRM"):
            before = signal.getsignal(signal.SIGALRM)
        threads = [threading.Thread(target=lambda: replies.append(equivalent("x+3", "3+x"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert replies == [True] * 4
        if hasattr(signal, "SIGALRM"):
            assert signal.getsignal(signal.SIGALRM) is before

    def test_what_hangs_counts_as_different_and_stops_nothing_else(self, monkeypatch):
        worker = equivalence._Worker()
        monkeypatch.setattr(equivalence, "_WORKER", worker)
        assert equivalent("x+5", "5+x")  # it has started
        endless = "9^{9^{9^{9}}}"
        with monkeypatch.context() as patch:
            patch.setattr(equivalence, "SECONDS", 0.5)
            assert not equivalent(endless, "2^3")
            assert worker._process is None  # killed
            assert not equivalent(endless, "2^4")
            assert not equivalent(endless, "2^5")
            assert worker._hung[endless] == 2  # the third was not tried
        assert equivalent("x+7", "7+x")
        worker.stop()

    def test_replies_are_cached(self, monkeypatch):
        worker = equivalence._Worker()
        monkeypatch.setattr(equivalence, "_WORKER", worker)
        assert equivalent("x+9", "9+x")
        worker.stop()
        monkeypatch.setattr(worker, "_ask", None)
        assert equivalent("9+x", "x+9")

    def test_a_worker_that_died_is_replaced(self, monkeypatch):
        worker = equivalence._Worker()
        monkeypatch.setattr(equivalence, "_WORKER", worker)
        assert equivalent("x+9", "9+x")
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        assert equivalent("x+8", "8+x")
        worker.stop()

    def test_a_broken_installation_warns_once_and_strings_decide(self, monkeypatch, tmp_path: Path):
        (tmp_path / "math_worker.py").write_text("import json; print(json.dumps('ImportError: no antlr'), flush=True)")
        monkeypatch.setattr(equivalence, "__file__", str(tmp_path / "equivalence.py"))
        monkeypatch.setattr(equivalence, "_WORKER", equivalence._Worker())
        with pytest.warns(UserWarning, match="no antlr"):
            assert not equivalent("x+1", "1+x")
        assert not equivalent("x+2", "2+x")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_child_has_a_worker_of_its_own(self):
        assert equivalent("x+1", "1+x")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                own = equivalence._WORKER._process is None
                code = 0 if own and equivalent("y+1", "1+y") else 2
                equivalence._WORKER.stop()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert equivalent("z+1", "1+z")


def test_without_math_verify_strings_decide(monkeypatch):
    monkeypatch.setattr(equivalence, "find_spec", lambda name: None)
    monkeypatch.setattr(equivalence, "_WORKER", equivalence._Worker())
    assert equivalent("0.5", r"\frac12")
    assert not equivalent("x+1", "1+x")


class TestBest:
    def test_highest_value_first_of_equals(self):
        nodes = candidates(("a", 1.0), ("b", 3.0), ("c", 3.0))
        result = select(nodes)
        assert result.node is nodes[1]
        assert (result.answer, result.votes, result.fallback) == (None, (), None)

    def test_its_answer_is_extracted(self):
        result = select(candidates(("#### 1", 1.0), ("#### 2", 2.0)), "best", answer="####")
        assert result.answer == "2"
        assert select(candidates(("none", 2.0)), answer="####").answer is None


class TestMajority:
    def test_most_votes_win_over_the_best_value(self):
        nodes = candidates((r"\boxed{1}", 9.0), (r"\boxed{0.5}", 1.0), (r"\boxed{\frac12}", 2.0))
        result = select(nodes, "majority", answer="boxed")
        assert result.node is nodes[2]  # the better of the two
        assert result.answer == r"\frac12"
        assert [(v.answer, v.votes, v.weight, v.node) for v in result.votes] == [
            (r"\frac12", 2, 2.0, nodes[2]),
            ("1", 1, 1.0, nodes[0]),
        ]

    def test_merged_duplicates_vote_for_each(self):
        nodes = candidates(("#### 1", 0.0, 3), ("#### 2", 5.0), ("#### 2.0", 4.0))
        assert nodes[0].count == 3
        result = select(nodes, "majority", answer="####")
        assert result.answer == "1"
        assert [v.votes for v in result.votes] == [3, 2]

    def test_a_node_listed_twice_is_one_candidate(self):
        nodes = candidates(("#### 1", 0.0), ("#### 2", 5.0))
        assert select([nodes[0], nodes[0], nodes[1]], "majority", answer="####").answer == "2"

    def test_ties_go_to_the_better_value_then_to_the_first(self):
        nodes = candidates(("#### 1", 1.0), ("#### 2", 2.0), ("#### 2", 0.0), ("#### 1", 0.0))
        assert select(nodes, "majority", answer="####").answer == "2"
        nodes = candidates(("#### 1", 1.0), ("#### 2", 1.0))
        assert select(nodes, "majority", answer="####").answer == "1"

    def test_those_without_an_answer_abstain(self):
        nodes = candidates(("cut", 9.0, 4), ("#### 1", 1.0), ("also cut", 8.0))
        result = select(nodes, "majority", answer="####")
        assert (result.answer, result.abstained, result.fallback) == ("1", 5, None)

    def test_one_cut_by_its_length_votes_if_it_has_an_answer(self):
        nodes = candidates(("#### 1\nand", 1.0, 2), finish="length") + candidates(("#### 2", 2.0))
        assert select(nodes, "majority", answer="####").answer == "1"

    def test_where_nobody_has_an_answer_best_decides_and_it_says_so(self):
        nodes = candidates(("a", 1.0, 5), ("b", 2.0))
        for how in ("majority", "weighted"):
            result = select(nodes, how, answer="boxed")
            assert result.node is nodes[1]
            assert result.answer is None
            assert result.votes == ()
            assert result.abstained == 6
            assert f"'{how}' fell back to 'best'" in (result.fallback or "")

    def test_without_an_extractor_whole_texts_vote(self):
        nodes = candidates(("1/2", 1.0), (" 1/2\n", 2.0), ("0.5", 9.0), ("", 10.0))
        result = select(nodes, "majority")
        assert result.node is nodes[1]
        assert result.answer is None
        assert [(v.answer, v.votes) for v in result.votes] == [("1/2", 2), ("0.5", 1)]
        assert result.abstained == 1  # says nothing

    def test_the_text_is_that_of_the_whole_path(self):
        tree = SearchTree("p")
        first = tree.add(tree.root, [1], text="#### 4")
        end = tree.add(first, [2], text="2\n", finish="stop")
        end.value = 0.0
        assert select([end], "majority", answer="####").answer == "42"

    def test_equivalent_answers_share_a_ballot(self):
        pytest.importorskip("math_verify")
        nodes = candidates((r"\boxed{\sqrt8}", 1.0), (r"\boxed{3}", 5.0), (r"\boxed{2\sqrt{2}}", 2.0))
        result = select(nodes, "majority", answer="boxed")
        assert result.answer == r"2\sqrt{2}"
        assert result.votes[0].votes == 2


class TestWeighted:
    def test_softmax_weights_are_the_formula(self):
        nodes = candidates(("#### 1", 1.0, 2), ("#### 2", 2.0), ("#### 1", 0.5))
        result = select(nodes, "weighted", answer="####", temperature=0.5)
        w = [2 * math.exp(2.0), math.exp(4.0), math.exp(1.0)]
        assert {v.answer: v.weight for v in result.votes} == pytest.approx(
            {"1": (w[0] + w[2]) / sum(w), "2": w[1] / sum(w)}
        )
        assert result.answer == "2"
        assert select(nodes, "weighted", answer="####", temperature=100.0).answer == "1"

    def test_sigmoid_weights_are_the_formula(self):
        nodes = candidates(("#### 1", 1.0, 2), ("#### 2", 30.0), ("#### 1", -0.5))
        result = select(nodes, "weighted", answer="####", weight="sigmoid", temperature=2.0)
        assert {v.answer: v.weight for v in result.votes} == pytest.approx(
            {"1": 2 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(0.25)), "2": 1 / (1 + math.exp(-15))}
        )
        assert result.answer == "1"

    @pytest.mark.parametrize("weight", ["softmax", "sigmoid"])
    @pytest.mark.parametrize(
        "values", [(-1e308, 1e308), (-math.inf, 0.0), (0.0, math.inf), (-800.0, -700.0), (1e-300, 2e-300)]
    )
    def test_any_size_of_value_is_safe_and_keeps_its_order(self, weight, values):
        nodes = candidates(*((f"#### {i}", v) for i, v in enumerate(values)))
        result = select(
            nodes, "weighted", answer="####", weight=weight, temperature=1e-3 if values[1] == 1e308 else 1.0
        )
        assert result.answer == "1"
        assert all(math.isfinite(v.weight) and v.weight >= 0 for v in result.votes)

    def test_all_at_minus_infinity_vote_alike(self):
        nodes = candidates(("#### 1", -math.inf), ("#### 2", -math.inf, 2))
        assert select(nodes, "weighted", answer="####").answer == "2"

    @given(
        rows=st.lists(st.tuples(st.integers(0, 3), st.floats(-50, 50), st.integers(1, 3)), min_size=1, max_size=12),
        shift=st.floats(-100, 100),
    )
    def test_softmax_sums_to_one_and_a_shift_changes_nothing(self, rows, shift):
        def vote(by: float) -> dict[str, float]:
            nodes = candidates(*((f"#### {a}", v + by, n) for a, v, n in rows))
            return {v.answer: v.weight for v in select(nodes, "weighted", answer="####").votes}

        weights = vote(0.0)
        assert sum(weights.values()) == pytest.approx(1.0)
        assert vote(shift) == pytest.approx(weights, rel=1e-6, abs=1e-9)

    def test_equal_values_make_a_majority_vote(self):
        nodes = candidates(("#### 1", 3.0), ("#### 2", 3.0, 2))
        for weight in ("softmax", "sigmoid"):
            assert select(nodes, "weighted", answer="####", weight=weight).answer == "2"


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"how": "median"}, r"select='median'.*'best'"),
            ({"weight": "linear"}, r"weight='linear'.*'softmax'"),
            ({"temperature": 0.0}, "temperature"),
            ({"temperature": float("nan")}, "temperature"),
            ({"answer": "box"}, "answer='box'"),
        ],
    )
    def test_is_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            select(candidates(("a", 1.0)), **arguments)

    def test_no_candidates(self):
        with pytest.raises(ValueError, match="candidates is empty"):
            select([])

    @pytest.mark.parametrize("value", [None, float("nan")])
    def test_a_candidate_without_a_value(self, value):
        with pytest.raises(ValueError, match="value"):
            select(candidates(("a", value)))

    def test_an_extractor_that_returns_something_else(self):
        with pytest.raises(TypeError, match=r"answer.*int"):
            select(candidates(("a", 1.0)), "majority", answer=len)  # type: ignore[arg-type]
