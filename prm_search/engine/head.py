"""Hidden rows -> log p(target), and full log-softmax rows, in fp32 and without keeping `[rows, vocab]` logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..triton_kernels import linear_logprob
from ..triton_kernels.launch import Backend
from ..triton_kernels.reference import log_softmax

CHUNK_ELEMENTS = 1 << 24  # of a temporary: 64 MiB in fp32


class Head:
    """The output embedding of a causal LM with what its family does to the logits afterwards.

    Args:
        module: a transformers causal LM.
        backend: of the kernels.

    Attributes:
        scale: factor on the logits (Cohere's logit_scale, Granite's 1 / logits_scaling, Falcon-H1's multiplier).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2 and kin); None for none.
        vocab: rows of the output embedding, padding included.

    Raises:
        ValueError: the model has no output embedding.
    """

    def __init__(self, module: Any, backend: Backend = "auto") -> None:
        self.backend = backend
        self.linear = module.get_output_embeddings()
        if self.linear is None:
            raise ValueError(f"{type(module).__name__} has no output embedding, so it gives no token probabilities")
        config = module.config.get_text_config()
        self.scale = 1.0
        if getattr(config, "logit_scale", None):
            self.scale *= float(config.logit_scale)
        if getattr(config, "logits_scaling", None):
            factor = float(config.logits_scaling)
            self.scale *= factor if str(config.model_type).startswith("hyperclovax") else 1 / factor
        if getattr(config, "lm_head_multiplier", None):
            self.scale *= float(config.lm_head_multiplier)
        cap = getattr(config, "final_logit_softcapping", None)
        self.softcap = float(cap) if cap else None
        self.vocab = _rows_of(self.linear) or int(config.vocab_size)

    def _plain(self) -> bool:
        """Return True if the head is a plain matrix (not quantised, not wrapped, not hooked)."""
        linear = self.linear
        return (
            type(linear) is nn.Linear
            and linear.weight.is_floating_point()
            and linear.weight.device.type != "meta"
            and not hasattr(linear, "_hf_hook")
            and not linear._forward_hooks
            and not linear._forward_pre_hooks
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V] logits in fp32 (fp64 for an fp64 model), accumulated in that dtype."""
        linear = self.linear
        exact = torch.promote_types(hidden.dtype, torch.float32)
        if not self._plain():
            logits = linear(hidden).to(exact)
        elif linear.weight.dtype == exact:
            logits = F.linear(hidden, linear.weight, linear.bias)
        elif hidden.is_cuda:  # half operands, one reading of the weights, and the accumulator kept as it is
            logits = torch.mm(hidden, linear.weight.t(), out_dtype=exact)
            if linear.bias is not None:
                logits += linear.bias
        else:
            logits = hidden.new_empty((hidden.shape[0], self.vocab), dtype=exact)
            wide = hidden.to(exact)
            step = max(1, CHUNK_ELEMENTS // max(1, hidden.shape[1]))
            for low in range(0, self.vocab, step):  # a slice of the vocabulary in fp32 at a time
                part = slice(low, min(low + step, self.vocab))
                torch.mm(wide, linear.weight[part].to(exact).t(), out=logits[:, part])
            if linear.bias is not None:
                logits += linear.bias.to(exact)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def log_softmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V] log-probabilities, nats, fp32 (fp64 for an fp64 model)."""
        return log_softmax(self.logits(hidden))

    def logprobs(
        self, hidden: torch.Tensor, targets: torch.Tensor, operands: torch.dtype | None = None
    ) -> torch.Tensor:
        """log p(target) of each row.

        Args:
            hidden: [N, D] last hidden rows, in the model's dtype.
            targets: [N] int64 token ids.
            operands: dtype that a plain head's product takes its operands in; None for the model's.

        Returns:
            [N] nats, fp32 (fp64 for an fp64 model).
        """
        if self._plain():
            weight, bias = self.linear.weight, self.linear.bias
            if operands is not None:
                hidden, weight = hidden.to(operands), weight.to(operands)
            return linear_logprob(hidden, weight, targets, bias, self.softcap, self.scale, backend=self.backend)
        rows = max(1, CHUNK_ELEMENTS // self.vocab)
        parts = [hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
        for low in range(0, hidden.shape[0], rows):
            logits = self.logits(hidden[low : low + rows])
            chosen = logits.gather(1, targets[low : low + rows, None]).squeeze(1)
            parts.append(chosen - torch.logsumexp(logits, dim=-1))
        return torch.cat(parts)


def _rows_of(linear: Any) -> int:
    """Rows of an output embedding, 0 where it does not say. Wrappers may pass on the input embedding's out_features."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return weight.shape[0]
    return int(getattr(linear, "out_features", 0) or 0)  # a quantised weight's shape is its storage's
