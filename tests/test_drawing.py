"""Draw, the one rule of how a child is drawn: random token streams against StepRule.ends, and against a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fakes import sampling
from hypothesis import example, given, settings, strategies as st
from soak import examples

from prm_search.drawing import Draw, nodes_of
from prm_search.sampling import Request
from prm_search.steps import StepRule
from prm_search.tree import Node, Prompt, SearchTree

END = 9  # the token that ends a response
PIECES = (b"a", b";", b";;", b"\n", b" ", b"b;a", "é".encode(), "é".encode()[:1], "é".encode()[1:], b"<end>")


class Tokens:
    """A vocabulary: the pieces above, the last of which has no text."""

    @staticmethod
    def piece(token_id: int) -> bytes:
        return PIECES[token_id]

    def text_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(PIECES[i] for i in ids if i != END)


TOKENS = Tokens()
STREAM = st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=30)
DOUBTS = st.sets(st.integers(0, 29))
RULES = st.builds(
    StepRule,
    delimiter=st.sampled_from([None, ";", ";;", "é", ("a;", "\n"), "\n\n"]),
    max_tokens=st.none() | st.integers(1, 6),
    regex=st.none() | st.sampled_from([r"b;?a", r";+a", r"a\b", r"\s+"]),
)


@dataclass
class Stream:
    """Tokens that a model would draw, and the places at which it would be unsure of the next one."""

    tokens: Sequence[int]
    doubts: frozenset[int] = frozenset()
    at: int = field(default=0)

    def feed(self, draw: Draw, until: int | None = None) -> None:
        """Draw up to a place of the stream, or until the child is done."""
        while not draw.done and self.at < (len(self.tokens) if until is None else until):
            if draw.cut_before(0.1 if self.at in self.doubts else 0.9):
                return
            draw.take(self.tokens[self.at], -0.5 * self.at)
            self.at += 1


def plant() -> Node:
    return SearchTree(Prompt(token_ids=(1, 2))).root


def ask(
    node: Node, rule: StepRule, *, until: Any = "end", caps: Sequence[int] = (40,), n: int | None = None
) -> Request:
    how = sampling(steps=rule, max_new_tokens=40)
    return Request.draw(node, n or len(caps), how, until=until, caps=caps, cap_reason="budget", merge=False)


def draw_of(request: Request) -> Draw:
    (draw,) = Draw.of(request, TOKENS, frozenset({END}))
    return draw


def up_to_end(tokens: Sequence[int]) -> list[int]:
    """The tokens that are drawn of a stream: none follows one that ends the response."""
    return list(tokens[: tokens.index(END) + 1]) if END in tokens else list(tokens)


def lengths(chain: Sequence[Any]) -> list[int]:
    """Tokens up to each step's end."""
    ends = [0]
    for segment in chain:
        ends.append(ends[-1] + len(segment.token_ids))
    return ends[1:]


def plain_ends(tokens: Sequence[int], rule: StepRule, doubts: frozenset[int]) -> list[int]:
    """The same by a plain loop: delimiters complete where they do whatever else cuts, the rest is counting."""
    complete = set(replace(rule, max_tokens=None, confidence=None).ends(tokens, TOKENS.piece))
    if tokens and not _completes(tokens, rule):
        complete.discard(len(tokens))
    ends, began = [], 0
    for i in range(len(tokens)):
        if i > began and i in doubts and rule.confidence is not None:
            ends.append(i)
            began = i
        if i + 1 in complete or i + 1 - began == rule.max_tokens or i + 1 == len(tokens):
            ends.append(i + 1)
            began = i + 1
    return ends


def _completes(tokens: Sequence[int], rule: StepRule) -> bool:
    """Whether the last token completes a delimiter."""
    matcher = replace(rule, max_tokens=None, confidence=None).matcher(TOKENS.piece)
    return [matcher.feed(token) for token in tokens][-1]


