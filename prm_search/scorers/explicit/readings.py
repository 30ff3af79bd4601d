"""Readings: the number that comes out of the hidden row that a layout points at. Heads accumulate in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ...engine.head import Head
from .layouts import last_token, one_token


class Reader(Protocol):
    """[N, D] last hidden rows -> [N] scores, fp32 (fp64 for an fp64 model)."""

    def __call__(self, hidden: Tensor, /) -> Tensor: ...


class Reading(Protocol):
    """The number that a format reads. Frozen records with these members are readings.

    Attributes:
        prefixes: names of the checkpoint's tensors that it needs begin with one of these; empty for none.
    """

    @property
    def prefixes(self) -> tuple[str, ...]: ...

    def reader(self, head: Head, tensors: Mapping[str, Tensor], tokenizer: Any, width: int) -> Reader:
        """Make what reads.

        Args:
            head: the model's output embedding.
            tensors: of the checkpoint, by name, those of `prefixes`.
            tokenizer: the PRM's.
            width: D.

        Raises:
            ValueError: a tensor is missing or of another shape, or a word is not in the vocabulary.
        """
        ...


Squash = Literal["none", "sigmoid", "second", "difference"]


@dataclass(frozen=True)
class TensorHead:
    """A head beside the backbone: one linear layer, or two with a ReLU between them.

    Args:
        layers: names of its linear layers in the checkpoint, each with ".weight" and perhaps ".bias".
        squash: "none": one number as it is; "sigmoid" of one number; "second": the second of two classes'
            probabilities; "difference": the second minus the first.
    """

    layers: tuple[str, ...]
    squash: Squash

    @property
    def prefixes(self) -> tuple[str, ...]:
        """See Reading."""
        return tuple(f"{layer}." for layer in self.layers)

    @property
    def outputs(self) -> int:
        """Numbers that the last layer gives."""
        return 1 if self.squash in ("none", "sigmoid") else 2

    def squashed(self, logits: Tensor) -> Tensor:
        """[N, outputs] of the last layer, fp32 or fp64 -> [N] scores."""
        if self.squash == "none":
            return logits[:, 0]
        if self.squash == "sigmoid":
            return torch.sigmoid(logits[:, 0])
        shares = torch.softmax(logits, -1)
        return shares[:, 1] if self.squash == "second" else shares[:, 1] - shares[:, 0]

    def reader(self, head: Head, tensors: Mapping[str, Tensor], tokenizer: Any, width: int) -> Reader:
        """See Reading."""
        outputs = self.outputs
        stack: list[nn.Module] = []
        inputs = width
        for place, name in enumerate(self.layers):
            weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
            if weight is None:
                raise ValueError(f"the checkpoint has no {name}.weight, the head that this format reads")
            last = place + 1 == len(self.layers)
            if weight.ndim != 2 or weight.shape[1] != inputs or (last and weight.shape[0] != outputs):
                wanted = f"[{outputs if last else inputs}, {inputs}]"
                raise ValueError(f"{name}.weight has shape {list(weight.shape)}, where this format needs {wanted}")
            linear = nn.Linear(inputs, weight.shape[0], bias=bias is not None, dtype=torch.float32)
            with torch.no_grad():
                linear.weight.copy_(weight)
                if bias is not None:
                    linear.bias.copy_(bias)
            stack += [linear] if last else [linear, nn.ReLU()]
            inputs = weight.shape[0]
        return _Read(nn.Sequential(*stack).requires_grad_(False), self.squashed)


class _Read:
    def __init__(self, head: nn.Module, squashed: Callable[[Tensor], Tensor]) -> None:
        self.head, self.squashed = head, squashed

    def __call__(self, hidden: Tensor) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        return self.squashed(self.head.to(hidden.device, exact)(hidden.to(exact)))


@dataclass(frozen=True)
class Words:
    """The model's own next-token probability of a good word.

    Args:
        good: the word.
        bad: the word against it; None for the probability among the whole vocabulary.
        whole: the words are tokens by themselves; False takes the last token of each word's own tokenisation.
    """

    good: str
    bad: str | None = None
    whole: bool = False

    @property
    def prefixes(self) -> tuple[str, ...]:
        """See Reading."""
        return ()

    def ids(self, tokenizer: Any) -> list[int]:
        """Token ids of the words, the good one first. Raises ValueError where both end with the same token."""
        find = one_token if self.whole else last_token
        labels: Sequence[str] = [self.good] if self.bad is None else [self.good, self.bad]
        ids = [find(tokenizer, label) for label in labels]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{self.good!r} and {self.bad!r} end with the same token")
        return ids

    def reader(self, head: Head, tensors: Mapping[str, Tensor], tokenizer: Any, width: int) -> Reader:
        """See Reading."""
        ids = self.ids(tokenizer)

        def read(hidden: Tensor) -> Tensor:
            logits = head.logits(hidden)
            if self.bad is None:
                return torch.exp(logits[:, ids[0]] - torch.logsumexp(logits, -1))
            return torch.sigmoid(logits[:, ids[0]] - logits[:, ids[1]])

        return read

    def score(self, logprobs: Sequence[float]) -> float:
        """Return the score from the words' log-probabilities, nats, in the order of `ids`."""
        if self.bad is None:
            return math.exp(logprobs[0])
        return 1 / (1 + math.exp(min(logprobs[1] - logprobs[0], 700.0)))
