"""Decides whether two expressions are equal, in a process of its own: `python -P math_worker.py`.

Reads a JSON pair of expressions a line, writes true or false a line; the first line written is true once math-verify is
imported, else the reason. A process, because sympy can take for ever on what a model wrote, a caller's only way to
stop it is an alarm signal, and those work in main threads only and belong to the application.
"""

import json
import sys
from functools import lru_cache
from typing import Any


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
    reply(True)

    @lru_cache(maxsize=4096)
    def parsed(expression: str) -> Any:
        return parse(f"\\boxed{{{expression}}}", parsing_timeout=None)

    for line in sys.stdin:
        try:
            a, b = (parsed(expression) for expression in json.loads(line))
            # Its verify is not symmetric (assignments, intervals); equality is.
            reply(bool(verify(a, b, timeout_seconds=None) or verify(b, a, timeout_seconds=None)))
        except Exception:
            reply(False)


if __name__ == "__main__":
    main()
