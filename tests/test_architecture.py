"""The house: which room may know which, no import circle, and what the package root holds.

Imports are read from the source by `ast`: lazy ones and those under TYPE_CHECKING count like any other. An import of a
package's name counts as an import of its `__init__`, and one of a submodule as an import of that submodule alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "prm_search": "prm_search",
    "prm_search.triton_kernels": "triton_kernels",
    "prm_search.integrations": "integrations",
}

# The plain records and rules: no torch, and no model.
PLAIN = (
    "answers", "calibration", "checks", "confidence", "drawing", "files", "next_token", "policy",
    "problems", "prompt", "protocols", "recording", "rng", "sampling", "steps", "stop_strings",
    "tokens", "tree", "usage", "values",
)  # fmt: skip
# The order of docs/development.md: a room, and the rooms that it may know beside itself. Each stands above those.
ORDER: dict[str, tuple[str, ...]] = {
    "triton_kernels": (),
    "plain": (),
    "viewer": ("plain",),
    "strategies": ("plain",),
    "driver": ("strategies", "viewer", "plain"),
    "search": ("driver", "strategies", "plain"),
    "guidance": ("driver", "strategies", "plain"),
    "engine": ("triton_kernels", "plain"),
    "models": ("engine", "plain"),
    "steering": ("engine", "triton_kernels", "plain"),
    "policies": ("steering", "models", "engine", "triton_kernels", "plain"),
    "scorers": ("policies", "models", "engine", "triton_kernels", "plain"),
}
_BELOW = tuple(ORDER)
ORDER |= {
    "training": _BELOW,
    "evaluation": _BELOW,
    "serving": _BELOW,
    "distributed": (*_BELOW, "training", "evaluation"),
    "integrations": (*_BELOW, "training", "evaluation", "serving", "distributed"),
    "prm_search": (*_BELOW, "integrations"),  # __init__, which holds the public names
    "demo": (*_BELOW, "training", "evaluation", "integrations", "prm_search"),
}
ORDER["commands"] = tuple(ORDER)
ORDER["cli"] = tuple(ORDER)

TORCH_FREE = ("plain", "viewer", "strategies", "driver", "search", "guidance")
ROOT_FILES = {"__init__", "cli", "guidance", "search", *PLAIN} - {"answers", "policy", "tokens", "tree"}


@dataclass(frozen=True)
class Import:
    """One import statement of `module`, in line `line`."""

    module: str
    target: str
    line: int


def modules() -> dict[str, Path]:
    """Every module of the installed package by its full name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[Import]:
    """What a module imports, wherever in it the statement stands."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(module, name if name in MODULES else base, node.lineno)


IMPORTS = [found for module in MODULES for found in imports(module)]
OURS = [found for found in IMPORTS if found.target in MODULES and found.target != found.module]


def short(module: str) -> str:
    """A module's name without the package's."""
    return module.removeprefix("prm_search.")


def room(module: str) -> str:
    """The name in ORDER under which a module stands."""
    first = "prm_search" if module == "prm_search" else module.split(".")[1]
    return "plain" if first in PLAIN else first


def written(found: Import) -> str:
    return f"{MODULES[found.module].relative_to(ROOT)}:{found.line} imports {short(found.target)}"


def circles(arrows: Mapping[str, Iterable[str]]) -> dict[frozenset[str], list[str]]:
    """Every strongly connected set of more than one name, and a shortest walk round it, back to where it began."""
    reach: dict[str, set[str]] = {}
    for start in arrows:
        reach[start], todo = set(), list(arrows[start])
        while todo:
            name = todo.pop()
            if name not in reach[start]:
                reach[start].add(name)
                todo += arrows[name]
    members = {frozenset(b for b in reach[a] if a in reach[b]) for a in arrows if a in reach[a]}
    return {names: round_trip(arrows, names) for names in sorted(members, key=sorted)}


def round_trip(arrows: Mapping[str, Iterable[str]], members: frozenset[str]) -> list[str]:
    """A shortest way from the first of a circle's members back to it."""
    start = min(members)
    ways = [[start]]
    for way in ways:  # grows while it is walked through: the shortest come first
        if len(way) > 1 and way[-1] == start:
            return way
        onward = [name for name in sorted(arrows[way[-1]]) if name in members and name not in way[1:]]
        ways += [[*way, name] for name in onward]
    raise AssertionError(f"{sorted(members)} are no circle")


