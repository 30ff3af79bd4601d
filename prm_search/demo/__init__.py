"""The demo that ships: a task that can be checked exactly (`chains`), a policy and an implicit PRM for it.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from ..models.placement import shipped

__all__ = ["pair_dir"]


def pair_dir() -> Path:
    """The folder of the shipped pair; see models.placement.shipped."""
    return shipped()
