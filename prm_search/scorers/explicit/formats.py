"""Formats of published step PRMs, each with its source. A format of one's own is a PRMFormat too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ...values import VALUES
from .layouts import EndOfPrefix, JoinedIds, Layout, MarkerChat, MarkerText, VerdictTurns
from .readings import Reading, TensorHead, Words

_REASON = "Please reason step by step, and put your final answer within \\boxed{}."
_NO_REFERENCE = "{question}\n\n###\n\nThe reference answer is: There is no reference answer for this question."
_CORRECT = "Is this response correct so far (Y/N)?"


@dataclass(frozen=True)
class PRMFormat:
    """The format of a step PRM's question and answer.

    Args:
        name: of the format.
        layout: how a question and its steps are written, and which position is read.
        reading: which number comes out of it.
        aggregate: the value that its authors judge a whole answer by: a name of `values.VALUES`.
        low, high: the range of the number.
        longest: tokens of the longest path it was made for; None for what its config says.

    Raises:
        ValueError: aggregate is not the name of a value, or the range is empty.
    """

    name: str
    layout: Layout
    reading: Reading
    aggregate: str = "last"
    low: float = 0.0
    high: float = 1.0
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.aggregate not in VALUES:
            raise ValueError(f"aggregate={self.aggregate!r} is unknown; it is one of {sorted(VALUES)}")
        if not self.low < self.high:
            raise ValueError(f"low={self.low!r}, high={self.high!r}: a range is needed")


def _formats(*formats: PRMFormat) -> Mapping[str, PRMFormat]:
    return MappingProxyType({one.name: one for one in formats})


_TWO_LAYERS = TensorHead(("score.0", "score.2"), "second")

FORMATS: Mapping[str, PRMFormat] = _formats(
    # Qwen2.5-Math-PRM-7B and -72B, Qwen2.5-Math-7B-PRM800K (model cards; arXiv 2501.07301).
    PRMFormat("qwen_math", MarkerChat("<extra_0>", _REASON), _TWO_LAYERS, "last", longest=4096),
    # ReasonFlux-PRM-7B: the same without a system turn of its own (arXiv 2506.18896).
    PRMFormat("reasonflux", MarkerChat("<extra_0>"), _TWO_LAYERS, "mean"),
    # Math-Shepherd-Mistral-7B (arXiv 2312.08935): the tag's position gives "+" against "-".
    PRMFormat("math_shepherd", MarkerText(" \u043a\u0438"), Words("+", "-"), "min", longest=4096),
    # OpenR's Math-psa on Qwen2.5-Math (arXiv 2410.09671).
    PRMFormat("math_psa", MarkerText(" \n\n\n\n\n", joint=""), Words(" +", " -"), "min", longest=4096),
    # ER-PRM's Llama3.1-Math-PRM (arXiv 2412.11006).
    PRMFormat("er_prm", MarkerText(" \u043a\u0438"), Words(" +", " -"), "min"),
    # VersaPRM (arXiv 2502.06737): steps are cut by blank lines.
    PRMFormat("versaprm", MarkerText(" \n\n\n\n", label="", joint=""), Words("+", "-"), "min"),
    # RLHFlow's Llama3.1-8B-PRM-Mistral-Data and -Deepseek-Data (RLHFlow/RLHF-Reward-Modeling).
    PRMFormat("rlhflow", VerdictTurns("+"), Words("+", "-"), "mean"),
    # granite-3.3-8b-lora-math-prm (model card).
    PRMFormat(
        "granite",
        VerdictTurns("Y", f"{{question}} {{step}} {_CORRECT}", f"{{step}} {_CORRECT}"),
        Words("Y"),
        "mean",
    ),
    # Skywork-o1-Open-PRM-Qwen-2.5-1.5B and -7B (skywork-o1-prm-inference).
    PRMFormat(
        "skywork",
        JoinedIds("\n", begin=True, gap="\n", last_only=True),
        TensorHead(("v_head.summary",), "sigmoid"),
        "mean",
    ),
    # Token classifiers trained with TRL's PRMTrainer; its default separator, and that of HuggingFaceH4's models.
    PRMFormat("trl", JoinedIds("\n", gap="\n"), TensorHead(("score",), "second"), "prod"),
    PRMFormat("trl_blank_line", JoinedIds("\n\n", gap="\n\n"), TensorHead(("score",), "second"), "prod"),
    # PURE-PRM-7B (arXiv 2504.15275): p(right) - p(wrong), in [-1, 1].
    PRMFormat("pure", JoinedIds("\n"), TensorHead(("score",), "difference"), "min", low=-1.0),
    # Universal-PRM-7B: an end of sequence behind each prefix.
    PRMFormat(
        "universal",
        EndOfPrefix("You are a helpful assistant.", _NO_REFERENCE),
        TensorHead(("score",), "sigmoid"),
        "last",
        longest=32768,
    ),
)
