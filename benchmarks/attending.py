"""Cases of tree_attention and write_kv: branches behind one prompt, against SDPA over copies of their KV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from cases import Case, Way
from common import Machine
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from prm_search.triton_kernels import SharedPrefix, choice, tree_attention, write_kv

CHECKED = 2  # rows compared with float64


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads, head dimension."""

    query: int
    kv: int
    width: int


HEADS = {"qwen": Heads(28, 4, 128), "llama": Heads(32, 8, 128), "small": Heads(8, 2, 64)}


@dataclass
class Branches:
    """`rows` paths of a `prompt` that all share and `own` tokens each; `new` more tokens of each attend."""

    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    table: Tensor
    path_lens: Tensor
    q_starts: Tensor
    prefix: SharedPrefix
    new: int
    mask: Tensor | None  # for SDPA: causal, the last query at the last key

    @classmethod
    def draw(cls, machine: Machine, heads: Heads, prompt: int, own: int, rows: int, new: int) -> Branches:
        """Slots as a search hands them out: the prompt's in a run, then step by step, in each step row by row."""
        if own % new:
            raise ValueError(f"own={own} must be a multiple of new={new}")
        draw = torch.Generator(machine.device).manual_seed(0)
        normal = lambda *size: torch.randn(*size, generator=draw, device=machine.device).to(machine.dtype)  # noqa: E731
        steps = own // new + 1
        slots = prompt + torch.arange(steps * rows * new).view(steps, rows, new).transpose(0, 1).reshape(rows, -1)
        table = torch.cat([torch.arange(prompt).expand(rows, -1), slots], 1)
        ints = lambda values: torch.tensor(values, dtype=torch.int32, device=machine.device)  # noqa: E731
        held = prompt + rows * (own + new)
        return cls(
            normal(rows * new, heads.query, heads.width),
            normal(held, heads.kv, heads.width),
            normal(held, heads.kv, heads.width),
            table.to(machine.device, torch.int32),
            ints([prompt + own + new] * rows),
            ints([row * new for row in range(rows + 1)]),
            SharedPrefix(ints([0, rows]), ints([prompt] * rows), rows * new, prompt),
            new,
            None if new == 1 else causal_lower_right(new, table.shape[1]),
        )

    def ours(self, prefix: bool) -> Tensor:
        return tree_attention(
            self.q, self.k_pool, self.v_pool, slot_table=self.table, path_lens=self.path_lens, q_starts=self.q_starts,
            scale=self.q.shape[2] ** -0.5, max_new=self.new, max_path=self.table.shape[1],
            prefix=self.prefix if prefix else None,
        )  # fmt: skip

    def copies(self, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """K and V `[rows, Hkv, S, D]`, each row's its own: what a cache without sharing holds."""
        slots = self.table[:rows].long()
        return self.k_pool[slots].transpose(1, 2), self.v_pool[slots].transpose(1, 2)

    def sdpa(self, keys: Tensor, values: Tensor) -> Tensor:
        """PyTorch's attention over copies; all rows are of one length, so it needs no padding."""
        rows, new = keys.shape[0], self.new
        q = self.q[: rows * new].view(rows, new, *self.q.shape[1:]).transpose(1, 2)
        out = scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(rows * new, *self.q.shape[1:])

    def exact(self) -> Tensor:
        """The first CHECKED rows, in float64, with the mask written out."""
        keys, values = (part.double() for part in self.copies(CHECKED))
        rows, kv, length, _ = keys.shape
        q = self.q[: rows * self.new].double().view(rows, self.new, kv, -1, self.q.shape[2])
        scores = torch.einsum("blhgd,bhsd->bhgls", q, keys) * self.q.shape[2] ** -0.5
        last = length - self.new + torch.arange(self.new, device=keys.device)
        hidden = torch.arange(length, device=keys.device) > last[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bhgls,bhsd->blhgd", weights, values).reshape(rows * self.new, -1, values.shape[3])


def attention_case(machine: Machine, heads: str, prompt: int, own: int, rows: int, new: int) -> Case:
    """tree_attention. `sdpa_copies` finds its copies made, as a cache per branch does; `sdpa_gathered` makes them."""
    sizes = HEADS[heads]
    work = Branches.draw(machine, sizes, prompt, own, rows, new)
    keys, values = (part.contiguous() for part in work.copies())
    ways: dict[str, Way] = {
        "ours": lambda: work.ours(prefix=True),
        "ours_prefix_not_told": lambda: work.ours(prefix=False),
        "sdpa_copies": lambda: work.sdpa(keys, values),
        "sdpa_gathered": lambda: work.sdpa(*work.copies()),
    }
    plan = choice(
        tree_attention, work.q, work.k_pool, work.v_pool, slot_table=work.table, path_lens=work.path_lens,
        q_starts=work.q_starts, scale=sizes.width**-0.5, max_new=new, max_path=work.table.shape[1], prefix=work.prefix,
    )  # fmt: skip
    visible = rows * new * (prompt + own) + rows * new * (new + 1) / 2
    pool, copied = 2 * work.k_pool.nbytes, 2 * keys.nbytes
    return Case(
        "tree_attention",
        {"Hq": sizes.query, "Hkv": sizes.kv, "Dk": sizes.width, "P": prompt, "own": own, "N": rows, "L": new},
        {**ways},
        plan,
        exact=work.exact,
        checked=lambda result: result[: CHECKED * new],
        flop=4.0 * sizes.query * sizes.width * visible,
        size=pool + 2.0 * work.q.nbytes,
        notes={"kv_bytes": {"shared": pool, "copies": copied}},
    )


def write_case(machine: Machine, heads: str, tokens: int, held: int) -> Case:
    """write_kv of one layer against two indexed assignments; every way has pools of its own, to be checked."""
    sizes = HEADS[heads]
    draw = torch.Generator(machine.device).manual_seed(0)
    k_new, v_new = (
        torch.randn(tokens, sizes.kv, sizes.width, generator=draw, device=machine.device).to(machine.dtype)
        for _ in range(2)
    )
    slots = torch.randperm(held, generator=draw, device=machine.device)[:tokens]
    ours, theirs = (torch.zeros(2, held, sizes.kv, sizes.width).to(k_new) for _ in range(2))

    def indexed() -> Tensor:
        theirs[0][slots], theirs[1][slots] = k_new, v_new
        return theirs

    def written() -> Tensor:
        write_kv(ours[0], ours[1], k_new, v_new, slots)
        return ours

    return Case(
        "write_kv",
        {"Hkv": sizes.kv, "Dk": sizes.width, "T": tokens},
        {"ours": written, "indexed": indexed},
        choice(write_kv, ours[0], ours[1], k_new, v_new, slots),
        exact=lambda: torch.stack([k_new, v_new]).double(),
        checked=lambda pools: pools[:, slots],
        flop=0.0,
        size=4.0 * k_new.nbytes + slots.nbytes,
    )


def cases(machine: Machine, quick: bool) -> Iterator[Case]:
    """(prompt, own, rows, new): decoding of one token and of short steps, and steps of 64 and 100 tokens."""
    if quick:
        shapes, writes = {"small": [(64, 16, 4, 8), (64, 16, 4, 1)]}, [("small", 32, 256)]
    elif machine.device == "cpu":
        shapes = {"small": [(512, 32, 16, 1), (512, 128, 16, 8), (512, 640, 16, 64)]}
        writes = [("small", 1024, 8192)]
    else:
        every = [(512, 32, 64, 1), (512, 128, 16, 8), (16384, 320, 16, 16), (512, 640, 16, 64), (4096, 1000, 16, 100)]
        shapes = {"qwen": every, "llama": every}
        writes = [("qwen", 64, 65536), ("qwen", 1024, 65536), ("llama", 1024, 65536)]
    for heads, lines in shapes.items():
        yield from (attention_case(machine, heads, *line) for line in lines)
    yield from (write_case(machine, *line) for line in writes)
