"""A report as Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"# Benchmarks: {machine['name']}",
        f"{report['date']}, {machine['threads']} threads, {versions}. `python benchmarks/report.py`; random weights, "
        "medians of several rounds in which every method took its turn. Absolute times drift with the machine; the "
        "ratios are pairwise.",
    ]
    for name, rows in report["suites"].items():
        parts += [f"## {name}", NOTES[name], TABLES[name](rows)]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _scoring(rows: list[dict[str, Any]]) -> str:
    names = {name for row in rows for name in row["over_ours"]}
    rivals = [name for name in ("naive", "prompt_cached", "dynamic_cache") if name in names]
    head = [
        "shape",
        "S",
        "ours (s)",
        *[f"{name} / ours" for name in rivals],
        "tokens a model: ours / naive",
        "max diff",
    ]
    body = [
        [
            row["shape"],
            str(row["steps"]),
            f"{row['seconds']['ours']:.2f}",
            *[f"{row['over_ours'][name]:.1f}x" if name in row["over_ours"] else "-" for name in rivals],
            f"{row['encoded_tokens']['ours']} / {row['encoded_tokens'].get('naive', '-')}",
            f"{max(row['largest_difference'].values(), default=0):.1e}",
        ]
        for row in rows
    ]
    return _table(head, body)


def _decoding(rows: list[dict[str, Any]]) -> str:
    head = ["shape", "context", "rows", "parents", "ours (ms)", "DynamicCache (ms)", "ours / DynamicCache"]
    body = [
        [
            row["shape"],
            str(row["context"]),
            str(row["rows"]),
            str(row["families"]),
            f"{row['ms']['ours']:.1f}",
            f"{row['ms']['dynamic_cache']:.1f}",
            f"{row['ours_over_dynamic_cache']:.2f}",
        ]
        for row in rows
    ]
    return _table(head, body)


def _searching(rows: list[dict[str, Any]]) -> str:
    head = ["shape", "way", "seconds", "scorer / policy seconds", "sampled", "encoded: policy / prm / reference"]
    body = []
    for row in rows:
        share = row.get("scorer_over_policy_seconds")
        encoded = row.get("encoded_tokens", {})
        body.append(
            [
                row["shape"],
                row["way"],
                f"{row['seconds']:.2f}",
                "-" if share is None else f"{share:.1%}",
                str(row.get("sampled_tokens", {}).get("policy", "-")),
                " / ".join(str(encoded.get(role, 0)) for role in ("policy", "prm", "reference")) if encoded else "-",
            ]
        )
    return _table(head, body)


TABLES = {"scoring": _scoring, "decoding": _decoding, "searching": _searching}
NOTES = {
    "scoring": "Token rewards of every beam at every step, both models: seconds of ours and what the rivals take over "
    "it. `naive` re-encodes every prefix, `prompt_cached` a beam's own tokens, `dynamic_cache` nothing, but copies KV.",
    "decoding": "One token for each row. Four rows a parent is what a beam of four expansions decodes; as many parents "
    "as rows is the worst case, where only the first quarter of the path is shared.",
    "searching": "`model.generate` plain, and with `prm_guidance`; the reference is the policy itself (`shared`: its "
    "half of the reward is free) or a third model (`separate`).",
}


def plot(report: dict[str, Any], path: Path) -> bool:
    """Rivals' time over ours against the number of steps. Returns False without scoring lines or matplotlib."""
    rows = report["suites"].get("scoring", [])
    if not rows:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row["over_ours"].items():
            lines.setdefault((row["shape"], name), []).append((row["steps"], value))
    for (shape, name), points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {shape}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="steps of the search", ylabel="time over ours", xscale="log", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True
