"""A report as Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    machine, ceilings = report["machine"], report.get("ceilings")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"# Benchmarks: {machine['name']}",
        f"{report['date']}, {machine['threads']} threads, {versions}. `python benchmarks/report.py`; random weights, "
        "medians of several rounds in which every method took its turn. Absolute times drift with the machine; the "
        "ratios are pairwise.",
    ]
    if report["quick"]:
        parts.append("**A rehearsal (`--quick`): tiny sizes, few rounds. No figure here says anything about speed.**")
    if ceilings:
        parts.append(
            f"Ceilings measured in this run: {ceilings['flops'] / 1e12:.3g} TFLOP/s (matmul), "
            f"{ceilings['bandwidth'] / 1e9:.3g} GB/s (copy, read and written). Floors divide by these."
        )
    if machine["device"] == "cpu":
        parts.append("No GPU: the ops ran their torch backend, and nothing here speaks of the Triton kernels.")
    for suite, tables in report["suites"].items():
        parts.append(f"## {suite}")
        for name, rows in tables.items():
            parts += [f"### {name}", NOTES[name], TABLES[name](rows)]
    return "\n\n".join(parts) + "\n"


def _size(count: float) -> str:
    for unit, bound in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= bound:
            return f"{count / bound:.3g} {unit}"
    return f"{count:.0f} B"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ops(rows: list[dict[str, Any]]) -> str:
    head = ["op", "shape", "way", "ms", "over ours", "share of floor", "memory", "largest error", "rms error"]
    body = []
    for row in rows:
        shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
        for name, way in row["ways"].items():
            if "absent" in way:
                body.append([row["op"], shape, name, "-", "-", "-", "-", "-", f"absent: {way['absent']}"])
                continue
            memory = way.get("peak_bytes", way.get("largest_tensor_bytes"))
            body.append(
                [
                    row["op"],
                    shape,
                    f"**{name}** ({row['backend']})" if name == "ours" else name,
                    f"{way['ms']:.4g}",
                    f"{way['over_ours']:.2f}x",
                    f"{way['share_of_floor']:.0%} ({row['bound']})",
                    "-" if memory is None else _size(memory),
                    f"{way['error_max']:.1e}" if "error_max" in way else "-",
                    f"{way['error_rms']:.1e}" if "error_rms" in way else "-",
                ]
            )
    return _table(head, body)


def _memory(rows: list[dict[str, Any]]) -> str:
    head = ["shape", "prompt", "beams", "own tokens", "a copy a beam", "prompt shared", "tree shared"]
    body = [
        [
            row["shape"],
            str(row["prompt"]),
            str(row["beams"]),
            str(row["length"] * row["steps"]),
            *(_size(row["kv_bytes"][way]) for way in ("copies", "prompt_shared", "tree_shared")),
        ]
        for row in rows
    ]
    return _table(head, body)


def _scoring(rows: list[dict[str, Any]]) -> str:
    names = {name for row in rows for name in row["over_ours"]}
    rivals = [name for name in ("naive", "prompt_cached", "dynamic_cache", "ours_streams") if name in names]
    head = [
        "shape",
        "N x L",
        "S",
        "ours (s)",
        "share of floor",
        *[f"{name} / ours" for name in rivals],
        "tokens a model: ours / naive",
        "KV a model: live / copies",
        "peak beyond weights: " + " / ".join(("ours", *rivals)),
        "max diff",
    ]
    body = [
        [
            row["shape"],
            f"{row['beams']} x {row['length']}",
            str(row["steps"]),
            f"{row['seconds']['ours']:.2f}",
            f"{row['share_of_floor']:.0%}",
            *[f"{row['over_ours'][name]:.1f}x" if name in row["over_ours"] else "-" for name in rivals],
            f"{row['encoded_tokens']['ours']} / {row['encoded_tokens'].get('naive', '-')}",
            " / ".join(_size(row["kv_tokens"][way] * row["kv_token_bytes"]) for way in ("live", "copies")),
            " / ".join(_size(row["peak_bytes"][way]) if way in row["peak_bytes"] else "-" for way in ("ours", *rivals)),
            f"{max(row['largest_difference'].values()):.1e}" if row["largest_difference"] else "-",
        ]
        for row in rows
    ]
    return _table(head, body)


def _decoding(rows: list[dict[str, Any]]) -> str:
    head = [
        "shape",
        "context",
        "rows",
        "parents",
        "ours (ms)",
        "DynamicCache (ms)",
        "ours / DynamicCache",
        "ours / weight floor",
        "no graph / ours",
        "a step is",
    ]
    body = [
        [
            row["shape"],
            str(row["context"]),
            str(row["rows"]),
            str(row["families"]),
            f"{row['ms']['ours']:.1f}",
            f"{row['ms']['dynamic_cache']:.1f}",
            f"{row['ours_over_dynamic_cache']:.2f}",
            f"{row['over_weight_floor']:.2f}",
            "-" if row["no_graph_over_ours"] is None else f"{row['no_graph_over_ours']:.2f}",
            row["step"],
        ]
        for row in rows
    ]
    return _table(head, body)


def _steering(rows: list[dict[str, Any]]) -> str:
    head = ["shape", "prompt", "rows", "way", "ms", "ms / weight floor", "steered / plain"]
    body = [
        [
            row["shape"],
            str(row["prompt"]),
            str(row["rows"]),
            way,
            f"{ms:.1f}",
            f"{row['over_weight_floor'][way]:.2f}",
            f"{row['steered_over_plain']:.2f}" if way == "steered" else "-",
        ]
        for row in rows
        for way, ms in row["ms"].items()
    ]
    return _table(head, body)


def _searching(rows: list[dict[str, Any]]) -> str:
    head = [
        "shape",
        "way",
        "seconds",
        "scorer / policy seconds",
        "first step (s)",
        "sampled",
        "encoded: policy / prm / reference",
        "peak beyond weights and pools",
    ]
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
                f"{row['first_step_seconds']:.3f}" if "first_step_seconds" in row else "-",
                str(row.get("sampled_tokens", {}).get("policy", "-")),
                " / ".join(str(encoded.get(role, 0)) for role in ("policy", "prm", "reference")) if encoded else "-",
                _size(row["peak_bytes"]) if "peak_bytes" in row else "-",
            ]
        )
    return _table(head, body)


def _vllm_searching(rows: list[dict[str, Any]]) -> str:
    head = [
        "shape",
        "prompt",
        "beams x step",
        "steps",
        "scorer",
        "seconds",
        "scorer's",
        "policy's",
        "tokens of the PRM",
    ]
    body = []
    for row in rows:
        tokens = ", ".join(f"{count} {kind}" for kind, count in row["tokens"].items() if count)
        body.append(
            [
                row["shape"],
                str(row["prompt"]),
                f"{row['beams']} x {row['step']}",
                str(row["steps"]),
                row["way"],
                f"{row['seconds']:.2f}",
                f"{row['scorer_seconds']:.2f}",
                f"{row['policy_seconds']:.2f}",
                tokens,
            ]
        )
    return _table(head, body)


def _vllm_steering(rows: list[dict[str, Any]]) -> str:
    ways = list(rows[0]["ms"])
    head = ["shape", "prompt", "rows", *(f"{way} (ms)" for way in ways), *(f"{way} / unguided" for way in ways[1:]),
            "un-batched / ours"]  # fmt: skip
    body = [
        [
            row["shape"],
            str(row["prompt"]),
            str(row["rows"]),
            *(f"{row['ms'][way]:.4g}" for way in ways),
            *(f"{row['over_unguided'][way]:.2f}x" for way in ways[1:]),
            f"{row['unbatched_over_ours']:.2f}x",
        ]
        for row in rows
    ]
    return _table(head, body)


def _host(rows: list[dict[str, Any]]) -> str:
    head = ["rows", "vocabulary", "tokens", "ours (us a row and token)", "generate", "ours / generate"]
    body = [
        [
            str(row["rows"]),
            f"{row['vocabulary']:,}",
            str(row["tokens"]),
            *(f"{row['us_a_row_and_token'][way]:.1f}" for way in ("ours", "generate")),
            f"{row['ours_over_generate']:.2f}x",
        ]
        for row in rows
    ]
    return _table(head, body)


def _step_prms(rows: list[dict[str, Any]]) -> str:
    head = ["shape", "prompt", "words a step", "S", "PRM tokens", "whole texts", "ratio"]
    head += ["seconds", "whole texts", "ratio"]
    body = [
        [
            row["shape"],
            str(row["prompt"]),
            str(row["length"]),
            str(row["steps"]),
            f"{row['tokens']['ours']:,}",
            f"{row['tokens']['whole_texts']:,}",
            f"{row['tokens_over_ours']:.1f}x",
            f"{row['seconds']['ours']:.3g}",
            f"{row['seconds']['whole_texts']:.3g}",
            f"**{row['seconds_over_ours']:.1f}x**",
        ]
        for row in rows
    ]
    return _table(head, body)


def _best_of(rows: list[dict[str, Any]]) -> str:
    head = ["shape", "prompt", "tokens", "sequences", "ours (s)", "generate (s)", "generate / ours"]
    body = [
        [
            row["shape"],
            *(str(row[name]) for name in ("prompt", "tokens", "rows")),
            *(f"{row['seconds'][way]:.3g}" for way in ("ours", "generate")),
            f"**{row['generate_over_ours']:.2f}x**",
        ]
        for row in rows
    ]
    return _table(head, body)


TABLES = {
    "ops": _ops,
    "host": _host,
    "scoring": _scoring,
    "decoding": _decoding,
    "steering": _steering,
    "memory": _memory,
    "searching": _searching,
    "best_of": _best_of,
    "step_prms": _step_prms,
    "vllm_searching": _vllm_searching,
    "vllm_steering": _vllm_steering,
}
NOTES = {
    "ops": "Each op alone, operands random with logits of a standard deviation of 4. Errors are against float64 from "
    "the same operands (nats; guide_logits: logits; attention: outputs of standard normal values). `matmul` is the "
    "product without a log-probability, `multinomial` generate's way to draw, which tells none; `compiled_eager` is "
    "torch.compile of the eager formula. Memory: the "
    "allocator's peak beyond the operands on a GPU, the largest tensor that any operation returns on a CPU. A GPU's "
    "times are CUDA events with a cold L2.",
    "host": "Process time of one thread for a token step of a model of one layer, nearly all of which is the host's: "
    "the decode loop of HFPolicy against transformers' own `generate` with as many return sequences.",
    "scoring": "Token rewards of every beam at every step, both models: seconds of ours and what the rivals take over "
    "it. `naive` re-encodes every prefix, `prompt_cached` a beam's own tokens, `dynamic_cache` nothing, but copies KV. "
    "`ours_streams`: both models on streams of their own. "
    "The floor is every new token once through both models at the measured ceilings. Peaks: a GPU's, with pools.",
    "decoding": "One token for each row. Four rows a parent is what a beam of four expansions decodes; as many parents "
    "as rows is the worst case, where only the first quarter of the path is shared. The weight floor is one reading of "
    "the weights at the measured bandwidth. `no graph`: the same steps, planned and launched like any other forward.",
    "steering": "A token of all rows, drawn from the policy alone and from logits steered by a pair whose reference is "
    "the policy. The weight floor is one reading of one model's weights, or of two models'. On a GPU also without CUDA "
    "graphs, and with each model on a stream of its own.",
    "memory": "bf16 KV of one model at the end of a beam search (a quarter survives, four children each), by counting "
    "tokens: arithmetic, nothing was run.",
    "searching": "`model.generate` plain, and with `prm_guidance`; the reference is the policy itself (`shared`: its "
    "half of the reward is free) or a third model (`separate`). `full_text` is search-and-learn's scheme in the same "
    "search: every active beam's whole text at every step, through PRM and third model anew. The first step is from "
    "the call until it is drawn and scored.",
    "best_of": "`search` with BestOfN over HFPolicy, without a scorer, against `generate` with as many sequences. On a "
    "CPU: process time of one thread, pairs in turn.",
    "step_prms": "The scores of a 4 x 4 beam's steps under a step PRM (Qwen2.5-Math-PRM's layout). `whole texts`: "
    "every active beam's text tokenised and encoded from the beginning at each step, as search-and-learn, its_hub and "
    "vLLM's step pooling do, all beams of a level in one batch. Both tokenise texts and give the same scores.",
    "vllm_searching": "One beam search, policy and PRM in vLLM engines of one process, the reference's half free. "
    "`cached`: VLLMImplicitPRM. `re-encoding`: the same rows by vLLM's `prompt_logprobs` as it is, which does not read "
    "the prefix cache. Both caches are emptied before each search. Tokens: of the PRM, encoded for the first time, "
    "again, or found in the cache.",
    "vllm_steering": "A step of a vLLM engine that samples a token for every row, every way in turn in one engine. "
    "`ours`: the logits processor, both models of the pair; the same with the policy's logits for the reference; "
    "`un-batched`: a processor over vLLM's adapter for single requests, two transformers forwards with a DynamicCache "
    "each for every row.",
}


def plot(report: dict[str, Any], path: Path) -> bool:
    """Rivals' time over ours against the number of steps. Returns False without scoring lines or matplotlib."""
    rows = report["suites"].get("engine", {}).get("scoring", [])
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
