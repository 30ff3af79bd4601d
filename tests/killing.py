"""Runs of the command line that are killed: real processes and SIGKILL, at a point that is told and not waited for.

One process imports everything once and loads the demo's models, in float64, so that what is drawn does not depend on
which prompts share a batch. Each run is a fork of it. A run announces every record that it has written whole, or every
training step; it is killed at the wanted one, by itself, between two halves of the next line, or by the server, which
lets it run on until the signal arrives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

How = Literal["after", "within", "about"]  # a record; in the middle of its line; some moment after it


@dataclass(frozen=True)
class Kill:
    """When a run is killed: at its `count`-th record or training step, counted from 1."""

    count: int
    how: How = "after"


class Server:
    """The process that runs are forks of."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )

    def run(self, folder: Path, args: list[str], kill: Kill | None = None) -> int:
        """Run a command line in a folder. Returns its exit status, -9 where it was killed before its end.

        Args:
            folder: where; what the run says goes to `said` there.
            args: the words after `prm-search`.
            kill: when to kill it; None lets it end.
        """
        request = {"folder": str(folder), "args": args, "count": kill and kill.count, "how": kill and kill.how}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Answer requests, one a line, with the status of each run."""
    from prm_search import cli  # noqa: F401
    from prm_search.commands.models import load_pair, load_policy, quiet
    from prm_search.demo import pair_dir
    from prm_search.evaluation import run as evaluation  # noqa: F401
    from prm_search.models.loading import load
    from prm_search.training import run as training, trainer  # noqa: F401

    quiet()
    kept = load_policy("demo"), load_pair("demo", None, None)
    for name in ("policy", "prm"):
        load(pair_dir() / name, dtype="auto").lm.module.double()
    for line in sys.stdin:
        assert kept
        request = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _child(request, writing)
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as told:
            count = 0
            while told.read(1):
                count += 1
                if request["how"] == "about" and count == request["count"]:
                    os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _child(request: dict[str, Any], told: int) -> None:
    """The run. Never returns."""
    said = os.open(Path(request["folder"]) / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    status = 70
    try:
        os.chdir(request["folder"])
        _announce(told, request["count"], request["how"])
        from prm_search.cli import main

        status = main(request["args"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _announce(told: int, count: int | None, how: How | None) -> None:
    """Have every record and every training step announced, and this process killed where it is asked for."""
    from prm_search.commands import progress, records

    seen = 0

    def announce() -> None:
        nonlocal seen
        seen += 1
        os.write(told, b".")
        if how == "after" and seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    write, at = records.RecordFile.write, progress.Bar.at

    def write_and_tell(self: Any, record: Any) -> None:
        if how == "within" and seen + 1 == count:
            line = records.dumps(record).encode()
            os.write(self._file.fileno(), line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, record)
        announce()

    def at_and_tell(self: Any, what: str, done: int, total: int) -> None:
        at(self, what, done, total)
        if what == "training" and done:
            announce()

    records.RecordFile.write = write_and_tell  # type: ignore[method-assign]
    progress.Bar.at = at_and_tell  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
