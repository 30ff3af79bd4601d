"""Draw docs/images/architecture.svg: the rooms of the package, and which knows which, from the imports themselves.

    python scripts/draw_architecture.py

An arrow that follows from others (a room known by way of another) is left out, and so are those to the plain records.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_architecture import MODULES, ORDER, OURS, room  # noqa: E402 - the order stands there, and is tested

OUT = ROOT / "docs" / "images" / "architecture.svg"
SAYS = {
    "cli": "prm-search",
    "commands": "the command line",
    "demo": "the shipped task and pair",
    "prm_search": "import prm_search as ps",
    "integrations": "transformers, vLLM",
    "distributed": "many machines",
    "serving": "OpenAI's routes",
    "evaluation": "plans, records, statistics",
    "training": "pairs from outcome labels",
    "scorers": "what rewards a node",
    "policies": "what samples steps",
    "steering": "log-ratios on logits",
    "models": "loading checkpoints",
    "engine": "KV tree, packed forwards",
    "triton_kernels": "fused ops, torch oracles",
    "guidance": "generate's config",
    "search": "search, asearch",
    "driver": "ask/tell, loops, budgets",
    "viewer": "pages of trees",
    "strategies": "Beam, MCTS, particles ...",
    "plain": "trees, steps, values, answers",
}
WIDTH, BOX, HIGH, GAP, ROW = 1180, 200, 50, 26, 104
PLAIN = "plain"


def arrows() -> dict[str, set[str]]:
    """Rooms that each room imports from, itself and the plain records left out."""
    known: dict[str, set[str]] = defaultdict(set)
    for one in OURS:
        here, there = room(one.module), room(one.target)
        if here != there and there != PLAIN:
            known[here].add(there)
    return known


def reduced(known: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others."""

    def reach(start: str) -> set[str]:
        reached: set[str] = set()
        todo = list(known.get(start, ()))
        while todo:
            name = todo.pop()
            if name not in reached:
                reached.add(name)
                todo += known.get(name, ())
        return reached

    return {
        name: {there for there in direct if not any(there in reach(other) for other in direct - {there})}
        for name, direct in known.items()
    }


def levels(known: dict[str, set[str]], rooms: list[str]) -> dict[str, int]:
    """Return how high a room stands: one above the highest that it knows."""
    level: dict[str, int] = {}
    for name in rooms:  # in the order, so what a room knows has its level
        level[name] = 1 + max((level[other] for other in known.get(name, ()) if other in level), default=-1)
    return level


def draw() -> str:
    """The picture as SVG."""
    known = arrows()
    rooms = [name for name in ORDER if name != PLAIN and any(room(module) == name for module in MODULES)]
    level = levels(known, rooms)
    rows: dict[int, list[str]] = defaultdict(list)
    for name in rooms:
        rows[level[name]].append(name)
    top = max(rows)
    place: dict[str, tuple[float, float]] = {}
    for height, names in rows.items():
        left = (WIDTH - len(names) * BOX - (len(names) - 1) * GAP) / 2
        for i, name in enumerate(names):
            place[name] = (left + i * (BOX + GAP), 20 + (top - height) * ROW)
    place[PLAIN] = (20, 20 + (top + 1) * ROW)
    height = place[PLAIN][1] + HIGH + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        'font-family="sans-serif" font-size="13">',
        "<title>The rooms of prm_search: an arrow goes from a room to one that it imports</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#667"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>',
    ]
    for name, direct in reduced(known).items():
        for other in sorted(direct):
            (x, y), (u, v) = place[name], place[other]
            a, b, c, d = x + BOX / 2, y + HIGH, u + BOX / 2, v - 2
            bend = (d - b) / 2
            parts.append(
                f'<path d="M{a:.0f},{b:.0f} C{a:.0f},{b + bend:.0f} {c:.0f},{d - bend:.0f} {c:.0f},{d:.0f}" '
                'fill="none" stroke="#99a" stroke-width="1.2" marker-end="url(#tip)"/>'
            )
    for name, (x, y) in place.items():
        wide = WIDTH - 40 if name == PLAIN else BOX
        fill = "#eef6ee" if name in (PLAIN, "viewer", "strategies", "driver", "search", "guidance") else "#eef1fa"
        title = "plain records, known to all" if name == PLAIN else name
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide}" height="{HIGH}" rx="6" fill="{fill}" stroke="#556"/>'
            f'<g text-anchor="middle" transform="translate({x + wide / 2:.0f},{y:.0f})">'
            f'<text y="21" font-weight="bold">{escape(title)}</text>'
            f'<text y="39" fill="#445">{escape(SAYS[name])}</text></g>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(f"{OUT.relative_to(ROOT)}: {len(arrows())} rooms")
