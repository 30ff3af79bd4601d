"""Records of one call of an op: the public op makes them after its checks, and all that follows takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SharedPrefix(NamedTuple):
    """Groups of neighbouring rows whose paths begin with the same slots: a hint, which changes speed and no result.

    Fields: `group_rows` int32 `[groups + 1]`, the first row of each group, from 0 to B; `lengths` int32 `[B]`, how many
    leading slots row b shares with its whole group (equal within a group, at most path minus new tokens; 0 for none);
    `max_group_tokens`, `max_length`: host ints, the most new tokens of a group and the longest prefix.
    """

    group_rows: Tensor
    lengths: Tensor
    max_group_tokens: int
    max_length: int


class HeadCall(NamedTuple):
    """`linear_logprob`'s operands, in the order of its arguments. A chunk of a head is a call of its own."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def plain(self) -> bool:
        """Return True if the head is a product and a factor above 0, so that products have the order of logits."""
        return self.bias is None and self.softcap is None and self.scale > 0

    def columns(self, start: int, stop: int) -> HeadCall:
        """The call for the vocabulary entries [start, stop) alone. Targets keep counting from the first of all."""
        bias = None if self.bias is None else self.bias[start:stop]
        return self._replace(weight=self.weight[start:stop], bias=bias)


class AttentionCall(NamedTuple):
    """`tree_attention`'s operands, in the order of its arguments."""

    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    slot_table: Tensor
    path_lens: Tensor
    q_starts: Tensor
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    max_new: int | None = None
    max_path: int | None = None
    prefix: SharedPrefix | None = None

    @property
    def tokens(self) -> int:
        return self.q.shape[0]

    @property
    def rows(self) -> int:
        return self.path_lens.shape[0]

    @property
    def longest_new(self) -> int:
        """New tokens of any row at most."""
        return self.tokens if self.max_new is None else min(self.max_new, self.tokens)

    @property
    def longest_path(self) -> int:
        """Slots of any path at most."""
        return self.slot_table.shape[1] if self.max_path is None else min(self.max_path, self.slot_table.shape[1])
