"""The delimiters of a StepRule as an automaton over token ids, for many rows at once.

A state is what a StepMatcher knows of the text, without what can no longer matter. The matcher itself makes a
transition, of bytes, the first time that a token comes in a state; from then on it is looked up.
"""

from __future__ import annotations

import weakref

import numpy as np

from ..drawing import Tokens
from ..steps import StepMatcher, StepRule, TextState

DENSE = 64  # states with a line in the table; further ones, of odd bytes, are looked up one by one


class StepAutomaton:
    """The automaton of one rule's delimiters over one vocabulary. What a step's length ends is counted elsewhere.

    Args:
        rule: without a regex.
        tokens: the vocabulary.
    """

    def __init__(self, rule: StepRule, tokens: Tokens) -> None:
        self._rule, self._tokens = rule, weakref.ref(tokens)
        self._states: list[TextState] = []
        self._number: dict[TextState, int] = {}
        self._table = np.zeros((0, 0), np.int32)  # 1 + 2 * next state + whether the step ends; 0: not made yet
        self._rest: dict[tuple[int, int], int] = {}

    def number(self, matcher: StepMatcher) -> int:
        """Return the state that a matcher is in."""
        state = matcher.text_state()
        known = self._number.get(state)
        if known is None:
            known = self._number[state] = len(self._states)
            self._states.append(state)
        return known

    def restore(self, matcher: StepMatcher, number: int, tokens: int) -> None:
        """Put a matcher into a state, `tokens` after the step's beginning."""
        matcher.restore(self._states[number], tokens)

    def feed(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A token for each row.

        Args:
            states: [R] int64 numbers of states.
            tokens: [R] int64 ids.

        Returns:
            the next states [R] int64, and whether a delimiter ends the step [R] bool.
        """
        self._widen(int(states.max()) + 1, int(tokens.max()) + 1)
        codes = self._table[np.minimum(states, DENSE - 1), tokens].astype(np.int64)
        unknown = (codes == 0) | (states >= DENSE)
        for i in np.flatnonzero(unknown):
            codes[i] = self._made(int(states[i]), int(tokens[i]))
        codes -= 1
        return codes >> 1, (codes & 1).astype(bool)

    def _widen(self, states: int, tokens: int) -> None:
        have = self._table.shape
        states = min(states, DENSE)
        if states > have[0] or tokens > have[1]:
            lines = min(DENSE, max(states, have[0], 8))
            lines = lines if lines <= have[0] else min(DENSE, 2 * lines)
            table = np.zeros((lines, max(tokens, have[1]) if tokens <= have[1] else 2 * tokens), np.int32)
            table[: have[0], : have[1]] = self._table
            self._table = table

    def _made(self, state: int, token: int) -> int:
        code = self._table[state, token] if state < DENSE else self._rest.get((state, token), 0)
        if code:
            return int(code)
        tokens = self._tokens()
        assert tokens is not None  # whoever feeds has it
        matcher = StepMatcher(self._rule, tokens.piece)
        matcher.restore(self._states[state], 0)
        ended = matcher.read(token)
        code = 1 + 2 * self.number(matcher) + ended
        if state < DENSE:
            self._table[state, token] = code
        else:
            self._rest[state, token] = code
        return code


_automata: weakref.WeakKeyDictionary[Tokens, dict[object, StepAutomaton]] = weakref.WeakKeyDictionary()


def automaton_of(rule: StepRule, tokens: Tokens) -> StepAutomaton:
    """Return the automaton of a rule's delimiters over a vocabulary; one serves all rules that have these."""
    known = _automata.setdefault(tokens, {})
    if rule.delimiter not in known:
        known[rule.delimiter] = StepAutomaton(rule, tokens)
    return known[rule.delimiter]
