"""Exit status 0 when this interpreter has a torch that pyproject.toml accepts, so that `make` leaves it alone."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"2.13.0+cpu"`` and ``"2.13.0a0"`` give ``(2, 13, 0)``."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    if match is None:
        raise ValueError(f"not a version: {text!r}")
    return tuple(int(part) for part in match[0].split("."))


def main() -> int:
    dependencies = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    (floor,) = (d.removeprefix("torch>=") for d in dependencies if d.startswith("torch>="))
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return 1
    if release(installed) < release(floor):
        print(f"torch {installed} is older than {floor}", file=sys.stderr)
        return 1
    print(f"torch {installed} is there and stays")
    return 0


if __name__ == "__main__":
    sys.exit(main())
