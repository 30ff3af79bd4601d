"""its_hub's own searches beside ours: the same policy, the same pair, the same step length, tokens and scorer seconds.

    python benchmarks/peers/its_hub_beams.py --out benchmarks/results/peers

its_hub is installed beside the package (into --target, without its dependencies) and run unmodified: its BeamSearch and
its BestOfN take a language model and a reward model of the caller's. Both are written here as its interfaces ask, over
transformers: the whole text of every candidate, in one padded batch, through the trained model and the reference. Ours
reads the reference from the policy. Weights are random, so only costs are compared; token counts are exact, seconds are
of one thread, medians of runs in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402 - after the number of threads is set
from common import Machine, model  # noqa: E402 - a script beside it
from searching import _logprobs, tokenizer_of  # noqa: E402

import prm_search as ps  # noqa: E402

VERSION = "1.2.0"
PROMPT, STEP, CANDIDATES, WIDTH = 64, 16, 8, 2
BETA = 0.05


def install(target: Path) -> None:
    """Put its_hub into a folder of its own, and on the path."""
    if not (target / "its_hub").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*command, f"its_hub=={VERSION}"], check=True)
    sys.path.append(str(target))


def written(ids: list[int]) -> str:
    """Token ids as its_hub's texts: every token is a word of its own."""
    return "".join(f"<{i}>" for i in ids)


def read(text: str) -> list[int]:
    """The ids of such a text."""
    return [int(i) for i in re.findall(r"<(\d+)>", text)]


class Sampler:
    """its_hub's language model over transformers' generate, which reads the whole prefix anew at each step."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.tokens = 0

    async def agenerate(self, messages: Any, stop: Any = None, **options: Any) -> Any:
        """Continue a batch of conversations by one step each."""
        if not isinstance(messages[0], list):
            return (await self.agenerate([messages], stop, **options))[0]
        rows = [read("".join(str(message.content) for message in one)) for one in messages]
        new = options.get("max_completion_tokens") or STEP
        ids = torch.tensor(rows)
        out = self.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, temperature=1.0,
            max_new_tokens=new, min_new_tokens=new, pad_token_id=1,
        )  # fmt: skip
        self.tokens += new * len(rows)
        return [
            {"role": "assistant", "content": written(row[len(given) :].tolist())}
            for row, given in zip(out, rows, strict=True)
        ]


class FullText:
    """its_hub's reward models over a pair: q of every candidate's whole text."""

    def __init__(self, prm: Any, reference: Any) -> None:
        self.modules = (prm, reference)
        self.tokens, self.seconds = 0, 0.0

    def rewards(self, prompt: list[int], answers: list[list[int]]) -> list[float]:
        """Score answers to one prompt."""
        begin = time.perf_counter()
        rows, news = [prompt + answer for answer in answers], list(map(len, answers))
        mine, theirs = (_logprobs(module, rows, news) for module in self.modules)
        self.tokens += sum(map(len, rows))
        self.seconds += time.perf_counter() - begin
        return [BETA * float((a - b).sum()) for a, b in zip(mine, theirs, strict=True)]

    async def ascore(self, prompt: Any, steps: Any = None, **options: Any) -> list[float]:
        """As both of its_hub's interfaces: a prompt with texts, or whole conversations."""
        if steps is not None:
            return self.rewards(read(str(prompt)), [read(text) for text in steps])
        return self.rewards(read(str(prompt[0][0].content)), [read(str(one[1].content)) for one in prompt])


