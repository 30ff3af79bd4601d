"""Ends of steps, from token ids.

Tokens are never split: a step ends with the token that completes a delimiter. Delimiters are looked for in the text
that the tokens spell, not in the tokens. So the cut of a text into tokens, or of a path into nodes, does not move its
delimiters.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from codecs import utf_8_decode
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from .checks import is_one_of, number

if TYPE_CHECKING:
    from .tree import Node


# Parts of a pattern by which text that comes later can undo a match (tested on the source, so with false alarms).
_LOOKS_AHEAD = re.compile(r"\$|\(\?[=!>(]|\\[bBZz]|[*+?}]\+")


@dataclass(frozen=True)
class StepRule:
    """The rule of a step's end: the first token at which any of these holds. End of sequence is the policy's business.

    Args:
        delimiter: a string, or several strings; each of them ends a step. The token that completes one ends the step
            whole. Text that a completed delimiter used is not used again. A delimiter ends nothing if only whitespace
            and delimiters came since the last one: steps are never empty. None for no delimiter.
        max_tokens: tokens of a step at most. A step cut in the middle of a delimiter is followed by one that ends
            where the delimiter completes.
        regex: a further delimiter, as a pattern (`re` syntax; it says what separates steps, not what they contain). It
            completes with the first character at which it matches the text since the last delimiter. Greedy quantifiers
            gain nothing, since the text that follows is not written yet. Costs one search of the step's text a token (a
            character, where a later character can undo a match: "$", "\\b", look-ahead, atomic groups).
        confidence: end the step before a token of which the policy is less sure than this probability (AdaptiveStep,
            arXiv 2502.13943, section 3); `confidence_quantile` calibrates it.
        confidence_of: the probability that is meant: "top", of the most probable token, which no draw moves; or
            "drawn", of the token that was drawn, as AdaptiveStep has it. A drawn token that begins the next step is
            drawn again there, the same one. Before temperature and filters in both cases.

    Raises:
        ValueError: a delimiter is empty, the regex matches the empty string or is not a pattern, max_tokens < 1, or
            confidence is outside [0, 1], or
            confidence_of is unknown.
        TypeError: a delimiter or the regex is not a string, max_tokens is not an integer, or confidence is not a
            number.
    """

    delimiter: str | Sequence[str] | None = "\n\n"
    max_tokens: int | None = 256
    regex: str | None = None
    confidence: float | None = None
    confidence_of: Literal["top", "drawn"] = "top"
    _literal: re.Pattern[str] | None = field(init=False, repr=False, compare=False, default=None)
    _pattern: re.Pattern[str] | None = field(init=False, repr=False, compare=False, default=None)
    _keep: int = field(init=False, repr=False, compare=False, default=0)
    _settled: bool = field(init=False, repr=False, compare=False, default=False)
    _first: tuple[str, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        delimiter = self.delimiter
        try:
            delimiters = () if delimiter is None else (delimiter,) if isinstance(delimiter, str) else tuple(delimiter)
        except TypeError as error:
            message = f"delimiter={delimiter!r}: a string, strings or None is needed, not {type(delimiter).__name__}"
            raise TypeError(message) from error
        for item in delimiters:
            if not isinstance(item, str):
                raise TypeError(
                    f"delimiter={delimiter!r}: a string, strings or None is needed, not {type(item).__name__}"
                )
            if not item:
                raise ValueError(f"delimiter={delimiter!r}: an empty string ends no step; use None for no delimiter")
        if not isinstance(delimiter, str | None):
            object.__setattr__(self, "delimiter", delimiters)  # hashable
        if self.max_tokens is not None:
            if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int | np.integer):
                raise TypeError(f"max_tokens={self.max_tokens!r}: an integer >= 1 or None is needed")
            if self.max_tokens < 1:
                raise ValueError(f"max_tokens={self.max_tokens!r}: an integer >= 1 or None is needed")
        if self.confidence is not None:
            number("confidence", self.confidence, "a probability in [0, 1] or None", lambda x: 0 <= x <= 1)
        if not is_one_of(self.confidence_of, ("top", "drawn")):
            raise ValueError(f"confidence_of={self.confidence_of!r}: it is 'top' or 'drawn'")
        if self.regex is not None:
            if not isinstance(self.regex, str):
                raise TypeError(f"regex={self.regex!r}: a string or None is needed, not {type(self.regex).__name__}")
            try:
                pattern = re.compile(self.regex)
            except (re.error, ValueError, OverflowError, RecursionError) as error:
                raise ValueError(f"regex={self.regex!r:.200} is not a pattern: {error}") from error
            if pattern.search(""):
                raise ValueError(f"regex={self.regex!r} matches the empty string, so it would end every step at once")
            object.__setattr__(self, "_pattern", pattern)
            object.__setattr__(self, "_settled", not _LOOKS_AHEAD.search(self.regex))
        if delimiters:
            # With those that never complete first gone, the leftmost match is the one that completes first, and of
            # two that end together the longer.
            first = _completing_first(delimiters)
            object.__setattr__(self, "_literal", re.compile("|".join(map(re.escape, first))))
            object.__setattr__(self, "_keep", max(map(len, first)) - 1)
            object.__setattr__(self, "_first", tuple(first))

    @property
    def finite(self) -> bool:
        """Return True if delimiters can be told by a `StepMatcher.text_state`: no regex, and none is a whole text."""
        return self.regex is None and sum(map(len, self._first)) <= 1000

    def matcher(self, piece: Callable[[int], bytes], node: Node | None = None) -> StepMatcher:
        """A matcher for what follows a node, or for a response from its start.

        Args:
            piece: bytes that a token id adds (`TokenText.piece`).
            node: the node whose children will be fed; None, like the root, for the start of a response.
        """
        matcher = StepMatcher(self, piece)
        if node is not None and node.parent is not None:
            # Nodes end where steps do, so all that carries over is the unfinished delimiter.
            matcher._scan(b"".join(map(piece, node.path_ids())))
        return matcher

    def ends(self, token_ids: Sequence[int], piece: Callable[[int], bytes]) -> list[int]:
        """Cut a complete response: the number of tokens up to each step's end, rising; the last is all of them.

        Args:
            token_ids: [T] response tokens; no step for T = 0.
            piece: bytes that a token id adds (`TokenText.piece`).
        """
        feed = StepMatcher(self, piece).feed
        ends = [i for i, token_id in enumerate(token_ids, 1) if feed(token_id)]
        if len(token_ids) and (not ends or ends[-1] != len(token_ids)):
            ends.append(len(token_ids))
        return ends


class TextState(NamedTuple):
    """The part of a matcher's text that later text can still make matter.

    Fields: `partial`, first bytes of a character; `tail`, the longest end of the text since the last delimiter with
    which some delimiter begins; `content`, whether more than whitespace came before it.
    """

    partial: bytes
    tail: str
    content: bool


class StepMatcher:
    """The state of one row of a decode loop: tokens since the step began, and the text a delimiter may still use.

    Made by `StepRule.matcher`. A few microseconds a token.
    """

    __slots__ = ("_content", "_keep", "_limit", "_partial", "_piece", "_rule", "_tail", "_tokens")

    def __init__(self, rule: StepRule, piece: Callable[[int], bytes]) -> None:
        self._rule = rule
        self._piece = piece
        self._limit = rule.max_tokens
        self._keep = rule._keep
        self._tokens = 0
        self._partial = b""  # first bytes of a character
        self._tail = ""  # text since the last delimiter; its last few characters suffice without a regex
        self._content = False  # whether what was dropped of that text was more than whitespace

    def feed(self, token_id: int) -> bool:
        """Take a token; True when it ends the step, and then the matcher is ready for the next step."""
        self._tokens += 1
        if self._scan(self._piece(token_id)) or self._tokens == self._limit:
            self._tokens = 0
            return True
        return False

    def uncertain(self, top_prob: float, drawn_prob: float = 1.0, *, first: bool = False) -> bool:
        """Return True if the step ends before the next token; if so, and it is ended, call `cut`.

        Args:
            top_prob: probability of the most probable next token, in [0, 1], before temperature and filters.
            drawn_prob: that of the token that was drawn.
            first: ask it of a step's first token too; else that is always taken.
        """
        rule = self._rule
        probability = top_prob if rule.confidence_of == "top" else drawn_prob
        return rule.confidence is not None and (first or self._tokens > 0) and probability < rule.confidence

    def cut(self) -> None:
        """The step ended before a token; the matcher is ready for the next step."""
        self._tokens = 0

    def text_state(self) -> TextState:
        """Return what is known of the text, for a rule without a regex: equal states go on alike."""
        begins = _beginnings(self._rule._first)
        at = next(at for at in range(len(self._tail) + 1) if self._tail[at:] in begins)
        return TextState(self._partial, self._tail[at:], self._content or _solid(self._tail[:at]))

    def restore(self, state: TextState, tokens: int) -> None:
        """Go on from a `text_state`, after so many tokens of the step."""
        self._partial, self._tail, self._content = state
        self._tokens = tokens

    def read(self, token_id: int) -> bool:
        """Take a token's text without counting it; True where a delimiter that ends the step completes in it."""
        return self._scan(self._piece(token_id))

    def copy(self) -> StepMatcher:
        """An independent matcher in the same state."""
        twin = StepMatcher.__new__(StepMatcher)
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        return twin

    def _scan(self, piece: bytes) -> bool:
        """Append bytes; whether a delimiter that ends a step completes in them."""
        text, used = utf_8_decode(self._partial + piece, "replace", False)
        self._partial = (self._partial + piece)[used:]
        if self._rule._pattern is not None:
            return self._scan_regex(text)
        literal = self._rule._literal
        if literal is None or not text:
            return False
        text = self._tail + text
        ended, done = False, 0
        for match in literal.finditer(text):
            ended = ended or self._content or _solid(text[done : match.start()])
            self._content = False
            done = match.end()
        drop = max(done, len(text) - self._keep)
        self._content = self._content or _solid(text[done:drop])
        self._tail = text[drop:]
        return ended

    def _scan_regex(self, text: str) -> bool:
        seen = len(self._tail)
        text = self._tail + text
        ended = False
        while match := self._first(text, seen):
            start, end = match
            ended = ended or _solid(text[:start])
            text, seen = text[end:], 0
        self._tail = text
        return ended

    def _first(self, text: str, seen: int) -> tuple[int, int] | None:
        """Start and end of what completes first after the first `seen` characters, which complete nothing."""
        rule = self._rule
        assert rule._pattern is not None
        search = rule._pattern.search
        literal = rule._literal.search(text) if rule._literal is not None else None
        last = len(text) if literal is None else literal.end()
        match = None
        if rule._settled:
            if search(text, 0, last):
                end = bisect_left(range(last), True, lo=seen + 1, key=lambda e: search(text, 0, e) is not None)
                match = search(text, 0, end)
        else:
            match = next((m for e in range(seen + 1, last + 1) if (m := search(text, 0, e))), None)
        if match is None or (literal is not None and match.endpos == last and literal.start() < match.start()):
            return None if literal is None else literal.span()
        return match.start(), match.endpos


