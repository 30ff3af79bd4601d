"""The suites import their siblings as `python benchmarks/report.py` does: by this folder alone on the path."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:  # whose option pyproject.toml sets
        parser.addini("timeout", "seconds a test may take; without pytest-timeout: as many as it likes")