@settings(max_examples=examples(200))
@given(tokens=STREAM, rule=RULES)
@example(tokens=[0, 1, END, 0], rule=StepRule(";"))
@example(tokens=[0, 7, 8, 0], rule=StepRule("é"))
def test_a_whole_response_is_cut_where_the_rule_cuts_it(tokens: list[int], rule: StepRule) -> None:
    wanted = up_to_end(tokens)
    draw = draw_of(ask(plant(), rule, caps=[len(tokens)]))
    Stream(tokens).feed(draw)
    assert [i for segment in draw.chain for i in segment.token_ids] == wanted
    assert lengths(draw.chain) == rule.ends(wanted, TOKENS.piece)
    assert [segment.finish for segment in draw.chain[:-1]] == ["step"] * (len(draw.chain) - 1)
    assert draw.chain[-1].finish == ("stop" if END in tokens else "budget")
    assert (draw.done, draw.drawn, draw.left) == (True, len(wanted), len(tokens) - len(wanted))
    assert [x for segment in draw.chain for x in segment.logprobs] == [-0.5 * i for i in range(len(wanted))]


@settings(max_examples=examples(200))
@given(tokens=STREAM, doubts=DOUBTS, rule=RULES, confident=st.booleans())
@example(tokens=[0, 0], doubts={1}, rule=StepRule(None), confident=True)
def test_doubt_a_limit_and_a_delimiter_end_a_step_alike(
    tokens: list[int], doubts: set[int], rule: StepRule, confident: bool
) -> None:
    rule = replace(rule, confidence=0.5 if confident else None)
    draw = draw_of(ask(plant(), rule, caps=[len(tokens)]))
    Stream(tokens, frozenset(doubts)).feed(draw)
    assert lengths(draw.chain) == plain_ends(up_to_end(tokens), rule, frozenset(doubts))


@settings(max_examples=examples(200))
@given(tokens=STREAM, doubts=DOUBTS, rule=RULES, confident=st.booleans())
def test_step_by_step_is_as_in_one_go(tokens: list[int], doubts: set[int], rule: StepRule, confident: bool) -> None:
    rule = replace(rule, confidence=0.5 if confident else None)
    whole = draw_of(ask(plant(), rule, caps=[len(tokens)]))
    Stream(tokens, frozenset(doubts)).feed(whole)
    node, stream, chain = plant(), Stream(tokens, frozenset(doubts)), []
    while stream.at < len(tokens) and not node.finished:
        request = ask(node, rule, until="step", caps=[len(tokens) - stream.at])
        draw = draw_of(request)
        assert (draw.position, draw.lineage) == (stream.at, 0)
        stream.feed(draw)
        ((_, (node,)),) = nodes_of(request, [draw], "m")
        chain += draw.chain
    assert [(s.token_ids, s.finish, s.text) for s in chain] == [(s.token_ids, s.finish, s.text) for s in whole.chain]


@given(tokens=st.lists(st.integers(0, END - 1), min_size=2, max_size=30), rule=RULES, cap=st.integers(0, 30))
def test_a_cap_is_never_exceeded_and_gives_the_last_step_its_reason(
    tokens: list[int], rule: StepRule, cap: int
) -> None:
    cap = 1 + cap % (len(tokens) - 1)
    draw = draw_of(ask(plant(), rule, caps=[cap]))
    Stream(tokens).feed(draw)
    assert (draw.drawn, draw.left, draw.chain[-1].finish) == (cap, 0, "budget")
    assert lengths(draw.chain) == rule.ends(tokens[:cap], TOKENS.piece)


@pytest.mark.parametrize(
    ("tokens", "cap", "finish"),
    [([0, END], 2, "stop"), ([0, 1], 2, "budget"), ([0, 0], 2, "budget"), ([0, 1], 3, "step"), ([0, 0], 3, "step")],
)
def test_the_end_of_the_response_comes_before_the_cap_and_the_cap_before_the_step(
    tokens: list[int], cap: int, finish: str
) -> None:
    draw = draw_of(ask(plant(), StepRule(";", max_tokens=2), until="step", caps=[cap]))
    Stream(tokens).feed(draw)
    assert (draw.done, draw.chain[-1].finish) == (True, finish)