def _completing_first(delimiters: Iterable[str]) -> list[str]:
    """Return the delimiters that can complete first: none of the others lies in them before their last character.

    The time is linear in their total length, by the automaton of Aho and Corasick (CACM 18(6), 1975). In its trie, each
    state links to the longest proper suffix of its text that is in the trie too.
    """
    children: list[dict[str, int]] = [{}]
    whole: dict[int, str] = {}  # state -> the delimiter that it spells
    for delimiter in delimiters:
        state = 0
        for character in delimiter:
            following = children[state].setdefault(character, len(children))
            if following == len(children):
                children.append({})
            state = following
        whole[state] = delimiter
    suffix, completed = [0] * len(children), [state in whole for state in range(len(children))]
    reached, queue = [], deque([0])
    while queue:
        state = queue.popleft()
        for character, following in children[state].items():
            link = suffix[state]
            while link and character not in children[link]:
                link = suffix[link]
            suffix[following] = children[link].get(character, 0) if state else 0
            completed[following] |= completed[suffix[following]]
            if following in whole:
                reached.append(whole[following])
            if not completed[following]:  # what is longer completes later
                queue.append(following)
    return reached


@lru_cache(maxsize=64)
def _beginnings(delimiters: tuple[str, ...]) -> frozenset[str]:
    """Return what could go on to a delimiter: the proper beginnings of all, the empty one among them."""
    return frozenset({"", *(one[:n] for one in delimiters for n in range(len(one)))})