def theirs(way: str, steps: int, policy: Any, prm: Any, reference: Any, prompt: list[int]) -> dict[str, float]:
    """One search of its_hub's."""
    from its_hub.core.algorithms.beam_search import BeamSearch
    from its_hub.core.algorithms.bon import BestOfN
    from its_hub.core.lms.step_generation import StepGeneration

    sampler, scorer = Sampler(policy), FullText(prm, reference)
    if way == "beam":
        generation = StepGeneration(max_steps=steps - 1, tokens_per_step=STEP, temperature=1.0)
        asyncio.run(BeamSearch(generation, scorer, WIDTH).ainfer(sampler, written(prompt), CANDIDATES))
    else:
        generation_of = Sampler.agenerate
        sampler.agenerate = lambda messages, stop=None, **options: generation_of(  # type: ignore[method-assign]
            sampler, messages, stop, max_completion_tokens=steps * STEP
        )
        sampler.agenerate_single = sampler.agenerate  # type: ignore[attr-defined]
        asyncio.run(BestOfN(scorer).ainfer(sampler, written(prompt), CANDIDATES))
    return {"prm_tokens": scorer.tokens, "scorer_seconds": scorer.seconds, "sampled": sampler.tokens}


def ours(way: str, steps: int, policy: Any, prm: Any, tokenizer: Any, prompt: list[int]) -> dict[str, float]:
    """One search of ours."""
    strategy = ps.Beam(WIDTH, CANDIDATES // WIDTH) if way == "beam" else ps.BestOfN(CANDIDATES)
    (result,) = ps.search(
        [prompt], policy=ps.HFPolicy(policy, tokenizer, stop_ids=[]), scorer=ps.ImplicitPRM(prm, policy, beta=BETA),
        strategy=strategy, steps=ps.StepRule("\n\n", max_tokens=STEP), max_new_tokens=steps * STEP, temperature=1.0,
    )  # fmt: skip
    usage = result.usage
    return {
        "prm_tokens": usage.encoded_tokens["prm"],
        "scorer_seconds": usage.seconds["scorer"],
        "sampled": usage.sampled_tokens["policy"],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--target", type=Path, default=Path(".peers"), help="where its_hub is installed")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    install(arguments.target.resolve())
    torch.set_num_threads(1)
    machine = Machine.here()
    policy, prm = model("small", 1, machine), model("small", 2, machine)
    tokenizer = tokenizer_of(policy.config.vocab_size)
    prompt = torch.randint(11, policy.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    lines = []
    for way in ("beam", "best_of_n"):
        for steps in arguments.steps:
            runs = [
                (theirs(way, steps, policy, prm, policy, prompt), ours(way, steps, policy, prm, tokenizer, prompt))
                for _ in range(arguments.repeats)
            ]
            them, us = runs[-1]
            line = {
                "search": way, "steps": steps, "theirs": them["prm_tokens"], "ours": us["prm_tokens"],
                "sampled": [them["sampled"], us["sampled"]],
                "tokens_ratio": them["prm_tokens"] / us["prm_tokens"],
                "seconds_ratio": statistics.median(a["scorer_seconds"] / b["scorer_seconds"] for a, b in runs),
            }  # fmt: skip
            lines.append(line)
            print(json.dumps(line), flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {"its_hub": VERSION, "machine": machine.name, "versions": machine.versions, "lines": lines}
        (arguments.out / "its_hub.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        rows = [
            f"| {line['search']} | {line['steps']} | {line['theirs']:,} | {line['ours']:,} "
            f"| {line['tokens_ratio']:.1f} | {line['seconds_ratio']:.1f} |"
            for line in lines
        ]
        head = "| search | steps | PRM tokens, its_hub | ours | ratio | PRM and reference seconds, ratio |"
        about = (
            f"# its_hub {VERSION} beside prm_search\n\n`python benchmarks/peers/its_hub_beams.py`: "
            f"{CANDIDATES} candidates, beam width {WIDTH}, steps of {STEP} tokens, a prompt of {PROMPT}; "
            f"6-layer random Llamas, one thread of {machine.name}, "
            f"medians of {arguments.repeats} runs in turn. {machine.versions}.\n\n"
        )
        table = "\n".join([head, "|---|---:|---:|---:|---:|---:|", *rows])
        (arguments.out / "report.md").write_text(about + table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
