"""Processes of their own, which say themselves when they have come to the place that a test waits for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM = Path(sys.executable).parent / "prm-search"

_HELD = """
import os, runpy, sys
sys.path.append({tests!r})
def hold():
    os.write({told}, b"!")
    sys.stdin.read()
{code}
from exact import exact_loading
from contextlib import nullcontext
sys.argv = sys.argv[1:]
with exact_loading() if {float64} else nullcontext():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Holds the process when it is about to write a record and has written COUNT of them.
AFTER_RECORDS = """
from prm_search.commands.records import RecordFile
plain, left = RecordFile.write, [COUNT]
def write_and_hold(file, record):
    if not left[0]:
        hold()
    plain(file, record)
    left[0] -= 1
RecordFile.write = write_and_hold
"""


class Held(subprocess.Popen[str]):
    """A process that stands still until it is sent a signal, or `release` lets it go on."""

    log: Path

    def release(self) -> None:
        """Let it go on."""
        assert self.stdin is not None
        self.stdin.close()

    def said(self) -> str:
        """What it has written on standard error."""
        return self.log.read_text()


@contextmanager
def held(code: str, *args: object, float64: bool = True) -> Iterator[Held]:
    """The installed `prm-search` with these arguments, once it calls `hold()`; killed at the end.

    Args:
        code: Python that runs in its process beforehand, and has `hold()` called at some place.
        args: its arguments.
        float64: whether the models that it loads compute in float64.
    """
    reading, writing = os.pipe()
    source = _HELD.format(tests=str(Path(__file__).parent), told=writing, code=code, float64=float64)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w") as log:
        process = Held(
            [sys.executable, "-P", "-c", source, str(PROGRAM), *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, text=True, pass_fds=[writing],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        process.log = Path(log.name)
        os.close(writing)
        try:
            with os.fdopen(reading, "rb") as told:
                assert told.read(1) == b"!", process.said()  # nothing: it has ended
            yield process
        finally:
            process.kill()
            process.communicate()


def python(code: str, cwd: Path) -> str:
    """What code prints in a fresh interpreter that does not see the current folder."""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
