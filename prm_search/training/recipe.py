"""Recipe: everything about a training run but its model and its data, checked before anything is loaded. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks

OBJECTIVES = ("ce", "dpo", "kto", "nca", "ipvrm")
BETA = 0.05  # what the released pairs were trained with, and what a pair without a card is scored with
IPVRM_BETA = 10.0  # of its paper: a prefix's value is divided by its length


_MOST = (1 << 31) - 1
_COUNTS = {
    "lora": 1 << 16, "batch": checks.MANY, "micro_batch": checks.MANY, "max_length": _MOST, "problems": _MOST,
    "per_problem": _MOST, "save_steps": _MOST,
}  # fmt: skip
_OPTIONAL = ("lora", "problems", "per_problem")  # None leaves them out


@dataclass(frozen=True)
class Recipe:
    """Settings of training. The defaults are those of the released pairs (arXiv 2412.01981) where it says.

    Attributes:
        objective: "ce", "dpo", "kto", "nca" or "ipvrm".
        beta: scale of the rewards; None: 0.05, for ipvrm 10.
        balanced: ce and kto: "none", "dataset" or "instance" (see objectives.balance); None: "none", for kto
            "dataset", since its loss is bounded and where one label is rare it is content to call everything the other
            (arXiv 2402.01306 weighs the labels for the same reason).
        margin: ipvrm only.
        lora: rank of a LoRA adapter on all linear layers but the head; None: all weights are trained.
        freeze_layers: leave the embeddings (a head that is tied to them included) and so many of the lowest layers as
            they are: steps are faster and take less memory.
        learning_rate: None: 5e-7, with lora 1e-4.
        epochs: passes over the items.
        batch: items of one step, over all devices.
        micro_batch: items of one forward on one device.
        pack: compute all responses to a problem behind their one prompt, and what they begin with once; batch and
            micro_batch then count problems. The loss is the same; see packing.
        sampled_reference: the model itself sampled the rollouts: take the reference's log-probabilities from them. A
            few are computed and compared.
        max_length: tokens; longer rows are left out, and no pack is longer.
        negatives: responses to other problems, as wrong ones, for each response (see negatives.cross_prompt).
        problems, per_problem: train on so many problems, and responses to each; None: all.
        holdout: share of the problems to measure on.
        seed: of the order, the pairs, the negatives, and a LoRA's beginning.
        bf16: forwards under bfloat16 autocast; the weights stay fp32.
        save_steps: steps between checkpoints.
    """

    objective: str = "ce"
    beta: float | None = None
    balanced: str | None = None
    margin: float = 0.0
    lora: int | None = None
    freeze_layers: int = 0
    learning_rate: float | None = None
    epochs: float = 1.0
    batch: int = 64
    micro_batch: int = 2
    pack: bool = False
    sampled_reference: bool = False
    max_length: int = 8192
    negatives: float = 0.0
    problems: int | None = None
    per_problem: int | None = None
    holdout: float = 0.05
    seed: int = 0
    bf16: bool = False
    save_steps: int = 200

    def __post_init__(self) -> None:
        checks.number("margin", self.margin, "a number from 0 to 1e6", lambda value: 0 <= value <= 1e6)
        if not checks.is_one_of(self.objective, OBJECTIVES):
            raise ValueError(f"objective={self.objective!r} is unknown; it is one of {', '.join(OBJECTIVES)}")
        if self.balanced is not None and not checks.is_one_of(self.balanced, ("none", "dataset", "instance")):
            raise ValueError(f"balanced={self.balanced!r} is unknown; it is one of none, dataset, instance")
        if self.balanced not in (None, "none") and self.objective not in ("ce", "kto"):
            raise ValueError(f"balanced={self.balanced!r}: only the objectives ce and kto have balanced forms")
        if self.margin and self.objective != "ipvrm":
            raise ValueError(f"margin={self.margin!r}: only objective='ipvrm' has a margin")
        for name in ("learning_rate", "epochs"):
            if name != "learning_rate" or self.learning_rate is not None:
                checks.number(
                    name, getattr(self, name), "a number > 0, and at most 1e6,", lambda value: 0 < value <= 1e6
                )
        if self.beta is not None:
            checks.beta("beta", self.beta)
        for name in ("beta", "learning_rate", "epochs"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))  # 3 and 3.0 are one recipe
        for name, most in _COUNTS.items():
            if name not in _OPTIONAL or getattr(self, name) is not None:
                checks.count(name, getattr(self, name), 1, most)
        checks.count("freeze_layers", self.freeze_layers, 0)
        checks.integer("seed", self.seed, 0, "an integer from 0 to 2**32 - 1", (1 << 32) - 1)
        for name in ("bf16", "pack", "sampled_reference"):
            checks.flag(name, getattr(self, name))
        checks.number("negatives", self.negatives, "a number from 0 to 1e6", lambda value: 0 <= value <= 1e6)
        checks.number("holdout", self.holdout, "a share in [0, 1)", lambda value: 0 <= value < 1)

    @property
    def scale(self) -> float:
        """beta, or its default."""
        return self.beta if self.beta is not None else IPVRM_BETA if self.objective == "ipvrm" else BETA

    @property
    def balance(self) -> str:
        """balanced, or its default."""
        return self.balanced or ("dataset" if self.objective == "kto" else "none")

    @property
    def rate(self) -> float:
        """learning_rate, or its default."""
        return self.learning_rate if self.learning_rate is not None else 5e-7 if self.lora is None else 1e-4
