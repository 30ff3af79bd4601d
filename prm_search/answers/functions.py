"""Functions by name: "module:function" or "file.py:function", as options and guidance files have them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def function_named(source: str) -> Callable[..., Any]:
    """Import the function that a name stands for. The module runs: name only what is trusted.

    Args:
        source: the module, which may lie in the current folder, or the path of a file that ends with .py; a colon; and
            the function's name.

    Raises:
        ValueError: there is none; the message begins with the name.
    """
    module, _, name = source.rpartition(":")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None:
                raise ValueError("it is no Python file")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            sys.path.insert(0, os.getcwd())  # for this import alone: what lies beside a user is not to shadow packages
            try:
                loaded = importlib.import_module(module)
            finally:
                sys.path.remove(os.getcwd())
    except (ImportError, OSError, ValueError) as error:
        said = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise ValueError(f"{source}: {module or 'a module'} cannot be imported: {said}") from error
    function = getattr(loaded, name, None)
    if not callable(function):
        raise ValueError(f"{source}: {module} has no function {name}")
    named: Callable[..., Any] = function
    return named


def whole_name(source: str) -> str:
    """The name of the same function for a process that runs elsewhere: of a file, its whole path."""
    module, _, name = source.rpartition(":")
    return f"{os.path.abspath(module)}:{name}" if module.endswith(".py") else source
