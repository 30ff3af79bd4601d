"""Best-of-N without a scorer: `search` over HFPolicy against transformers' own `generate` with as many sequences.

python benchmarks/best_of.py [--tokens 80 160] [--pairs 9]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from common import Machine, model, paired, process_seconds, ratio
from searching import tokenizer_of

import prm_search as ps


def compare(machine: Machine, shape: str, prompt: int, tokens: int, rows: int, pairs: int) -> dict[str, Any]:
    """One line of the report: seconds of both, and the median of the pairs' ratios.

    Both draw from the whole distribution at temperature 1, and neither ends early. Process seconds on a CPU, wall
    seconds on a GPU.
    """
    module = model(shape, 1, machine)
    module.generation_config.eos_token_id = None
    vocab = module.config.vocab_size
    ids = torch.randint(11, vocab, (1, prompt), generator=torch.Generator().manual_seed(0)).to(machine.device)
    policy = ps.HFPolicy(module, tokenizer_of(vocab), stop_ids=[], max_rows=rows, capacity=prompt + rows * (tokens + 1))
    steps = ps.StepRule("\n\n", max_tokens=256)

    def ours() -> None:
        ps.search(ids.tolist(), policy=policy, strategy=ps.BestOfN(rows), steps=steps, max_new_tokens=tokens)

    def generate() -> None:
        module.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=1,
            num_return_sequences=rows,
        )  # fmt: skip

    runs = {"ours": ours, "generate": generate}
    seconds = process_seconds(runs, pairs) if machine.device == "cpu" else paired(runs, pairs)
    return {
        "shape": shape,
        "prompt": prompt,
        "tokens": tokens,
        "rows": rows,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "generate_over_ours": ratio(seconds["generate"], seconds["ours"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[80, 160])
    given = parser.parse_args()
    machine = Machine.here()
    for tokens in given.tokens:
        print(json.dumps(compare(machine, "small", 64, tokens, given.rows, given.pairs)), flush=True)


if __name__ == "__main__":
    main()
