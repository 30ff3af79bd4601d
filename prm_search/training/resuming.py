"""Checkpoints of a run that was ended: which one the next goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..models.checkpoint import Checkpoint
from .load_data import Data
from .recipe import Recipe

CHECKPOINTS = "checkpoints"


def settings_of(source: Checkpoint, recipe: Recipe, data: Data, arguments: Mapping[str, Any] | None) -> str:
    """A digest of all that a checkpoint must agree in with the run that goes on from it."""
    parts = [source.name, source.revision, asdict(recipe), dict(arguments or {})]
    digest = blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16)
    for item in data.items:
        for row in item.rows:
            digest.update(json.dumps([row.prompt_ids, item.label, item.weight]).encode())
            digest.update(row.response_ids.tobytes())
    return digest.hexdigest()


def begin(folder: Path, settings: str, resume: bool) -> str | None:
    """Make the folder of a run. Returns the checkpoint to go on from, None for none.

    Args:
        folder: its checkpoints are in `CHECKPOINTS` below it.
        settings: a digest of all that a checkpoint must agree in with the run that goes on from it.
        resume: whether it may.

    Raises:
        ValueError: it holds a checkpoint that must not be gone on from, or not by this run.
    """
    checkpoints = folder / CHECKPOINTS
    note = checkpoints / "settings"
    whole = [state.parent for state in checkpoints.glob("checkpoint-*/trainer_state.json")]  # it is written last
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if last is not None and not resume:
        raise ValueError(f"{folder} has a checkpoint: resume goes on with it, otherwise name another folder")
    if last is not None and (not note.is_file() or note.read_text() != settings):
        raise ValueError(f"{folder} has a checkpoint of other data or settings; resume needs the same ones")
    checkpoints.mkdir(parents=True, exist_ok=True)
    note.write_text(settings)
    return None if last is None else str(last)
