"""The demo that ships: a task that can be checked exactly (`chains`), a policy and an implicit PRM for it.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["pair_dir"]


def pair_dir() -> Path:
    """The folder of the shipped pair: ``policy/`` (also the reference), ``prm/`` and the card ``pair.json``.

    Raises:
        FileNotFoundError: the package was installed without its data, or from a zip file that was never unpacked.
    """
    folder = Path(str(files(__name__) / "pair"))
    if not (folder / "pair.json").is_file():
        raise FileNotFoundError(f"the demo pair is not at {folder}: install prm-search from a wheel or a full checkout")
    return folder
