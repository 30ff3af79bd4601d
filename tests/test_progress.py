"""Bars: quiet where nobody watches, moving where somebody does, and out of the way of results."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from prm_search.commands.progress import Bar


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, bool], tuple[io.StringIO, io.StringIO]]:
    """Standard output and error, each a terminal or not."""
    monkeypatch.setenv("TERM", "xterm")

    def make(out: bool, err: bool) -> tuple[io.StringIO, io.StringIO]:
        made = Terminal() if out else io.StringIO(), Terminal() if err else io.StringIO()
        monkeypatch.setattr(sys, "stdout", made[0])
        monkeypatch.setattr(sys, "stderr", made[1])
        return made

    return make


def test_nothing_is_shown_where_there_is_no_terminal(streams):
    out, err = streams(True, False)
    with Bar("prompts", 2) as bar:
        bar.tick()
        with bar.aside():
            print("a result")
        bar.tick(7)
    assert (out.getvalue(), err.getvalue()) == ("a result\n", "")


def test_a_line_is_said_in_either_case(streams):
    for terminal in (False, True):
        _, err = streams(False, terminal)
        with Bar("steps", 2) as bar:
            bar.say("step 1 [of 2]")
        assert "step 1 [of 2]\n" in err.getvalue()


def test_the_bar_moves_by_items_tokens_and_forwards(streams):
    _, err = streams(False, True)
    model = SimpleNamespace(forward_calls=3)
    with Bar("prompts", 8) as bar:
        bar.watch(model, None, object())
        bar.sampled(1200)
        bar.tick(34)
        model.forward_calls = 5
        assert bar.counts == "1,234 tokens, 5 forwards"
        bar._bar.refresh()
        shown = err.getvalue()
        assert "1/8" in shown
        assert "1,234 tokens, 5 forwards" in shown
        bar.at("held out", 40, 50)
        bar._bar.refresh()
        assert "held out" in err.getvalue()
        assert "40/50" in err.getvalue()


def test_results_on_the_same_terminal_are_whole_lines(monkeypatch):
    """Both streams are one terminal: the bar's line is erased before a result is printed on it."""
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        with Bar("prompts", 2) as bar:
            for text in ("first result", "second result"):
                with bar.aside():
                    print(text, flush=True)
                bar.tick()
        terminal.flush()
        shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    for text in ("first result", "second result"):
        before = shown[: shown.index(text)]
        assert before.endswith("\x1b[2K")  # the line was erased just before