def _solid(text: str) -> bool:
    """Return True if there is more than whitespace."""
    return bool(text) and not text.isspace()


def confidence_quantile(probs: Sequence[float] | np.ndarray, quantile: float = 0.02) -> float:
    """The threshold for `StepRule(confidence=...)` at which a given share of tokens would start a step.

    AdaptiveStep (arXiv 2502.13943) samples responses, collects the probability of every token and cuts at the
    lowest 2 %.

    Args:
        probs: top next-token probability at each position of some responses of the policy, in [0, 1], any shape.
        quantile: share of positions to cut at, in [0, 1).

    Returns:
        The largest of these probabilities that at most that share of them lies below.

    Raises:
        ValueError: the list is empty, a value is not a probability, or quantile is out of range.
    """
    flat = np.sort(np.asarray(probs, dtype=np.float64), axis=None)
    if flat.size == 0:
        raise ValueError("probs is empty; collect the policy's top probabilities on some responses first")
    if not (flat[0] >= 0 and flat[-1] <= 1):  # NaN sorts last and fails the comparison
        raise ValueError(f"probs must lie in [0, 1], got {flat[0]} to {flat[-1]}")
    number("quantile", quantile, "a share in [0, 1)", lambda share: 0 <= share < 1)
    return float(flat[int(quantile * flat.size)])
