"""A sweep of transformers' causal-LM families, served or not and how exactly: writes docs/compatibility.md.

Every type of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, and some settings that its defaults do not show, is built tiny with
random weights and offered to LanguageModel. What is admitted is grown into a random forest, with evictions, past all of
its length limits, and compared with plain forwards. A type runs in a worker process with a time limit, so that one
that crashes is a row of the table.

    python scripts/compatibility.py [--out docs/compatibility.md] [--limit SECONDS] [TYPE ...]

Exit status 1: some admitted family was off by more than 1e-4 nat and more than rounding explains.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prm_search.engine.admission import check as admission, miniature
from prm_search.engine.kv_tree import Branch
from prm_search.engine.language_model import LanguageModel

LIMITS = 20  # windows and the like of the models here, tokens; admission looks at shorter ones
LONGEST = 120  # tokens of a path
CAPACITY = 140  # tokens of KV, about a third of a forest

# What the default config of a type leaves out although every checkpoint says it.
COMPLETED: dict[str, dict[str, Any]] = {
    "codegen": {"n_embd": 64, "n_head": 4, "rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **more}}


# Settings of real checkpoints that a default config does not show: (type, what, fields).
SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "RoPE linear", _rope("linear")),
    ("llama", "RoPE yarn", _rope("yarn", original_max_position_embeddings=2048)),
    (
        "llama",
        "RoPE llama3",
        _rope("llama3", original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    ("llama", "RoPE dynamic (within its context)", _rope("dynamic")),
    (
        "phi3",
        "longrope (within its original context)",
        {
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 131072,
            **_rope("longrope", original_max_position_embeddings=4096, short_factor=[1.0] * 48, long_factor=[2.0] * 48),
        },
    ),
    ("phi3", "window", {"sliding_window": 2047}),
    (
        "qwen2",
        "window in the upper layers",
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 8},
    ),
    ("lfm2", "convolutions", {"layer_types": (["conv", "conv", "full_attention"] * 11)[:32]}),
    ("llama4_text", "no temperature tuning", {"attn_temperature_tuning": False}),
    ("falcon", "ALiBi", {"alibi": True}),
    (
        "falcon",
        "new decoder",
        {"new_decoder_architecture": True, "num_kv_heads": 8, "hidden_size": 4096, "num_attention_heads": 64},
    ),
    ("gpt_bigcode", "multi-head", {"multi_query": False}),
    ("gpt2", "scaled by layer", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    ("gpt_neox", "sequential residual", {"use_parallel_residual": False}),
    ("opt", "norm after, projected embeddings", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("stablelm", "parallel residual, q and k normed", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("cohere", "q and k normed", {"use_qk_norm": True}),
]


@dataclass(frozen=True)
class Row:
    """One line of the page. verdict: "exact", "refused", "not built", "WRONG"."""

    kind: str
    verdict: str
    said: str
    seconds: float = 0.0


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(type, setting, fields), the bare types first."""
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        yield kind, "", COMPLETED.get(kind, {})
    for kind, what, fields in SETTINGS:
        yield kind, what, {**COMPLETED.get(kind, {}), **fields}


def examine(kind: str, what: str, fields: dict[str, Any]) -> Row:
    """Build it, offer it, and measure it if it is admitted."""
    name = f"{kind}: {what}" if what else kind
    try:
        config = CONFIG_MAPPING[kind](**fields)
        made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if not isinstance(config, made.config_class):
            config = config.get_text_config()  # a text model registered under its composite config, too
        model = miniature.build(made, miniature.shrink(config, LIMITS), seed=1)
    except Exception as problem:
        return Row(name, "not built", f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}")
    start = time.perf_counter()
    try:
        LanguageModel.of(model)
    except ValueError as refusal:
        return Row(name, "refused", str(refusal).partition(" is not supported: ")[2], time.perf_counter() - start)
    seconds = time.perf_counter() - start
    worst = max(error(model, seed) for seed in range(3))
    if worst > admission.TOLERANCE and worst > admission.tolerance(LanguageModel(model, None, capacity=1), LONGEST):
        return Row(name, "WRONG", f"{worst:.0e}", seconds)
    return Row(name, "exact", f"{worst:.0e}", seconds)


def error(model: Any, seed: int) -> float:
    """Largest difference, nats, between a random forest's log-probs and plain forwards over its paths."""
    draw = random.Random(seed)
    lm = LanguageModel(model, None, capacity=CAPACITY)
    longest = min(LONGEST, lm.context or LONGEST)
    log_probs: dict[Branch, list[float]] = {}

    def append(branches: list[Branch], counts: list[int]) -> None:
        ids = [[draw.randrange(miniature.FIRST_WORD, lm.head.vocab) for _ in range(count)] for count in counts]
        for branch, values in zip(branches, lm.extend(branches, ids) or (), strict=True):
            log_probs.setdefault(branch, []).extend(values.tolist())

    roots = [lm.tree.root() for _ in range(2)]
    append(roots, [draw.randint(20, 50), draw.randint(1, 9)])
    for _ in range(14):
        above = draw.sample(list(log_probs), min(4, len(log_probs)))
        forks = [lm.tree.fork(b, at=draw.randint(1, b.length) if draw.random() < 0.3 else None) for b in above]
        counts = [min(draw.randint(1, 30), longest - fork.length) for fork in forks]
        kept = [(fork, count) for fork, count in zip(forks, counts, strict=True) if count > 0]
        append([fork for fork, _ in kept], [count for _, count in kept])
    worst = 0.0
    for branch, values in log_probs.items():
        ids = branch.path_ids()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        rows = torch.log_softmax(logits.double(), dim=-1).numpy()
        expected = rows[np.arange(len(ids) - 1), ids[1:]]
        new = np.array(values)[max(0, len(values) - len(expected)) :]
        apart = np.abs(new - expected[len(expected) - len(new) :])
        worst = max(worst, float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0)))
    return worst


