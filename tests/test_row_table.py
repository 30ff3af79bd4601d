"""Rows as arrays: steps end where StepRule.ends says, and the automaton over token ids is the matcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from fakes import sampling
from hypothesis import example, given, settings, strategies as st
from soak import examples

from prm_search.drawing import Draw
from prm_search.engine.decoding_row import DecodingRow
from prm_search.engine.row_table import AHEAD, RowTable
from prm_search.engine.step_automaton import DENSE, automaton_of
from prm_search.rng import uniforms
from prm_search.sampling import Request
from prm_search.steps import StepRule
from prm_search.tree import Prompt, SearchTree

END = 11
PIECES = (
    b"a", b";", b";;", b"\n", b" ", b"b;a", "é".encode(), "é".encode()[:1], "é".encode()[1:], b"", b"\n\n", b"<end>",
)  # fmt: skip


class Tokens:
    """A vocabulary: the pieces above, the last of which has no text."""

    def piece(self, token_id: int) -> bytes:
        return PIECES[token_id]

    def text_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(PIECES[i] for i in ids if i != END)


TOKENS = Tokens()
STREAMS = st.lists(st.lists(st.integers(0, len(PIECES) - 2), min_size=1, max_size=24), min_size=1, max_size=5)
DELIMITERS = st.sampled_from([None, ";", ";;", "é", ("a;", "\n"), "\n\n", (";a", ";;b"), " \n"])
RULES = st.builds(
    StepRule, delimiter=DELIMITERS, max_tokens=st.none() | st.integers(1, 6), regex=st.none() | st.just(r"b;?a")
)


def rows_of(rules: Sequence[StepRule], caps: Sequence[int]) -> list[DecodingRow]:
    rows = []
    for rule, cap in zip(rules, caps, strict=True):
        root = SearchTree(Prompt(token_ids=(1, 2))).root
        request = Request.draw(root, 1, sampling(steps=rule, max_new_tokens=60), until="end", caps=[cap])
        rows += DecodingRow.of(request, TOKENS, frozenset({END}))
    return rows


def decode(table: RowTable, streams: Sequence[Sequence[int]]) -> int:
    """Feed each row its stream until all are done. Returns how often a row's object was asked."""
    asked, of = 0, {id(row): stream for row, stream in zip(table.rows, streams, strict=True)}
    at = dict.fromkeys(of, 0)
    while table.rows:
        tokens = np.array([of[id(row)][at[id(row)]] for row in table.rows])
        values = np.stack([-0.5 * tokens, np.zeros(len(tokens))], axis=1)
        for place in table.book(tokens, values).tolist():
            asked += 1
            table.catch_up(place, newest=False)
            table.rows[place].read(int(tokens[place]), values[place].tolist())
            table.rows[place].settle()
            table.settled(place)
        for row in table.rows:
            at[id(row)] += 1
        table.keep(np.array([place for place, row in enumerate(table.rows) if not row.done], np.int64))
    return asked


@settings(max_examples=examples(150), deadline=None)
@given(streams=STREAMS, rules=st.lists(RULES, min_size=5, max_size=5))
@example(streams=[[0, 7, 8, 0], [1, 1, 0, 1, 1]], rules=[StepRule("é"), StepRule(";;")] * 3)
def test_rows_together_are_cut_where_the_rule_cuts_each(streams: list[list[int]], rules: list[StepRule]) -> None:
    rules = rules[: len(streams)]
    rows = rows_of(rules, [len(stream) for stream in streams])
    table = RowTable(1, frozenset({END}), watch=False)
    table.add(rows)
    decode(table, streams)
    for row, rule, stream in zip(rows, rules, streams, strict=True):
        ends = np.cumsum([len(segment.token_ids) for segment in row.chain]).tolist()
        assert ends == rule.ends(stream, TOKENS.piece)
        assert [i for segment in row.chain for i in segment.token_ids] == stream
        assert [x for segment in row.chain for x in segment.logprobs] == [-0.5 * i for i in stream]
        (alone,) = Draw.of(row.request, TOKENS, frozenset({END}))
        for token in stream:
            alone.take(token, -0.5 * token)
        assert row.chain == alone.chain
        assert (row.drawn, row.left, row.done) == (alone.drawn, alone.left, alone.done)


