"""Wrong inputs, and what becomes of them: a case is a call with one thing in it that is known to be wrong."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

OUTCOMES = ("clear", "unclear", "traceback", "silent")


class Finding(Exception):
    """The outcome of a case that is not a plain call: one of OUTCOMES, and the message."""

    def __init__(self, outcome: str, said: str) -> None:
        super().__init__(said)
        self.outcome = outcome


@dataclass(frozen=True)
class Case:
    """A call that has to be refused.

    Attributes:
        area: "api", "cli", "http" or "records".
        target: what is called.
        argument: what is wrong; a clear refusal names it.
        given: the wrong value, shortened.
        place: what has to be named in the place of the argument: a file and its line.
        call: the call. It returns where it was accepted, and may raise a Finding.
    """

    area: str
    target: str
    argument: str
    given: str
    call: Callable[[], object]
    place: str = ""

    def run(self) -> tuple[str, str]:
        """One of OUTCOMES, and what was said."""
        try:
            self.call()
        except Finding as finding:
            return finding.outcome, str(finding)
        except (ValueError, TypeError) as error:  # what users are told to expect
            return (
                "clear" if (self.place or self.argument) in str(error) else "unclear"
            ), f"{type(error).__name__}: {error}"
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {error}"
        return "silent", "accepted"


Allowed = Callable[[Any], bool]


def whole(least: int, *, none: bool = False) -> Allowed:
    """An integer of at least so much."""
    return lambda given: (none and given is None) or (_is_int(given) and given >= least)


def real(fits: Callable[[float], bool] = math.isfinite, *, none: bool = False) -> Allowed:
    """A number that fits."""

    def allowed(given: Any) -> bool:
        if given is None:
            return none
        if isinstance(given, bool | np.bool_) or not isinstance(given, Real):
            return False
        try:
            return not math.isnan(given) and fits(float(given))
        except OverflowError:
            return fits(math.inf if given > 0 else -math.inf)

    return allowed


def flag(given: Any) -> bool:
    """True or False."""
    return isinstance(given, bool | np.bool_)


def one_of(*names: Any, function: bool = False) -> Allowed:
    """One of these; or a function."""
    return lambda given: (function and callable(given)) or any(given is name or _equal(given, name) for name in names)


def function(*, none: bool = False) -> Allowed:
    """Something that can be called."""
    return lambda given: callable(given) or (none and given is None)


def nothing(given: Any) -> bool:
    """Whatever comes out of the pool is wrong."""
    return False


def _is_int(given: Any) -> bool:
    return isinstance(given, int | np.integer) and not isinstance(given, bool)


def _equal(given: Any, name: Any) -> bool:
    return type(given) is type(name) and bool(given == name)


def pool(rng: random.Random, size: int = 12) -> Iterator[Any]:
    """Values of every kind, the ones that break things first and then `size` random ones."""
    yield from (
        None,
        True,
        False,
        0,
        -1,
        1.5,
        -0.5,
        math.nan,
        math.inf,
        -math.inf,
        1e39,
        1e-50,
        10**30,
        10**400,
        -(10**400),
        "",
        "x",
        "1",
        "nonsense \ud800",
        "\x00",
        b"x",
        [],
        [1],
        ["x"],
        [None],
        [[]],
        {},
        {"x": 1},
        (),
        {1, 2},
        object(),
        type,
        len,
        1j,
        np.float32("nan"),
        np.array([1, 2]),
        np.array("x"),
        range(3),
        Ellipsis,
    )
    for _ in range(size):
        yield rng.choice(_RANDOM)(rng)


_RANDOM: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: rng.randint(-(10**9), -1),
    lambda rng: -rng.random() * 10 ** rng.randint(-9, 39),
    lambda rng: rng.random() * 10 ** rng.randint(9, 300),
    lambda rng: rng.randint(2, 9) + 0.5,
    lambda rng: "".join(chr(rng.choice((rng.randint(1, 0x7F), rng.randint(0x80, 0xD7FF)))) for _ in range(9)),
    lambda rng: [rng.random() for _ in range(rng.randint(1, 4))],
    lambda rng: {str(rng.random()): rng.random()},
    lambda rng: bytes(rng.randrange(256) for _ in range(4)),
)


def short(given: Any) -> str:
    """A value for a table: its repr, at most 60 characters, without addresses."""
    if type(given).__repr__ is object.__repr__:
        return f"<{type(given).__name__}>"
    if isinstance(given, int) and abs(given) > 10**50:
        return f"{'-' if given < 0 else ''}10**{round(math.log10(abs(given)))}"
    said = ascii(given)
    return said if len(said) <= 60 else f"{said[:57]}..."


@dataclass(frozen=True)
class Target:
    """Something that is called with named arguments.

    Attributes:
        name: of it.
        call: takes the arguments.
        wrong: argument -> what is allowed for it. Everything else of the pool is tried.
        base: the other arguments, all of them right.
        also: further wrong values for an argument.
    """

    name: str
    call: Callable[..., object]
    wrong: Mapping[str, Allowed]
    base: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Iterable[Any]] = field(default_factory=dict)

    def cases(self, rng: random.Random, size: int) -> Iterator[Case]:
        """A case for each argument and wrong value."""
        for argument, allowed in self.wrong.items():
            for given in (*self.also.get(argument, ()), *pool(rng, size)):
                if not _allows(allowed, given):
                    yield self.case(argument, given)

    def case(self, argument: str, given: Any) -> Case:
        """The case of one wrong value."""
        options = {**self.base, argument: given}
        return Case("api", self.name, argument, short(given), lambda: self.call(**options))


def _allows(allowed: Allowed, given: Any) -> bool:
    try:
        return bool(allowed(given))
    except (TypeError, ValueError):  # arrays, which have no truth, fit nowhere
        return False


@dataclass
class Tally:
    """Counts of outcomes by area and target, and what was not clear."""

    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    faults: list[tuple[Case, str, str]] = field(default_factory=list)

    def add(self, case: Case) -> str:
        """Run a case and count it."""
        outcome, said = case.run()
        self.counts.setdefault((case.area, case.target), Counter())[outcome] += 1
        if outcome != "clear":
            self.faults.append((case, outcome, said))
        return outcome

    def total(self) -> Counter[str]:
        """Outcomes over all."""
        return sum(self.counts.values(), Counter())

    def table(self) -> str:
        """Tried, clear, unclear, traceback and silent by target, as Markdown."""
        rows = [("area", "target", "tried", *OUTCOMES)]
        rows += [(area, f"`{target}`", *_numbers(counts)) for (area, target), counts in sorted(self.counts.items())]
        rows += [("all", "", *_numbers(self.total()))]
        lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
        return "\n".join([lines[0], "|---|---|" + "---:|" * (len(rows[0]) - 2), *lines[1:]])


def _numbers(counts: Counter[str]) -> tuple[int, ...]:
    return counts.total(), *(counts[outcome] for outcome in OUTCOMES)