# --- processes -----------------------------------------------------------------------------------------------------


def work(pipe: Any) -> None:
    """A worker: takes cases, gives rows."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    while (case := pipe.recv()) is not None:
        pipe.send(examine(*case))


def sweep(todo: list[tuple[str, str, dict[str, Any]]], limit: float) -> Iterator[Row]:
    """Rows in the order of the cases; a worker that dies or takes too long is replaced."""
    context = multiprocessing.get_context("spawn")
    worker, pipe = None, None
    for case in todo:
        if worker is None:
            pipe, theirs = context.Pipe()
            worker = context.Process(target=work, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()
        name = f"{case[0]}: {case[1]}" if case[1] else case[0]
        try:
            pipe.send(case)  # type: ignore[union-attr]
            if pipe.poll(limit):  # type: ignore[union-attr]
                yield pipe.recv()  # type: ignore[union-attr]
                continue
            yield Row(name, "not built", f"took more than {limit:.0f} s")
        except (EOFError, OSError):
            worker.join()
            yield Row(name, "not built", f"the process ended with status {worker.exitcode}")
        worker.kill()
        worker.join()
        worker = None
    if worker is not None:
        pipe.send(None)  # type: ignore[union-attr]
        worker.join()


# --- the page ------------------------------------------------------------------------------------------------------


PROSE = """\
Every causal-LM type that transformers registers, and some settings that the default config of a type does not show, was
built tiny, with random weights, and offered to the engine. What the engine admits was then grown into random forests
(paths of up to {longest} tokens, forks at and inside branches, {capacity} tokens of KV so that branches are evicted and
encoded again) past every window and other limit of its config, here {limits} tokens or a little more, and each
log-probability compared with a plain forward of the same model, in fp32. The error is the largest difference in nats
over three forests; it may exceed 1e-4 only where rounding the embeddings differently, by one unit in the last place,
already changes a plain forward by a tenth of it.

The engine asks the same kind of question whenever a model is handed to it (`prm_search/engine/admission/check.py`),
so a type or a setting that is not listed, remote code too, is either served exactly or refused with a ValueError that
says why. Lengths are told by the names of config fields (`*window*`, `*chunk_size`,
`original_max_position_embeddings` ...): what it cannot see is a limit under a name of its own that no short text
crosses.
Asking took {slowest:.1f} s at most here and {median:.2f} s in the median, once for each family and process.

Dynamic RoPE and longrope make a token's probability depend on the length of the text after it once that exceeds the
original context: such models are served up to that length, and longer paths are refused.
"""


def page(rows: list[Row]) -> str:
    """The Markdown page."""
    rows = sorted(rows, key=lambda row: row.kind)
    groups = {verdict: [row for row in rows if row.verdict == verdict] for verdict in ("exact", "refused", "not built")}
    wrong = [row for row in rows if row.verdict == "WRONG"]
    lines = [
        "# Model families",
        "",
        "Made by `python scripts/compatibility.py`; do not edit.",
        f"transformers {transformers.__version__}, torch {torch.__version__}, {datetime.date.today().isoformat()}.",
        "",
        f"{len(rows)} cases: **{len(groups['exact'])} served, {len(groups['refused'])} refused, {len(wrong)} wrong**; "
        f"{len(groups['not built'])} more could not be built here.",
        "",
        PROSE.format(
            longest=LONGEST,
            capacity=CAPACITY,
            limits=LIMITS,
            slowest=max(row.seconds for row in rows),
            median=float(np.median([row.seconds for row in rows])),
        ),
    ]
    if wrong:
        lines += ["## WRONG", "", "| type | error |", "|---|---:|", *(f"| {r.kind} | {r.said} |" for r in wrong), ""]
    lines += ["## Served", "", "| type | error, nats |", "|---|---:|"]
    lines += [f"| {row.kind} | {row.said} |" for row in groups["exact"]]
    lines += ["", "## Refused", "", "| type | reason |", "|---|---|"]
    lines += [f"| {row.kind} | {_cell(row.said)} |" for row in groups["refused"]]
    if groups["not built"]:
        lines += ["", "## Not built", "", "By the sweep; the engine still checks each model it is handed.", ""]
        lines += ["| type | why |", "|---|---|"]
        lines += [f"| {row.kind} | {_cell(row.said)} |" for row in groups["not built"]]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="only these, printed and not written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "compatibility.md")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a type may take")
    options = parser.parse_args()
    todo = [case for case in cases() if not options.types or case[0] in options.types]
    rows = []
    for row in sweep(todo, options.limit):
        print(f"{row.kind:48} {row.verdict:10} {row.seconds:5.2f} s  {row.said[:110]}", flush=True)
        rows.append(row)
    if not options.types:
        options.out.write_text(page(rows), encoding="utf-8")
    return int(any(row.verdict == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
