"""`make fuzz`, short: in requests, configurations and files nothing wrong is accepted, and each refusal is clear."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "fuzz"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, Any]]:
    """The fuzzer's modules, which import each other by bare name, and go again."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(FOLDER))
    names = ("fuzz_cases", "fuzz_api", "fuzz_http", "fuzz_files")
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("fuzz"):
            del sys.modules[name]


def test_an_outcome_is_what_a_call_came_to(modules: dict[str, Any]) -> None:
    def case(error: Exception | None) -> Any:
        def call() -> None:
            if error is not None:
                raise error

        return modules["fuzz_cases"].Case("api", "f", "width", "0", call)

    finding = modules["fuzz_cases"].Finding("silent", "status 0")
    tally = modules["fuzz_cases"].Tally()
    for error, outcome in (
        (ValueError("width=0: at least 1"), "clear"), (TypeError("not an int"), "unclear"),
        (KeyError("width"), "traceback"), (AssertionError("width"), "traceback"), (None, "silent"), (finding, "silent"),
    ):  # fmt: skip
        assert tally.add(case(error)) == outcome
    assert "| all |  | 6 | 1 | 1 | 2 | 2 |" in tally.table()


def test_the_same_seed_tries_the_same(modules: dict[str, Any]) -> None:
    def tried(seed: int) -> list[str]:
        return [modules["fuzz_cases"].short(given) for given in modules["fuzz_cases"].pool(random.Random(seed), 40)]

    assert tried(0) == tried(0) != tried(1)


def test_requests_are_refused_by_their_field(modules: dict[str, Any]) -> None:
    tally = modules["fuzz_cases"].Tally()
    with closing(modules["fuzz_http"].Server()) as server:
        for number, case in enumerate(modules["fuzz_http"].cases(server, random.Random(0), 1)):
            if number % 6 == 0:
                tally.add(case)
    assert tally.total()["clear"] == tally.total().total() > 200, tally.faults


def test_configurations_are_refused_by_their_argument(modules: dict[str, Any]) -> None:
    tally = modules["fuzz_cases"].Tally()
    for target in modules["fuzz_api"]._configs():
        if target.name != "confidence_quantile":
            for case in target.cases(random.Random(0), 1):
                tally.add(case)
    assert tally.total()["clear"] == tally.total().total() > 1000, [
        (case.target, case.argument, case.given, outcome, said) for case, outcome, said in tally.faults
    ]


def test_files_are_refused_by_their_line(modules: dict[str, Any], tmp_path: Path) -> None:
    folder = modules["fuzz_files"].Folder(tmp_path)
    tally = modules["fuzz_cases"].Tally()
    for case in modules["fuzz_files"].cases(folder, random.Random(0), 1):
        if case.target in ("serve", "export-tree (file)", "ServeConfig.of", "SearchTree.from_json", "read_rollouts"):
            tally.add(case)
    assert tally.total()["clear"] == tally.total().total() > 60, [
        (case.target, case.argument, case.given, outcome, said) for case, outcome, said in tally.faults
    ]
