"""Runs test_kernels_numerics.py in a process of its own where Triton's interpreter executes the kernels on the CPU.

A process of its own, because Triton decides at decoration whether a kernel is interpreted.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

NUMERICS = Path(__file__).with_name("test_kernels_numerics.py")


def refused_by_numpy() -> bool:
    """Triton 3.6's interpreter makes ints of one-element arrays (`__index__`), which NumPy 2.4 refuses."""
    versions = [tuple(int(n) for n in metadata.version(name).split(".")[:2]) for name in ("triton", "numpy")]
    return versions[0] < (3, 7) and versions[1] >= (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already inside the interpreter")
def test_the_numerics_hold_in_the_interpreter():
    if refused_by_numpy():
        pytest.skip("Triton 3.6's interpreter does not run with NumPy 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", str(NUMERICS)],
        env=environment, capture_output=True, text=True, cwd=NUMERICS.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed.group(1)) >= 150, "the interpreter run collected too little to mean anything"
