"""Decides whether two expressions are equal, in a process of its own: `python -P math_worker.py`.

Reads a JSON pair of expressions a line, writes true or false a line; the first line written is true once math-verify is
imported, else the reason. It is a process because sympy can take for ever on what a model wrote. Only an alarm signal
could stop sympy in the caller's process; alarm signals work in main threads only and belong to the application.
"""

import json
import sys
from functools import lru_cache
from typing import Any

CLOSE = 1e-5  # of the larger of two numbers


def main() -> None:
    """Answer pairs from standard input until it closes."""
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply

    def reply(value: object) -> None:
        print(json.dumps(value), file=replies, flush=True)

    try:
        from math_verify import parse, verify
    except Exception as error:
        reply(f"{type(error).__name__}: {error}")
        return

    @lru_cache(maxsize=4096)
    def parsed(expression: str) -> Any:
        return parse(f"\\boxed{{{expression}}}", parsing_timeout=None)

    def equal(first: str, second: str) -> bool:
        a, b = parsed(first), parsed(second)
        # Its verify is not symmetric (assignments, intervals); equality is.
        if not (verify(a, b, timeout_seconds=None) or verify(b, a, timeout_seconds=None)):
            return False
        return not any(apart(x, y) for x, y in zip(a, b, strict=False))

    equal("x+1", "1+x")  # what is loaded at the first question is loaded now
    reply(True)
    for line in sys.stdin:
        try:
            reply(equal(*json.loads(line)))
        except Exception:
            reply(False)


def apart(a: Any, b: Any) -> bool:
    """Return True if two expressions are numbers, or alike collections of them, that differ by more than CLOSE.

    math-verify rounds to a number of decimals, so that any two tiny numbers are equal to it. Symbols are given values.
    """
    from sympy import Expr, FiniteSet, Interval, MatrixBase, N, Tuple

    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and any(map(apart, a, b))
    if isinstance(a, FiniteSet) and isinstance(b, FiniteSet):
        try:
            return len(a) == len(b) and any(map(apart, sorted(a, key=N), sorted(b, key=N)))
        except TypeError:  # of things that have no order
            return False
    if isinstance(a, Tuple | Interval) and isinstance(b, Tuple | Interval):
        return len(a.args) == len(b.args) and any(map(apart, a.args, b.args))
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    values = {symbol: 1 + (k + 1) / 7 for k, symbol in enumerate(symbols)}
    x, y = N(a.subs(values), 30), N(b.subs(values), 30)
    if not (x.is_finite and y.is_finite):
        return False
    return bool(abs(x - y) > CLOSE * max(abs(x), abs(y)))


if __name__ == "__main__":
    main()
