"""Votes on plain records: the same counting as `select` does with nodes, by places."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings, strategies as st

from prm_search.answers import Candidate, elect, select
from prm_search.tree import SearchTree


def test_best_is_the_first_of_the_highest():
    assert elect([Candidate(None, 1.0), Candidate(None, 3.0), Candidate("x", 3.0)]).place == 1


def test_a_majority_counts_duplicates_and_breaks_ties_by_value():
    found = elect(
        [Candidate("1", 0.0, 2), Candidate("0.5", 1.0), Candidate(r"\frac12", 2.0), Candidate(None, 9.0)], "majority"
    )
    assert (found.place, found.abstained, found.fallback) == (2, 1, None)
    assert [(b.answer, b.votes, b.weight, b.place) for b in found.ballots] == [
        (r"\frac12", 2, 2.0, 2),
        ("1", 2, 2.0, 0),
    ]


def test_literal_answers_are_equal_as_strings_only():
    records = [Candidate("0.5", 1.0), Candidate("1/2", 2.0), Candidate("0.5", 0.0)]
    assert [b.votes for b in elect(records, "majority", literal=True).ballots] == [2, 1]
    assert [b.votes for b in elect(records, "majority").ballots] == [3]


def test_own_weights_decide_a_weighted_vote_where_every_candidate_has_one():
    records = [Candidate("1", 9.0, 2, weight=0.25), Candidate("2", 0.0, 1, weight=0.75)]
    found = elect(records, "weighted")
    assert found.place == 1
    assert [b.weight for b in found.ballots] == [0.75, 0.25]
    softmax = elect([Candidate("1", 9.0, 2, weight=0.25), Candidate("2", 0.0)], "weighted")
    assert softmax.place == 0
    assert math.fsum(b.weight for b in softmax.ballots) == pytest.approx(1.0)


def test_without_answers_best_decides_and_it_says_so():
    found = elect([Candidate(None, 1.0, 3), Candidate(None, 2.0)], "weighted", weight="sigmoid")
    assert (found.place, found.abstained, found.ballots) == (1, 4, ())
    assert "'weighted' fell back to 'best'" in (found.fallback or "")


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        ([], {}, "candidates is empty"),
        ([Candidate("1", math.nan)], {}, "NaN"),
        ([Candidate("1", 0.0)], {"how": "median"}, "select='median'"),
        ([Candidate("1", 0.0)], {"weight": "linear"}, "weight='linear'"),
        ([Candidate("1", 0.0)], {"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_input_is_named(records, arguments, message):
    with pytest.raises(ValueError, match=message):
        elect(records, **arguments)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.floats(-50, 50), st.integers(1, 3)), min_size=1, max_size=8),
    how=st.sampled_from(["best", "majority", "weighted"]),
    weight=st.sampled_from(["softmax", "sigmoid"]),
)
def test_nodes_of_a_tree_are_chosen_among_as_their_records_are(rows, how, weight):
    tree = SearchTree("p")
    nodes = []
    for answer, value, count in rows:
        node = tree.add(tree.root, [1], text=f"#### {answer}" if answer else "none", finish="stop")
        node.value, node.lineages = value, tuple(range(count))
        nodes.append(node)
    records = [Candidate(str(answer) if answer else None, value, count) for answer, value, count in rows]
    of_nodes = select(nodes, how, answer="####", weight=weight)
    of_records = elect(records, how, weight=weight)
    assert of_nodes.node is nodes[of_records.place]
    assert (of_nodes.abstained, of_nodes.fallback) == (of_records.abstained, of_records.fallback)
    assert [(v.answer, v.votes, v.weight) for v in of_nodes.votes] == [
        (b.answer, b.votes, b.weight) for b in of_records.ballots
    ]