@settings(max_examples=examples(150), deadline=None)
@given(stream=st.lists(st.integers(0, len(PIECES) - 1), max_size=40), delimiter=DELIMITERS, begun=st.integers(0, 40))
def test_the_automaton_is_the_matcher(stream: list[int], delimiter: object, begun: int) -> None:
    """From any place of a text on, restored states included."""
    rule = StepRule(delimiter, max_tokens=None)  # type: ignore[arg-type]
    matcher, machine = rule.matcher(TOKENS.piece), automaton_of(rule, TOKENS)
    for token in stream[:begun]:
        matcher.feed(token)
    state = np.array([machine.number(matcher)])
    for token in stream[begun:]:
        state, ended = machine.feed(state, np.array([token]))
        assert bool(ended[0]) == matcher.feed(token)
        assert int(state[0]) == machine.number(matcher)
        twin = rule.matcher(TOKENS.piece)
        machine.restore(twin, int(state[0]), 3)
        assert twin.text_state() == matcher.text_state()


def test_states_beyond_the_table_are_looked_up_one_by_one() -> None:
    class Letters(Tokens):
        def piece(self, token_id: int) -> bytes:
            return bytes([97 + token_id])

    tokens, word = Letters(), "abcdefghijklmnopqrstuvwxyz" * 4
    rule = StepRule(word, max_tokens=None)
    matcher, machine = rule.matcher(tokens.piece), automaton_of(rule, tokens)
    state, ends = np.array([machine.number(matcher)]), []
    for at in range(2 * len(word)):
        state, ended = machine.feed(state, np.array([at % 26]))
        ends.append(bool(ended[0]))
    assert len(word) > DENSE
    assert ends == [rule.matcher(tokens.piece).feed(0)] * (len(word) - 1) + [False] + [False] * len(word)
    matcher.feed(0)
    state = np.array([machine.number(matcher)])
    for at in range(len(word) + 1):
        state, ended = machine.feed(state, np.array([(at if at else 0) % 26]))
        assert bool(ended[0]) == matcher.feed(at % 26)


def test_a_row_is_asked_only_when_something_may_end() -> None:
    streams = [[0] * 40, [0, 0, 1] * 13 + [0], [0] * 39 + [END]]
    rows = rows_of([StepRule(";", max_tokens=16)] * 3, [40, 40, 60])
    table = RowTable(1, frozenset({END}), watch=False)
    table.add(rows)
    # by hand: 40 tokens of 16, 16, 8; thirteen delimiters and the cap; 16, 16 and the end
    assert decode(table, streams) == 3 + 14 + 3
    watched = RowTable(1, frozenset({END}), watch=True)
    watched.add(rows_of([StepRule(";", max_tokens=16)] * 3, [40, 40, 60]))
    assert decode(watched, streams) == 120


@pytest.mark.parametrize("asked_at", [0, 1, 5])
def test_a_row_that_is_read_in_between_is_up_to_date_and_goes_on_alike(asked_at: int) -> None:
    rows = rows_of([StepRule(";", max_tokens=None)] * 2, [8, 8])
    table = RowTable(1, frozenset({END}), watch=False)
    table.add(rows)
    stream = [0, 1, 0, 0, 3, 4, 1, 0]
    for at, token in enumerate(stream):
        if at == asked_at:
            assert rows[0].ids() == [1, 2, *stream[:at]]
            assert rows[0].position == at
        values = np.zeros((2, 2))
        for place in table.book(np.array([token, token]), values).tolist():
            table.catch_up(place, newest=False)
            rows[place].read(token, [0.0, 0.0])
            rows[place].settle()
            table.settled(place)
    table.keep(np.zeros(0, np.int64))
    assert rows[0].chain == rows[1].chain
    assert [len(segment.token_ids) for segment in rows[0].chain] == [2, 5, 1]


def test_uniform_numbers_are_those_of_each_rows_counter() -> None:
    """Made sixteen at once, for rows that began at different times."""
    table = RowTable(1, frozenset(), watch=False)
    rows = rows_of([StepRule(None, max_tokens=None)] * 3, [60] * 3)
    table.add(rows[:2])
    for at in range(2 * AHEAD + 3):
        if at == 5:
            table.add(rows[2:])
        here = table.rows
        wanted = uniforms(
            [row.request.sampling.seed for row in here],
            [row.request.node.tree.stream for row in here],
            [row.lineage for row in here],
            [at if row is not rows[2] else at - 5 for row in here],
        )
        assert table.uniforms().tolist() == wanted.tolist()
        table.book(np.zeros(len(here), np.int64), np.zeros((len(here), 2)))


def test_rows_of_other_rules_see_every_token() -> None:
    """A regex, doubt and stop strings are the row's own business."""
    base = rows_of([StepRule(";"), StepRule(";", regex="a+b"), StepRule(";", confidence=0.5)], [9] * 3)
    asked = replace(base[0].request, sampling=replace(base[0].request.sampling, stop=("x",)))
    table = RowTable(1, frozenset(), watch=False)
    table.add([*base, *DecodingRow.of(asked, TOKENS, frozenset())])
    assert table.book(np.zeros(4, np.int64), np.zeros((4, 2))).tolist() == [1, 2, 3]
