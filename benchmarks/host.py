"""The host's part of a token step: process time of our decode loop against transformers' own `generate`.

A model of one layer, so that nearly all of a step is what the host does around the forward: rows, slots, draws, ends of
steps. Process time of one thread, which another process on the machine does not lengthen as it does wall time.

python benchmarks/host.py [--pairs 7]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from common import process_seconds, ratio
from searching import tokenizer_of
from transformers import AutoModelForCausalLM, LlamaConfig

import prm_search as ps
from prm_search.sampling import Request, Sampling
from prm_search.tree import Prompt, SearchTree

PROMPT = 32  # tokens


def one_layer(vocab: int) -> Any:
    """A Llama of one narrow layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def compare(rows: int, vocab: int, tokens: int, pairs: int) -> dict[str, Any]:
    """One line of the report: microseconds a row and token of both, and the ratio.

    Both draw from the whole distribution at temperature 1, from one prompt, and neither ends early.
    """
    module = one_layer(vocab)
    ids = torch.randint(11, vocab, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    policy = ps.HFPolicy(module, tokenizer_of(vocab), stop_ids=[], max_rows=rows, capacity=1 << 16)
    sampling = Sampling(ps.StepRule("\n\n", max_tokens=256), max_new_tokens=tokens)

    def ours() -> None:
        session, tree = policy.session(), SearchTree(Prompt(token_ids=tuple(ids[0].tolist())))
        session.submit([Request.draw(tree.root, rows, sampling, until="end")])
        while not session.advance():
            pass
        session.release(tree)

    def generate() -> None:
        module.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=tokens,
            num_return_sequences=rows,
        )  # fmt: skip

    seconds = process_seconds({"ours": ours, "generate": generate}, pairs)
    each = {name: 1e6 * statistics.median(values) / (rows * tokens) for name, values in seconds.items()}
    return {
        "rows": rows,
        "vocabulary": vocab,
        "tokens": tokens,
        "us_a_row_and_token": each,
        "ours_over_generate": ratio(seconds["ours"], seconds["generate"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[128])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for vocab in given.vocabulary:
        for rows in given.rows:
            print(json.dumps(compare(rows, vocab, 64, given.pairs)), flush=True)


if __name__ == "__main__":
    main()