def chain(way: list[str]) -> str:
    """A walk along imports, file by file."""
    steps = pairwise(way)
    return "\n    ".join(next(written(one) for one in OURS if (one.module, one.target) == step) for step in steps)


def table() -> str:
    """The order as docs/development.md writes it."""
    rows = ["| room | may know |", "|---|---|"]
    for place, (name, known) in enumerate(ORDER.items()):
        rest = [f"`{other}`" for other in known if other not in _BELOW or not set(known) >= set(_BELOW)]
        if set(known) == set(list(ORDER)[:place]):
            rest = ["all above" if known else "nothing"]
        elif set(known) >= set(_BELOW):
            rest = [f"all down to `{_BELOW[-1]}`", *rest]
        rows.append(f"| `{name}` | {', '.join(rest) or 'nothing'} |")
    return "\n".join(rows)


def test_modules_import_in_no_circle():
    arrows = {module: {one.target for one in OURS if one.module == module} for module in MODULES}
    ways = circles(arrows).values()
    assert not ways, "modules import one another in a circle:\n    " + "\n  and\n    ".join(map(chain, ways))


def test_no_arrow_between_rooms_runs_back_up():
    unknown = {room(module) for module in MODULES} - set(ORDER)
    assert not unknown, f"rooms without a place in the order (new files of the root stand in PLAIN): {sorted(unknown)}"
    up = [one for one in OURS if room(one.target) not in (room(one.module), *ORDER[room(one.module)])]
    told = [f"{written(one)}: {room(one.module)} may know {', '.join(ORDER[room(one.module)])}" for one in up]
    assert not told, "arrows that the order of DESIGN.md does not have:\n    " + "\n    ".join(told)


def test_the_order_is_one():
    """A room may know only rooms that stand before it in the table, so the table has no circle either."""
    names = list(ORDER)
    assert [(a, b) for i, a in enumerate(names) for b in ORDER[a] if b not in names[:i]] == []


def test_the_package_root_holds_what_users_call_and_the_plain_records():
    assert {path.stem for path in (ROOT / "prm_search").glob("*.py")} <= ROOT_FILES


def test_files_without_torch_import_neither_torch_nor_transformers():
    heavy = [one for one in IMPORTS if one.target.split(".")[0] in ("torch", "transformers")]
    assert [written(one) for one in heavy if room(one.module) in TORCH_FREE] == []


def test_the_kernels_know_nothing_of_the_library():
    ours = [one for one in IMPORTS if one.target.split(".")[0] == "prm_search" and room(one.module) == "triton_kernels"]
    assert [written(one) for one in ours if not one.target.startswith("prm_search.triton_kernels")] == []


def test_the_order_is_written_in_the_docs():
    assert table() in (ROOT / "docs/development.md").read_text(encoding="utf-8"), f"the order is now\n{table()}"


def test_the_picture_has_every_room():
    picture = (ROOT / "docs/images/architecture.svg").read_text(encoding="utf-8")
    rooms = {room(module) for module in MODULES} - {"plain"}
    missing = {name for name in rooms if f">{name}</text>" not in picture}
    assert not missing, f"python scripts/draw_architecture.py draws it anew, with {sorted(missing)}"


def test_a_circle_is_found_and_told():
    arrows = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"b"}, "e": {"a"}}
    assert circles(arrows) == {frozenset("abcd"): ["a", "b", "c", "a"]}
