"""The rule of docs/development.md on how a docstring begins."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("prm_search", "triton_kernels", "integrations", "benchmarks", "scripts")
CLAUSE = re.compile(r"(What|Whether|Those|Who|Where|How|Which|When|That)\b")


def test_docstrings_begin_with_a_noun_or_an_imperative_verb() -> None:
    clauses = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node) or ""
                    if CLAUSE.match(text):
                        name = getattr(node, "name", "the module")
                        clauses.append(f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}")
    assert clauses == []
