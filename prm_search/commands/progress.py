"""A bar that moves while a command works: on standard error, and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.text import Text

from .render import console


class Bar:
    """Progress of a command's work, with the time that it took and may take.

    Where single items are slow, the numbers beside the bar move between them: tokens that were sampled, and forwards of
    the models that are watched.

    Args:
        what: is counted.
        total: how many.
    """

    def __init__(self, what: str, total: int) -> None:
        screen = console(stderr=True)
        self._shared = screen.is_terminal and sys.stdout.isatty()  # results appear on the same terminal
        self._models: list[Any] = []
        self._tokens = 0
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), _Counts(self), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=screen, transient=True, disable=not screen.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total)

    def tick(self, tokens: int = 0) -> None:
        """One more is done, of so many tokens."""
        self.sampled(tokens)
        self._bar.advance(self._task)

    def sampled(self, tokens: int) -> None:
        """So many more tokens are sampled."""
        self._tokens += tokens

    def watch(self, *models: Any) -> None:
        """Show how many forwards these have run, where they say so."""
        self._models += [model for model in models if model is not None]

    def at(self, what: str, done: int, total: int) -> None:
        """Another kind of work, or another amount of it."""
        self._bar.update(self._task, description=what, completed=done, total=total)

    def say(self, line: str) -> None:
        """A line on standard error, above the bar."""
        if self._bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(Text(line))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within this context results are printed; where that is the same terminal, the bar makes room."""
        if self._shared:
            self._bar.stop()
        try:
            yield
        finally:
            if self._shared:
                sys.stdout.flush()
                self._bar.start()

    @property
    def counts(self) -> str:
        """Tokens and forwards so far."""
        forwards = sum(int(getattr(model, "forward_calls", 0) or 0) for model in self._models)
        parts = [(self._tokens, "tokens"), (forwards, "forwards")]
        return ", ".join(f"{count:,} {name}" for count, name in parts if count)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class _Counts(ProgressColumn):
    """Counts that move between items."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._of = bar

    def render(self, task: Task) -> Text:
        """The counts, as they are now."""
        return Text(self._of.counts, style="dim", no_wrap=True)
