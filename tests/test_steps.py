"""StepRule: steps end at the tokens that complete a delimiter, however the text was cut into tokens."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings, strategies as st
from soak import examples

from prm_search.steps import StepRule, _completing_first, confidence_quantile
from prm_search.tree import SearchTree


def flags(rule: StepRule, pieces: Sequence[str | bytes]) -> list[bool]:
    """Whether each piece, fed as a token of its own, ends a step."""
    tokens = [p.encode() if isinstance(p, str) else p for p in pieces]
    matcher = rule.matcher(tokens.__getitem__, None)
    return [matcher.feed(i) for i in range(len(tokens))]


def ending(rule: StepRule, pieces: Sequence[str | bytes]) -> list[int]:
    return [i for i, flag in enumerate(flags(rule, pieces)) if flag]


def completions(text: str, delimiters: Sequence[str], regex: str | None = None) -> list[int]:
    """The oracle: byte offsets at which a step ends, one character at a time."""
    offsets, since, offset = [], "", 0
    for character in text:
        since += character
        offset += len(character.encode())
        starts = [len(since) - len(d) for d in delimiters if since.endswith(d)]
        if regex is not None and (match := re.search(regex, since)):
            starts.append(match.start())
        if starts:
            if since[: min(starts)].strip():
                offsets.append(offset)
            since = ""
    return offsets


def cut(data: bytes, at: set[int]) -> list[bytes]:
    bounds = [0, *sorted(i for i in at if 0 < i < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(bounds) if b > a]


def expected(pieces: Sequence[bytes], offsets: Sequence[int], max_tokens: int | None) -> list[bool]:
    """The tokens that contain those offsets end steps, and so does every max_tokens-th since the last end."""
    want, start, tokens = [], 0, 0
    for piece in pieces:
        tokens += 1
        done = any(start < o <= start + len(piece) for o in offsets) or tokens == max_tokens
        want.append(done)
        start, tokens = start + len(piece), 0 if done else tokens
    return want


TEXT = st.text(alphabet="ab.\n; é😀\u3000", max_size=40)
DELIMITERS = st.lists(st.text(alphabet="ab.\n;é", min_size=1, max_size=3), min_size=1, max_size=3)
CUTS = st.sets(st.integers(1, 120), max_size=60)
LIMIT = st.one_of(st.none(), st.integers(1, 6))
REGEX = st.sampled_from(
    [
        None,
        r"\.\s",
        r"\n+",
        r"[;.]$",
        r"a(?=b)",
        r"(?<=[.;])\s",
        r"\ba",
        r"b+\.",
        r"(?:ab|a)b",
        r"(?>ab|a)b",
        r"(a+)\1",
        "(?i)AB",
    ]
)


class TestDelimiters:
    def test_inside_one_token_and_over_several(self):
        assert ending(StepRule(), ["one", "\n\n", "two"]) == [1]
        assert ending(StepRule(), ["one", "\n", "\n", "two"]) == [2]
        assert ending(StepRule(), ["one.\n\nTwo", " more", ".\n", "\nThree"]) == [0, 3]

    def test_two_in_one_token_end_one_step(self):
        assert ending(StepRule(), ["a\n\nb\n\nc", "d", "\n\n"]) == [0, 2]

    def test_leading_ones_make_no_step(self):
        assert ending(StepRule(), ["\n\n", "\n\n", " ", "\n\n", "one", "\n\n", "\n\n", "two\n\n"]) == [5, 7]
        assert ending(StepRule(";"), [";", ";", "a", ";", ";;", "b;"]) == [3, 5]

    def test_used_text_is_not_used_again(self):
        assert ending(StepRule(), ["a\n\n", "\nb", "\n", "\n"]) == [0, 3]
        assert ending(StepRule("aa"), ["x", "aa", "a", "b", "a", "a"]) == [1, 5]

    def test_across_a_step_that_max_tokens_cut(self):
        assert ending(StepRule(max_tokens=2), ["one", "\n", "\n", "two", "three"]) == [1, 2, 4]

    def test_what_follows_in_the_token_counts_for_the_next_step(self):
        assert ending(StepRule(), ["a\n\nb\n", "\n"]) == [0, 1]
        assert ending(StepRule(), ["a\n\n\n", "\n"]) == [0]

    def test_several(self):
        rule = StepRule(["\n\n", "###", ";"])
        assert ending(rule, ["a", ";", "b#", "##", "c\n", "\n"]) == [1, 3, 5]

    def test_one_within_another(self):
        assert ending(StepRule(["ab;", "b"]), ["xa", "b", ";"]) == [1]
        assert ending(StepRule(["x;", ";"]), ["x", ";", "y", "x", ";"]) == [4]  # the first is nothing but delimiter

    def test_many_cost_their_length_and_no_more(self):
        def lines_run(delimiters: list[str]) -> int:
            count = 0

            def trace(frame, event, argument):
                nonlocal count
                count += event == "line"
                return trace

            sys.settrace(trace)
            try:
                StepRule(delimiters)
            finally:
                sys.settrace(None)
            return count

        for make in (lambda n: [f"d{i:05}" for i in range(n)], lambda n: ["a" * n + "b", "a" * n + "c", "b" + "a" * n]):
            few, many = lines_run(make(100)), lines_run(make(800))
            assert many < 9 * few

    @given(st.lists(st.text(alphabet="ab;é", min_size=1, max_size=5), min_size=1, max_size=7))
    def test_those_that_can_complete_first(self, delimiters):
        kept = {one for one in delimiters if not any(other in one[:-1] for other in delimiters)}
        assert sorted(_completing_first(delimiters)) == sorted(kept)

    def test_multi_byte_delimiters_split_over_tokens(self):
        end = "。".encode()
        assert ending(StepRule("。"), ["一", end[:1], end[1:2], end[2:], "二"]) == [3]

    def test_none(self):
        assert ending(StepRule(None, max_tokens=None), ["a", "\n\n", "b"]) == []
        assert ending(StepRule(None, max_tokens=2), ["a", "\n\n", "b", "c", "d"]) == [1, 3]

    @settings(max_examples=examples(400))
    @given(text=TEXT, delimiters=DELIMITERS, at=CUTS, limit=LIMIT)
    @example(text="aba.b", delimiters=["ba.", "a"], at=set(), limit=None)
    def test_ends_are_where_the_oracle_puts_them_however_it_is_cut(self, text, delimiters, at, limit):
        pieces = cut(text.encode(), at)
        rule = StepRule(delimiters, max_tokens=limit)
        assert flags(rule, pieces) == expected(pieces, completions(text, delimiters), limit)

    @settings(max_examples=examples(200))
    @given(data=st.binary(max_size=40), delimiters=DELIMITERS, at=CUTS)
    def test_any_bytes_even_invalid_ones(self, data, delimiters, at):
        """Fed byte by byte, they complete at offsets that no other cut moves."""
        data = data.replace(b"\x01", b"\n").replace(b"\x02", b"ab").replace(b"\x03", b"\xf0\x9f\x98")
        rule = StepRule(delimiters, max_tokens=None)
        offsets = [i + 1 for i in ending(rule, [data[i : i + 1] for i in range(len(data))])]
        pieces = cut(data, at)
        assert flags(rule, pieces) == expected(pieces, offsets, None)

    @settings(max_examples=examples(100))
    @given(parts=st.lists(st.sampled_from(["\n\n", ";", " ", "\t", "\n\n\n\n"]), max_size=10), at=CUTS)
    def test_nothing_but_delimiters_and_whitespace_is_no_step(self, parts, at):
        assert not any(flags(StepRule(["\n\n", ";"], max_tokens=None), cut("".join(parts).encode(), at)))


class TestRegex:
    def test_ends_with_the_character_that_completes_it(self):
        rule = StepRule(None, regex=r"Step \d+:")
        assert ending(rule, ["Step", " 1:", " add", ".\nSt", "ep 2", ":", " mul"]) == [5]

    def test_look_behind_and_look_ahead(self):
        assert ending(StepRule(None, regex=r"(?<=[.?])\s"), ["One", ".", " ", "3.5", " ok?", " "]) == [2, 5]
        assert ending(StepRule(None, regex=r"\n(?=\w)"), ["One", "\n", "\n", "Two"]) == [3]

    def test_beside_a_delimiter(self):
        rule = StepRule("\n\n", regex=r"\.\s")
        assert ending(rule, ["A.", "\n", "\n", "B", "\n\n"]) == [1, 4]  # the dot's newline is used

    def test_of_two_that_complete_together_the_longer_counts(self):
        """What it covers is delimiter, not content."""
        assert ending(StepRule(";", regex="x;"), ["x;", "y", "x;"]) == [2]
        assert ending(StepRule("x;", regex=";"), ["x;", "y", "x;"]) == [2]

    def test_greed_buys_nothing(self):
        assert ending(StepRule(None, regex="-+"), ["a", "-", "-", "b", "---"]) == [1, 4]

    @settings(max_examples=examples(400))
    @given(text=TEXT, delimiters=DELIMITERS | st.just([]), regex=REGEX, at=CUTS, limit=LIMIT)
    @example(text="abb", delimiters=[], regex=r"(?>ab|a)b", at=set(), limit=None)
    def test_ends_are_where_the_oracle_puts_them_however_it_is_cut(self, text, delimiters, regex, at, limit):
        pieces = cut(text.encode(), at)
        rule = StepRule(delimiters, max_tokens=limit, regex=regex)
        assert flags(rule, pieces) == expected(pieces, completions(text, delimiters, regex), limit)

    def test_one_that_a_later_character_can_undo_still_ends_at_the_first(self):
        """Searching the whole text would miss these."""
        assert ending(StepRule(None, regex=r"x?(?>abc|a)b"), ["y", "abc"]) == [1]
        assert ending(StepRule(None, regex=r";$"), ["a", "; b"]) == [1]


class TestResume:
    @settings(max_examples=examples(300))
    @given(
        text=TEXT,
        delimiters=DELIMITERS | st.just([]),
        regex=REGEX,
        at=CUTS,
        limit=LIMIT,
        sure=st.sets(st.integers(0, 60)),
    )
    def test_from_a_node_is_as_fed_from_the_start(self, text, delimiters, regex, at, limit, sure):
        tokens = cut(text.encode(), at)
        assume(tokens)
        rule = StepRule(delimiters, max_tokens=limit, regex=regex, confidence=0.5)
        tree = SearchTree("p")
        node, step = tree.root, []
        running = rule.matcher(tokens.__getitem__, tree.root)
        resumed = rule.matcher(tokens.__getitem__, node)
        for i in range(len(tokens)):
            prob = 0.9 if i in sure else 0.1
            assert running.uncertain(prob) == resumed.uncertain(prob) == bool(step and prob < 0.5)
            if running.uncertain(prob):
                running.cut()
                node, step = tree.add(node, step), []
                resumed = rule.matcher(tokens.__getitem__, node)
            step.append(i)
            ended = running.feed(i)
            assert resumed.feed(i) == ended
            if ended:
                node, step = tree.add(node, step), []
                resumed = rule.matcher(tokens.__getitem__, node)

    def test_copies_part_ways(self):
        tokens = [b"one", b"\n", b"\n", b"two"]
        first = StepRule(max_tokens=3).matcher(tokens.__getitem__)
        assert not first.feed(0)
        assert not first.feed(1)
        second = first.copy()
        assert second.feed(2)  # completes the delimiter
        assert first.feed(3)  # the third token
        assert not first.feed(3)


class TestConfidence:
    def test_ends_a_step_before_an_uncertain_token_but_never_an_empty_one(self):
        matcher = StepRule(None, confidence=0.4).matcher([b"a", b"b"].__getitem__)
        assert not matcher.uncertain(0.1)
        assert not matcher.feed(0)
        assert not matcher.uncertain(0.4)
        assert matcher.uncertain(0.39)
        matcher.cut()
        assert not matcher.uncertain(0.1)

    def test_a_cut_restarts_the_count(self):
        matcher = StepRule(None, max_tokens=2, confidence=0.4).matcher([b"a"].__getitem__)
        assert not matcher.feed(0)
        matcher.cut()
        assert not matcher.feed(0)
        assert matcher.feed(0)

    def test_without_a_threshold_nothing_is_uncertain(self):
        matcher = StepRule().matcher([b"a"].__getitem__)
        matcher.feed(0)
        assert not matcher.uncertain(0.0)

    @given(probs=st.lists(st.floats(0, 1), min_size=1, max_size=200), quantile=st.floats(0, 0.999))
    def test_the_quantile_cuts_at_most_that_share_and_no_larger_one_does(self, probs, quantile):
        threshold = confidence_quantile(probs, quantile)
        assert sum(p < threshold for p in probs) <= quantile * len(probs)
        larger = [p for p in probs if p > threshold]
        if larger:
            assert sum(p < min(larger) for p in probs) > quantile * len(probs)
        assert StepRule(confidence=threshold).confidence == threshold

    @pytest.mark.parametrize(
        ("probs", "quantile", "message"),
        [
            ([], 0.02, "empty"),
            ([0.5, 1.5], 0.02, "0, 1"),
            ([0.5, float("nan")], 0.02, "0, 1"),
            ([0.5], 1.0, "quantile"),
        ],
    )
    def test_bad_input(self, probs, quantile, message):
        with pytest.raises(ValueError, match=message):
            confidence_quantile(probs, quantile)


class TestRule:
    def test_ends_cuts_a_complete_response(self):
        tokens = [b"\n\n", b"one", b"\n\n", b"two", b"<eos>"]
        assert StepRule().ends(range(5), tokens.__getitem__) == [3, 5]
        assert StepRule().ends(range(3), tokens.__getitem__) == [3]
        assert StepRule().ends([], tokens.__getitem__) == []

    def test_is_a_value(self):
        rule = StepRule(["\n\n", ";"], regex=r"\.\s")
        assert rule == StepRule(("\n\n", ";"), regex=r"\.\s")
        assert hash(rule) == hash(StepRule(("\n\n", ";"), regex=r"\.\s"))
        again = pickle.loads(pickle.dumps(rule))
        assert again == rule
        assert ending(again, ["a;", "b. ", "c\n\n"]) == [0, 1, 2]
        assert " _" not in repr(StepRule("x", 5))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"delimiter": ""}, ValueError, "delimiter"),
            ({"delimiter": ["a", ""]}, ValueError, "delimiter"),
            ({"delimiter": [b"\n"]}, TypeError, "delimiter"),
            ({"max_tokens": 0}, ValueError, "max_tokens"),
            ({"max_tokens": 2.5}, TypeError, "max_tokens"),
            ({"max_tokens": True}, TypeError, "max_tokens"),
            ({"regex": "("}, ValueError, "regex"),
            ({"regex": ""}, ValueError, "regex.*empty"),
            ({"regex": "a*"}, ValueError, "regex.*empty"),
            ({"confidence": -0.1}, ValueError, "confidence"),
            ({"confidence": 1.5}, ValueError, "confidence"),
            ({"confidence": float("nan")}, ValueError, "confidence"),
        ],
    )
    def test_bad_input_is_named(self, arguments, error, message):
        with pytest.raises(error, match=message):
            StepRule(**arguments)
