"""A step PRM in a 4 x 4 beam over S steps: ours against re-encoding the whole text of every active beam at each step.

The rival is what search-and-learn, its_hub and vLLM's step pooling do: each new step's question, steps and markers are
tokenised and encoded from the beginning. It is written kindly: all beams of a level in one batch without padding, the
body of transformers' own class, the head on the last marker alone. Both tokenise texts, and give the same scores.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from common import SHAPES, Machine, model, paired, ratio
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from prm_search import Node, Prompt, SearchTree, StepPRM

MARKER = "<extra_0>"
WIDTH, EXPANSIONS = 4, 4
FIRST = 6  # id of the first word of texts
TEMPLATE = "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"


@cache
def tokenizer_of(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of words, with a chat template and the marker of Qwen2.5-Math-PRM."""
    roles = {"<unk>": 0, "system": 1, "user": 2, "assistant": 3, "a": 4, "1": 5}
    words = roles | {f"w{i}": i for i in range(FIRST, vocab - 3)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=TEMPLATE)
    special = [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", MARKER)]
    made.add_special_tokens({"additional_special_tokens": special})
    return made


def head_of(width: int, machine: Machine) -> dict[str, torch.Tensor]:
    """Random weights of the head of two layers."""
    draw = torch.Generator().manual_seed(5)
    shapes = {"score.0.weight": (width, width), "score.2.weight": (2, width)}
    tensors = {name: torch.randn(shape, generator=draw) / width**0.5 for name, shape in shapes.items()}
    biases = {"score.0.bias": torch.zeros(width), "score.2.bias": torch.zeros(2)}
    return {name: tensor.to(machine.device) for name, tensor in (tensors | biases).items()}


@dataclass(frozen=True)
class Work:
    """A beam's texts.

    Attributes:
        question: what is asked.
        texts: for each level 16 steps, four below each of the four that are kept.
        kept: for each level the places of the four that the next level goes on from.
    """

    question: str
    texts: list[list[str]]
    kept: list[list[int]]

    @classmethod
    def draw(cls, vocab: int, prompt: int, length: int, steps: int, seed: int = 0) -> Work:
        """Draw words: prompt of them in the question, length in each of the steps of so many levels."""
        rnd = random.Random(seed)
        fan = WIDTH * EXPANSIONS

        def words(n: int) -> str:
            return " ".join(f"w{rnd.randrange(FIRST, vocab - 3)}" for _ in range(n))

        kept = [sorted(rnd.sample(range(fan), WIDTH)) for _ in range(steps)]
        return cls(words(prompt), [[words(length) for _ in range(fan)] for _ in range(steps)], kept)

    def paths(self) -> list[list[list[str]]]:
        """For each level the steps of each of its 16 beams."""
        levels: list[list[list[str]]] = []
        above: list[list[str]] = [[]] * WIDTH
        for texts, kept in zip(self.texts, self.kept, strict=True):
            levels.append([[*above[i // EXPANSIONS], text] for i, text in enumerate(texts)])
            above = [levels[-1][i] for i in kept]
        return levels


def ours(prm: StepPRM, work: Work) -> tuple[list[float], int]:
    """Scores of every step, level by level, and the tokens that the PRM encoded."""
    tree = SearchTree(Prompt(text=work.question))
    above: list[Node] = [tree.root] * WIDTH
    scores: list[float] = []
    for texts, kept in zip(work.texts, work.kept, strict=True):
        level = [
            tree.add(above[i // EXPANSIONS], [0] * len(text.split()), text=text + "\n\n")
            for i, text in enumerate(texts)
        ]
        prm.score_nodes(level)
        scores += [node.reward_of(prm.name) for node in level]
        above = [level[i] for i in kept]
    encoded = sum(tree.meter.counts[kind, prm.prm.id] for kind in ("encoded", "reencoded"))
    prm.release(tree)
    return scores, encoded


@torch.no_grad()
def whole_texts(prm: StepPRM, body: Any, work: Work, device: str) -> tuple[list[float], int]:
    """The same by encoding every active beam's text at each step."""
    tokenizer, scores, encoded = prm.tokenizer, [], 0
    for level in work.paths():
        rows = []
        for steps in level:
            chat = [
                {"role": "system", "content": prm.format.layout.system},
                {"role": "user", "content": work.question},
                {"role": "assistant", "content": MARKER.join(steps) + MARKER},
            ]
            ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
            rows.append(ids[: len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids(MARKER))])
        encoded += sum(map(len, rows))
        hidden = body(torch.tensor(rows, device=device), use_cache=False)[0][:, -1]
        scores += prm._read(hidden).tolist()
    return scores, encoded


def compare(machine: Machine, shape: str, prompt: int, length: int, steps: int, repeats: int) -> dict[str, Any]:
    """One line of the report. Raises ValueError where the two disagree.

    Args:
        machine: where it runs.
        shape: a name of SHAPES.
        prompt, length: words of the question, and of a step.
        steps: S, levels of the beam.
        repeats: rounds, in each of which both take their turn; one round of a long search has no warm-up.
    """
    lm, vocab = model(shape, 1, machine), SHAPES[shape]["vocab_size"]
    tensors = head_of(SHAPES[shape]["hidden_size"], machine)
    prm = StepPRM(lm, tokenizer_of(vocab), format="qwen_math", tensors=tensors, too_long="error")
    work = Work.draw(vocab, prompt, length, steps)
    results: dict[str, tuple[list[float], int]] = {}

    def run_ours() -> None:
        results["ours"] = ours(prm, work)

    def run_rival() -> None:
        results["whole_texts"] = whole_texts(prm, lm.base_model, work, machine.device)

    seconds = paired({"ours": run_ours, "whole_texts": run_rival}, repeats, warmup=int(repeats > 1))
    apart = max(abs(a - b) for a, b in zip(results["ours"][0], results["whole_texts"][0], strict=True))
    if apart > (1e-3 if machine.device == "cpu" else 0.05):
        raise ValueError(f"the two ways' scores differ by {apart}")
    tokens = {name: encoded for name, (_, encoded) in results.items()}
    return {
        "shape": shape,
        "prompt": prompt,
        "length": length,
        "steps": steps,
        "repeats": repeats,
        "tokens": tokens,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "tokens_over_ours": tokens["whole_texts"] / tokens["ours"],
        "seconds_over_ours": ratio(seconds["whole_texts"], seconds["ours"]),
        "largest_difference": apart,
    }
