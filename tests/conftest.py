"""What every test runs under: no network, few threads, GPU tests only where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny and the cores are shared
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

settings.register_profile("tests", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tests")

HERE = Path(__file__).parent


class _Helpers:
    """Makes the helper modules beside the tests (fakes.py ...) importable by name, with nothing put on sys.path."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        file = HERE / f"{name}.py"
        if "." in name or name.startswith(("test_", "conftest")) or not file.is_file():
            return None
        return importlib.util.spec_from_file_location(name, file)


sys.meta_path.append(_Helpers)  # type: ignore[arg-type]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