@given(tokens=STREAM, rule=RULES, until=st.sampled_from(["step", "end"]), at=st.integers(0, 30))
def test_an_interrupted_child_keeps_what_it_has_drawn(tokens: list[int], rule: StepRule, until: Any, at: int) -> None:
    at = min(at, len(tokens))
    request = ask(plant(), rule, until=until, caps=[40, 40])
    first, second = Draw.of(request, TOKENS, frozenset({END}))
    Stream(tokens).feed(second, until=at)
    ended, had = second.done, [list(segment.token_ids) for segment in second.chain]
    for draw in (first, second):
        draw.interrupt()
    assert (first.done, first.chain, second.done) == (True, [], True)
    assert [segment.token_ids for segment in second.chain] == had
    made = nodes_of(request, [first, second], "m")
    if not had:
        assert made == []
        return
    ((draw, nodes),) = made
    assert draw is second
    assert nodes[-1].lineages == (request.lineages[1],)
    assert nodes[-1].finish == ("budget" if not ended else second.chain[-1].finish)
    assert [list(node.token_ids) for node in nodes] == had


def test_a_stop_condition_of_the_engine_ends_the_response_with_its_token() -> None:
    draw = draw_of(ask(plant(), StepRule(";")))
    draw.take(0, -1.0)
    draw.take(1, -1.0)
    draw.take(0, -1.0, stop=True)
    assert [(s.text, s.finish) for s in draw.chain] == [(b"a;", "step"), (b"a", "stop")]
    assert draw.ids() == [1, 2, 0, 1, 0]


def test_an_engine_may_decide_on_the_end_after_it_has_recorded_the_tokens_of_many_rows() -> None:
    apart, together = (draw_of(ask(plant(), StepRule(";"))) for _ in range(2))
    for token, stop in ((0, False), (1, False), (1, False), (0, True)):
        apart.record(token, -1.0)
        assert apart.ids()[-1] == token
        apart.settle(stop)
        together.take(token, -1.0, stop=stop)
        assert (apart.chain, apart.done) == (together.chain, together.done)
    assert apart.done


def test_children_begin_with_what_their_node_left_of_a_delimiter() -> None:
    tree = plant().tree
    node = tree.add(tree.root, [0, 1])
    draws = Draw.of(ask(node, StepRule(";;"), until="step", caps=[5, 6]), TOKENS, frozenset({END}))
    assert [(draw.index, draw.left, draw.position) for draw in draws] == [(0, 5, 2), (1, 6, 2)]
    draws[0].take(1, -1.0)
    draws[1].take(0, -1.0)
    assert [draw.done for draw in draws] == [True, False]  # each with a matcher of its own


def test_what_was_drawn_is_counted_and_put_into_the_tree_in_child_order() -> None:
    node = plant()
    request = ask(node, StepRule(";"), caps=[9, 9, 9])
    draws = Draw.of(request, TOKENS, frozenset({END}))
    for draw, tokens in zip(draws, ([0, 1, END], [END], [0, 1, END]), strict=True):
        Stream(tokens).feed(draw)
    made = nodes_of(replace(request, merge=True), draws, "m")
    assert [draw for draw, _ in made] == draws
    assert [[n.index for n in nodes] for _, nodes in made] == [[1, 2], [3], [1, 2]]
    assert [n.sampler for n in node.tree.nodes[1:]] == ["m"] * 3
    assert node.tree.meter.counts == {("sampled", "m"): 7}


def test_an_engine_may_count_tokens_that_are_of_no_node() -> None:
    @dataclass(eq=False)
    class Overdrawn(Draw):
        dropped: int = 0

        @property
        def sampled(self) -> int:
            return self.drawn + self.dropped

    request = ask(plant(), StepRule(";"))
    (draw,) = Overdrawn.of(request, TOKENS, frozenset({END}))
    draw.take(END, -1.0)
    draw.dropped = 3
    nodes_of(request, [draw], "m")
    assert request.node.tree.meter.counts == {("sampled", "m"): 4}


CALLS: list[tuple[str, Callable[[Draw], object]]] = [
    ("take", lambda draw: draw.take(0, -1.0)),
    ("record", lambda draw: draw.record(0, -1.0)),
]


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_a_child_that_is_done_takes_no_more(name: str, call: Callable[[Draw], object]) -> None:
    draw = draw_of(ask(plant(), StepRule(";"), caps=[1]))
    draw.take(0, -1.0)
    with pytest.raises(RuntimeError, match="done"):
        call(draw)
