"""Equivalence of two final answers: by number, by spelling, and by math-verify where it is installed."""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from .numbers import Number, parse_number

SECONDS = 5.0  # for one comparison by math-verify
_START_SECONDS = 60.0  # for importing it

_FUNCTIONS = {"sqrt", "sin", "cos", "tan", "log", "exp", "abs", "min", "max", "mod", "inf", "infinity", "frac"}
_REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^\$+|\$+$|^\\[(\[]|\\[)\]]$", ""),  # math delimiters
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;:]", ""),  # layout
        (r"\\ |~", " "),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<=[0-9}])\s*\\(?:text|mathrm|mbox)\{[^{}]*\}\s*$", ""),  # a unit
        (r"\\(?:text|mathrm|mbox|textbf|mathbf)\{([^{}]*)\}", r"\1"),
        (r"\\?%|\\?\$|\^\{?\\circ\}?|\\degree|°", ""),  # percent, currency, degrees
        ("\u2212", "-"),
        (r"\\frac\s*([0-9])", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
        (r"^\s*[A-Za-z]\s*=(?!=)", ""),  # "x = 5" answers 5
        (r"\.\s*$", ""),
    )
)

_BARE = tuple(  # layout alone: what a number may stand in
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^\${1,2}([^$]*)\${1,2}$|^\\\((.*)\\\)$|^\\\[(.*)\\\]$", r"\1\2\3"),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;:]", ""),
        (r"\{,\}", ","),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"\\ |~", " "),
        (r"\\([$%])", r"\1"),
        (r"^\s*\\(?:text|mathrm|mbox|textbf|mathbf)\{([^{}]*)\}\s*$", r"\1"),
        (r"\\frac\s*([0-9])", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"^\s*[A-Za-z]\s*=(?!=)", ""),
        (r"\.\s*$", ""),
    )
)


def normalize(answer: str) -> str:
    """One spelling for answers that differ in layout, or in the way they write a number.

    The rules are those usual for MATH (Hendrycks et al., arXiv 2103.03874, and later evaluations): math delimiters,
    spacing commands, LaTeX's units after a number, percent and currency signs and "x =" go; fractions have braces. A
    number becomes an integer or a reduced fraction, so "0.50", ".5", "1/2", "5e-1" and "\\frac12" are one. A unit in
    words stays behind the number, in one spelling. Case is kept.
    """
    return form(answer).text


def _spelling(answer: str) -> str:
    """The same for an answer that is not a number as a whole."""
    text = answer.strip()
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text).strip()
    number = parse_number(text)
    if number is not None:
        return _written(number)
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.split()))


@dataclass(frozen=True)
class Form:
    """An answer prepared for comparison: its normal spelling, and the number that it is, if it is one."""

    text: str
    number: Number | None


@lru_cache(maxsize=65536)
def form(answer: str) -> Form:
    """The form of an answer."""
    text = answer.strip()
    for pattern, new in _BARE:
        text = pattern.sub(new, text).strip()
    number = parse_number(text)
    return Form(_spelling(answer) if number is None else _written(number), number)


def _written(number: Number) -> str:
    return f"{number.value} {number.unit}" if number.in_words else str(number.value)


def equivalent(a: str, b: str) -> bool:
    """Return True if two answers are the same.

    Numbers are compared exactly, however they are written: 3.0e2, 3\\times10^{2} and 300 are one, 2 1/2 is 5/2. A unit,
    a currency or a percent sign may be missing on one side; two different units are two answers, and 50 % is both 50
    and 1/2. Other answers are the same where their spellings are (see `normalize`). Where both look like mathematics,
    math-verify decides the rest, if it is installed (`pip install prm-search[answers]`). It runs in a worker process
    and may be asked from any thread. Numbers that math-verify takes for equal have to agree in five digits. A
    comparison that takes longer than 5 seconds counts as different. Replies are cached.
    """
    return same(form(a), form(b))


def same(a: Form, b: Form) -> bool:
    """`equivalent` for forms."""
    if alike(a, b):
        return True
    numbers = [side.number for side in (a, b) if side.number is not None]
    if len(numbers) == 2 or any(number.in_words for number in numbers):
        return False
    if not (_mathematical(_expression(a)) and _mathematical(_expression(b))):
        return False
    first, second = sorted((_expression(a), _expression(b)))
    return _WORKER.equal(first, second)


def alike(a: Form, b: Form) -> bool:
    """The same without math-verify: equal numbers, or equal spellings."""
    if a.number is None or b.number is None:
        return a.text == b.text
    if a.number.unit and b.number.unit and a.number.unit != b.number.unit:
        return False
    if a.number.value == b.number.value:
        return True
    if a.number.percent == b.number.percent:
        return False
    share, other = (a.number, b.number) if a.number.percent else (b.number, a.number)
    return share.value == 100 * other.value


def _expression(answer: Form) -> str:
    """Return what math-verify is asked about."""
    return answer.text if answer.number is None else str(answer.number.value)


@lru_cache(maxsize=65536)
def _mathematical(key: str) -> bool:
    """Return True if parsing makes sense: operators or digits, and no words (products of letters, to a parser)."""
    bare = re.sub(r"\\[A-Za-z]+", " ", key)
    if len(key) > 500 or not set(re.findall(r"[^\W\d_]{3,}", bare)) <= _FUNCTIONS:
        return False
    return bool(re.search(r"[0-9\\^+*/=<>-]", key))


class _Worker:
    """The process that runs math_worker.py: started at the first question, replaced when it hangs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._usable = find_spec("math_verify") is not None and bool(sys.executable)
        self._replies: dict[tuple[str, str], bool] = {}
        self._hung: Counter[str] = Counter()

    def equal(self, a: str, b: str) -> bool:
        """Return what math-verify says; False where it is not installed or does not answer in time."""
        with self._lock:
            known = self._replies.get((a, b))
            if known is not None:
                return known
            # One of a hung pair is to blame, and the first to hang twice is not asked about again.
            if not self._usable or max(self._hung[a], self._hung[b]) >= 2:
                return False
            reply = self._ask(a, b)
            if reply is None:
                self._hung.update((a, b))
            if len(self._replies) >= 65536:
                self._replies.clear()
            self._replies[a, b] = bool(reply)
            return bool(reply)

    def _ask(self, a: str, b: str) -> bool | None:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        if process is None:
            return False
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([a, b]) + "\n")
            process.stdin.flush()
        except OSError:  # it died
            self.stop()
            return None
        line = self._read(process, SECONDS)
        if not line:
            self.stop()
            return None
        return bool(json.loads(line))

    def _start(self) -> subprocess.Popen[str] | None:
        self.stop()
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._process = process
        line = self._read(process, _START_SECONDS)
        if line and json.loads(line) is True:
            return process
        reason = json.loads(line) if line else "it did not start"
        warnings.warn(f"math-verify cannot be used, answers are compared as strings: {reason}", stacklevel=2)
        self.stop()
        self._usable = False
        return None

    @staticmethod
    def _read(process: subprocess.Popen[str], seconds: float) -> str:
        """A line of its output; empty where it died or was killed for taking longer."""
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            return process.stdout.readline()
        finally:
            timer.cancel()

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):  # unwritten input
                    stream.close()
        process.wait()


_WORKER = _Worker()


def _after_fork() -> None:
    """A forked child must not share its parent's pipes, nor a lock that a thread held."""
    global _WORKER
    _WORKER = _Worker()


atexit.register(lambda: _WORKER.stop())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
