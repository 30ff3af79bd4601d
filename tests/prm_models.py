"""Step PRMs in the layouts in which they are published, tiny and random, and a plain reading of each format.

The readings are written from the formats' descriptions and share nothing with the package: one full forward of a whole
text by transformers' own classes, with the head beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from models import draw_weights
from pairs import CHATML, CORPUS, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

REASON = "Please reason step by step, and put your final answer within \\boxed{}."
QUESTION = "What is 2 plus 3, times 4?"
VOCABULARY = 420
HIDDEN = 32


@cache
def prm_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which the tags of the published models are one token."""
    corpus = [*CORPUS, "x ки" * 400, "x \n\n\n\n\n" * 400, "x \n\n\n\n" * 200, "a +b -" * 300]
    # White space before line breaks goes with them, as in Qwen's and Llama 3's tokenizers.
    made = byte_tokenizer(corpus, size=400, template=CHATML, pattern=r"\s*[\r\n]+|\s+(?!\S)| ?[^\s]+|\s+")
    made.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<extra_0>"], "bos_token": "<pad>"}
    )
    return made


def config(kind: type = Qwen2Config, **given: Any) -> Any:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096} | given
    return kind(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, bos_token_id=None,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, **sizes,
    )  # fmt: skip


HEADS: dict[str, tuple[str, dict[str, tuple[int, ...]], type]] = {
    # format: architecture, head tensors, body
    "qwen_math": ("Qwen2ForProcessRewardModel", {"score.0": (HIDDEN, HIDDEN), "score.2": (2, HIDDEN)}, Qwen2Config),
    "reasonflux": ("Qwen2ForProcessRewardModel", {"score.0": (HIDDEN, HIDDEN), "score.2": (2, HIDDEN)}, Qwen2Config),
    "math_shepherd": ("MistralForCausalLM", {}, MistralConfig),
    "math_psa": ("Qwen2ForCausalLM", {}, Qwen2Config),
    "er_prm": ("LlamaForCausalLM", {}, LlamaConfig),
    "versaprm": ("LlamaForCausalLM", {}, LlamaConfig),
    "rlhflow": ("LlamaForCausalLM", {}, LlamaConfig),
    "granite": ("LlamaForCausalLM", {}, LlamaConfig),
    "skywork": ("Qwen2ForPrmModel", {"v_head.summary": (1, HIDDEN)}, Qwen2Config),
    "trl": ("Qwen2ForTokenClassification", {"score": (2, HIDDEN)}, Qwen2Config),
    "trl_blank_line": ("Qwen2ForTokenClassification", {"score": (2, HIDDEN)}, Qwen2Config),
    "pure": ("Qwen2ForTokenClassification", {"score": (2, HIDDEN)}, Qwen2Config),
    "universal": ("Qwen2ForSequenceClassification", {"score": (1, HIDDEN)}, Qwen2Config),
}


def publish(folder: Path, format: str, sizes: dict[str, int] | None = None, **changed: torch.Tensor | None) -> Path:
    """Write a checkpoint in the format's layout; `changed` replaces tensors, or leaves them out where None."""
    architecture, head, kind = HEADS[format]
    made = config(kind, **sizes or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sorted(HEADS).index(format))
        body = AutoModelForCausalLM.from_config(made).eval()
        draw_weights(body)
        state = {name: tensor.clone() for name, tensor in body.state_dict().items()}
        if head and format != "skywork":
            del state["lm_head.weight"]
        for layer, shape in head.items():
            state[f"{layer}.weight"] = torch.randn(shape) / shape[1] ** 0.5
            if format != "universal":
                state[f"{layer}.bias"] = 0.3 * torch.randn(shape[:1])
    state |= {name: tensor for name, tensor in changed.items() if tensor is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t for n, t in state.items() if changed.get(n, t) is not None}, folder / "model.safetensors")
    made.architectures = [architecture]
    made.save_pretrained(folder)
    prm_tokenizer().save_pretrained(folder)
    return folder


