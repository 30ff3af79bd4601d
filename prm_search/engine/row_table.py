"""The rows that are being decoded, as arrays: what each token does to all of them at once.

A row's own object is brought up to date when something may end with its newest token: `drawing.Draw` decides, here is
only told for which rows it has to be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..rng import counters_of, uniforms_at
from ..sampling import Sampling
from .decoding_row import DecodingRow
from .step_automaton import StepAutomaton, automaton_of

AHEAD = 16  # uniform numbers that are made at once for a row
NO_LIMIT = 1 << 60


class RowTable:
    """Rows and their state.

    Args:
        models: whose log-probabilities of each token are kept.
        stop_ids: tokens that end a response.
        watch: bring every row up to date at every token, for whoever reads rows between tokens.

    Attributes:
        rows: in order; every array has one line for each.
        heat: [R] temperatures.
    """

    def __init__(self, models: int, stop_ids: frozenset[int], watch: bool) -> None:
        self.rows: list[DecodingRow] = []
        self._watch = watch
        self._stop = np.zeros(max(stop_ids, default=-1) + 2, bool)  # the last stands for all tokens behind it
        self._stop[list(stop_ids)] = True
        self._machines: list[StepAutomaton] = []
        whole = np.zeros(0, np.int64)
        self.heat = np.zeros(0)
        self._counters = np.zeros((0, 3), np.int64)
        self._uniforms = np.zeros((0, AHEAD))
        self._first = whole  # position of the first of them
        self._left, self._used, self._limit, self._pending = (whole.copy() for _ in range(4))
        self._state, self._before, self._machine = (whole.copy() for _ in range(3))
        self._watched = np.zeros(0, bool)
        self._tokens = np.zeros((0, 16), np.int64)
        self._values = np.zeros((0, models + 1, 16))  # log-probabilities under each model, and the confidence
        self._made: list[Sampling] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def unwatched(self) -> bool:
        """Return True if no row has to see every token."""
        return not self._watched.any()

    @property
    def samplings(self) -> list[Sampling]:
        """Return the distinct samplings of the rows."""
        if self._made is None:
            self._made = list({id(row.request.sampling): row.request.sampling for row in self.rows}.values())
        return self._made

    def add(self, rows: Sequence[DecodingRow]) -> None:
        """Append rows that have drawn nothing."""
        if not rows:
            return
        samplings = [row.request.sampling for row in rows]
        counters = counters_of(
            [sampling.seed for sampling in samplings],
            [row.request.node.tree.stream for row in rows],
            [row.lineage for row in rows],
            [row.position for row in rows],
        )
        machines = [self._machine_of(row) for row in rows]
        states = [
            0 if at < 0 else self._machines[at].number(row.matcher) for row, at in zip(rows, machines, strict=True)
        ]
        limits = [sampling.steps.max_tokens or NO_LIMIT for sampling in samplings]
        count = len(rows)
        for place, row in enumerate(rows, len(self.rows)):
            row.follow(partial(self.catch_up, place, newest=True))
        self.rows += rows
        self._made = None
        self.heat = np.concatenate([self.heat, [sampling.temperature for sampling in samplings]])
        self._counters = np.concatenate([self._counters, counters])
        self._uniforms = np.concatenate([self._uniforms, np.zeros((count, AHEAD))])
        self._first = np.concatenate([self._first, np.full(count, -AHEAD)])
        self._left = np.concatenate([self._left, [row.left for row in rows]])
        self._limit = np.concatenate([self._limit, limits])
        self._state = np.concatenate([self._state, states])
        self._machine = np.concatenate([self._machine, machines])
        self._watched = np.concatenate([self._watched, [at < 0 for at in machines]])
        for name in ("_used", "_pending", "_before"):
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(count, np.int64)]))
        self._tokens = np.concatenate([self._tokens, np.zeros((count, self._tokens.shape[1]), np.int64)])
        self._values = np.concatenate([self._values, np.zeros((count, *self._values.shape[1:]))])

    def _machine_of(self, row: DecodingRow) -> int:
        """Return the number of the row's automaton; -1 for a row whose own object has to see every token."""
        rule = row.request.sampling.steps
        odd = (
            row.stops is not None
            or row.request.ranked
            or row.request.floor is not None
            or rule.confidence is not None
            or not rule.finite
        )
        if self._watch or odd:
            return -1
        machine = automaton_of(rule, row.tokens)
        if machine not in self._machines:
            self._machines.append(machine)
        return self._machines.index(machine)

    def keep(self, places: np.ndarray) -> None:
        """Keep the rows at these places [K], rising, and let the others go, up to date."""
        for place in set(range(len(self.rows))) - set(places.tolist()):
            self.catch_up(place, newest=True)
            self.rows[place].follow(None)
        self.rows = [self.rows[i] for i in places]
        for place, row in enumerate(self.rows):
            row.follow(partial(self.catch_up, place, newest=True))
        self._made = None
        for name in (
            "heat", "_counters", "_uniforms", "_first", "_left", "_used", "_limit", "_pending", "_state", "_before",
            "_machine", "_watched", "_tokens", "_values",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[places])

    # --- a token -----------------------------------------------------------------------------------------------------

    def counters(self) -> np.ndarray:
        """Return the counters of the next draw of each row, [R, 3] int64; see rng.counters_of."""
        return self._counters

    def uniforms(self) -> np.ndarray:
        """Return the uniform number of the next draw of each row, [R] float64; AHEAD of them are made at once."""
        at = self._counters[:, 2] - self._first
        if (at >= AHEAD).any():
            many = np.repeat(self._counters, AHEAD, axis=0)
            many[:, 2] += np.tile(np.arange(AHEAD), len(self.rows))
            self._uniforms = uniforms_at(many).reshape(-1, AHEAD)
            self._first = self._counters[:, 2].copy()
            at = np.zeros_like(at)
        return self._uniforms[np.arange(len(at)), at]

    def book(self, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Take a token for each row.

        Args:
            tokens: [R] int64 ids.
            values: [R, models + 1]: their log-probabilities, nats, and the confidence.

        Returns:
            the places of rows that something may end in with this token, rising: `catch_up` and ask them.
        """
        lines, column = np.arange(len(tokens)), self._pending
        if column.max() >= self._tokens.shape[1]:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)], axis=1)
            self._values = np.concatenate([self._values, np.zeros_like(self._values)], axis=2)
        self._tokens[lines, column] = tokens
        self._values[lines, :, column] = values
        self._pending += 1
        self._left -= 1
        self._used += 1
        self._counters[:, 2] += 1
        event = self._watched | (self._left == 0) | (self._used == self._limit)
        event |= self._stop[np.minimum(tokens, len(self._stop) - 1)]
        self._before = self._state
        if len(self._machines) == 1 and not self._watched.any():
            self._state, ended = self._machines[0].feed(self._state, tokens)
            event |= ended
        else:
            self._state = self._state.copy()
            for number, machine in enumerate(self._machines):
                mine = np.flatnonzero(self._machine == number)
                if len(mine):
                    self._state[mine], ended = machine.feed(self._state[mine], tokens[mine])
                    event[mine] |= ended
        return np.flatnonzero(event)

    def most(self, place: int) -> int:
        """Return how many tokens a row may still draw before its request ends it."""
        request, left = self.rows[place].request, int(self._left[place])
        return min(left, int(self._limit[place])) if request.until == "step" else left

    def catch_up(self, place: int, *, newest: bool) -> None:
        """Bring a row's object up to date.

        Args:
            place: the row's.
            newest: with the newest token, which ends nothing; without it, so that its object takes and settles it.
        """
        row = self.rows[place]
        count = int(self._pending[place]) - (not newest)
        values = self._values[place, :, :count]
        row.read_many(self._tokens[place, :count].tolist(), values.tolist())
        if self._machine[place] >= 0:
            used, state = int(self._used[place]) - (not newest), (self._state if newest else self._before)[place]
            self._machines[self._machine[place]].restore(row.matcher, int(state), used)
        self._pending[place] = 0

    def settled(self, place: int) -> None:
        """Follow a row's object after it has taken the newest token, or ended a step before it."""
        row = self.rows[place]
        if row.fresh:
            self._used[place] = 0
