"""The kernels suite: every op of `prm_search.triton_kernels` alone. On a CPU it is a rehearsal of the torch backend.

Not named kernels.py: transformers takes any importable `kernels` for the Hub package of that name.
"""

from __future__ import annotations

import itertools
from typing import Any

import attending
import cases
import heads
import torch
from common import Machine


@torch.no_grad()
def lines(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """All lines of the suite."""
    work = itertools.chain(heads.cases(machine, quick), attending.cases(machine, quick))
    return cases.run(work, machine, repeats=20 if machine.device == "cuda" else 3 if quick else 7)