def chat(turns: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


class Plain:
    """One format read the plain way: `scores(steps)` of a whole answer, `ids(steps)` up to the last position read."""

    def __init__(self, folder: Path, format: str, question: str = QUESTION) -> None:
        self.format, self.question = format, question
        self.tokenizer = AutoTokenizer.from_pretrained(folder)  # not all classes keep what was saved
        state = load_file(folder / "model.safetensors")
        self.body = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()
        self.body.load_state_dict({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")})
        self.state = state

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def whole(self, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of everything, and the positions that are read."""
        q, encode = self.question, self.encode
        if self.format in ("qwen_math", "reasonflux"):
            system = [("system", REASON)] if self.format == "qwen_math" else []
            text = chat([*system, ("user", q), ("assistant", "<extra_0>".join(steps) + "<extra_0>")])
            ids = encode(text)
            return ids, [i for i, token in enumerate(ids) if token == encode("<extra_0>")[0]]
        if self.format in ("math_shepherd", "er_prm", "math_psa", "versaprm"):
            tag = {"math_psa": " \n\n\n\n\n", "versaprm": " \n\n\n\n"}.get(self.format, " ки")
            joint = "\n" if tag == " ки" else ""
            labels = [f"Step {i}: " if self.format != "versaprm" else "" for i in range(1, len(steps) + 1)]
            ids = encode(q + " " + joint.join(label + step + tag for label, step in zip(labels, steps, strict=True)))
            return ids, [i for i, token in enumerate(ids) if token == encode("x" + tag)[-1]]
        if self.format in ("rlhflow", "granite"):
            ask = " Is this response correct so far (Y/N)?" if self.format == "granite" else ""
            verdict = "Y" if ask else "+"
            ids, read = [], []
            for i, step in enumerate(steps):
                user = (q + " " + step if i == 0 else step) + ask
                ids += encode(chat([("user", user)]) + "<|im_start|>assistant\n")
                read.append(len(ids) - 1)
                ids += encode(f"{verdict}<|im_end|>\n")
            return ids, read
        if self.format == "universal":
            text = chat([
                ("system", "You are a helpful assistant."),
                ("user", q + "\n\n###\n\nThe reference answer is: There is no reference answer for this question."),
            ]) + "<|im_start|>assistant\n" + "\n\n".join(steps)  # fmt: skip
            ids = [*encode(text), self.tokenizer.eos_token_id]
            return ids, [len(ids) - 1]
        separator = "\n\n" if self.format == "trl_blank_line" else "\n"
        behind = encode(separator)
        ids = encode(q + separator) if self.format.startswith("trl") else encode(q)
        if self.format == "skywork":
            ids, behind = [self.tokenizer.bos_token_id, *encode(q + "\n")], behind[-1:]
        read = []
        for step in steps:
            ids += encode(step) + behind
            read.append(len(ids) - 1)
        return ids, read

    def ids(self, steps: Sequence[str]) -> list[int]:
        ids, read = self.whole(steps)
        return ids[: read[-1] + 1]

    @torch.no_grad()
    def scores(self, steps: Sequence[str]) -> list[float]:
        if self.format == "universal":  # one forward a prefix
            return [self._read(*self.whole(steps[: i + 1]))[-1] for i in range(len(steps))]
        return self._read(*self.whole(steps))

    def _read(self, ids: list[int], read: list[int]) -> list[float]:
        rows = self.body(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, read].double()
        head = HEADS[self.format][1]
        if not head:
            logits = rows @ self.state["lm_head.weight"].double().T
            plus, minus = (" +", " -") if self.format in ("math_psa", "er_prm") else ("+", "-")
            if self.format == "granite":
                return torch.softmax(logits, -1)[:, self.encode("Y")[-1]].tolist()
            pair = logits[:, [self.encode(plus)[-1], self.encode(minus)[-1]]]
            return torch.softmax(pair, -1)[:, 0].tolist()
        for place, layer in enumerate(head):
            rows = torch.relu(rows) if place else rows
            bias = self.state.get(f"{layer}.bias", torch.zeros(1)).double()
            rows = rows @ self.state[f"{layer}.weight"].double().T + bias
        if rows.shape[1] == 1:
            return torch.sigmoid(rows[:, 0]).tolist()
        shares = torch.softmax(rows, -1)
        return (shares[:, 1] - (shares[:, 0] if self.format == "pure" else 0)).tolist()
