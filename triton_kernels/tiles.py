"""Tile shapes and work splits: host arithmetic only, no torch, no Triton. docs/kernels.md says where they come from.

Every tile here is compiled ahead of time by the tests for the cards it is meant for, and asserted free of register
spills and within the card's shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MatmulTile:
    """A tile of `m` rows by `v` vocabulary entries, walking the depth by `k`.

    `tma`: operands come through tensor descriptors. `resident`: programs of it that one processor holds at once.
    """

    m: int
    v: int
    k: int
    stages: int
    warps: int
    tma: bool = False
    resident: int = 1


# sm_90 and sm_100, through descriptors. A weight-bound call (few rows) wants bytes in flight, a compute-bound one a
# wide tile; a bias or a cap needs registers that 128 x 256 has not left on Triton 3.6 and 3.7.
HOPPER_FEW = MatmulTile(64, 128, 64, stages=4, warps=4, tma=True, resident=2)
HOPPER_MANY = MatmulTile(128, 128, 64, stages=4, warps=8, tma=True)
HOPPER_PLAIN = MatmulTile(128, 256, 64, stages=4, warps=8, tma=True)
HOPPER_GRADIENT = MatmulTile(128, 128, 64, stages=3, warps=8, tma=True)
# Any card from sm_80 on, through pointers; within the 99 KiB of shared memory of sm_86, sm_89 and sm_120.
POINTER_FEW = MatmulTile(16, 128, 64, stages=4, warps=4)
POINTER_SOME = MatmulTile(64, 128, 32, stages=4, warps=4, resident=2)
POINTER_MANY = MatmulTile(128, 128, 32, stages=4, warps=8)
# fp32 operands are multiplied exactly (no tf32), without tensor cores; four warps spill on sm_90 with bias and cap.
FULL = MatmulTile(64, 64, 16, stages=3, warps=8, resident=2)
INTERPRETER = MatmulTile(16, 32, 32, stages=1, warps=1)


def matmul_tile(
    *, capability: tuple[int, int], rows: int, half: bool, tma: bool, plain: bool, gradient: bool = False
) -> MatmulTile:
    """The tile of one launch.

    Args:
        capability: of the card; (0, 0) is Triton's interpreter.
        rows: N.
        half: whether the operands are float16 or bfloat16.
        tma: whether both operands can be described to the TMA unit (aligned base and row stride).
        plain: no bias and no cap.
        gradient: for the backward pass's kernel, which keeps more in registers.
    """
    if capability == (0, 0):
        return replace(INTERPRETER, tma=tma)
    if not half:
        return FULL
    if tma and capability[0] in (9, 10):
        if rows <= 64:
            return HOPPER_FEW
        if gradient:
            return HOPPER_GRADIENT
        return HOPPER_PLAIN if plain and capability[0] == 9 else HOPPER_MANY
    if rows <= 16:
        return POINTER_FEW
    return POINTER_SOME if rows <= 64 else POINTER_MANY


def matmul_splits(rows: int, vocabulary: int, tile: MatmulTile, slots: int) -> int:
    """Return how many programs share each row tile's vocabulary: the least time of (waves x tiles a program walks).

    Args:
        rows, vocabulary: N and V.
        tile: the tile.
        slots: programs that the device (or this launch's share of it) holds at once.
    """
    row_tiles, tiles = -(-max(rows, 1) // tile.m), -(-vocabulary // tile.v)

    def cost(splits: int) -> int:  # one more tile stands for a program's prologue and its partials
        return -(-row_tiles * splits // slots) * (-(-tiles // splits) + 1)

    return min(range(1, min(tiles, max(slots // row_tiles, 1) * 4) + 1), key=cost)


# ------------------------------------------------------------------------------------------------------ attention


MAX_HEAD_DIM = 256
# FLOP per byte below which a pass over a shared prefix is bound by reading it (H100: 266 measured, H200: 183): L new
# tokens of G query heads a KV head bring L * G, and more rows than one then gain by reading it together.
PREFIX_RIDGE = 183
# Below this many keys the second pass and the merge cost more than the reading they save.
PREFIX_LEAST = 512
# Keys of a shared prefix that one program walks at most, until there are MOST_SPLITS of them.
PREFIX_SHARE = 512
MOST_SPLITS = 64


@dataclass(frozen=True)
class AttentionTile:
    """`m` packed (token, query head) rows against `n` keys at a time; `resident` programs fit a processor at once."""

    m: int
    n: int
    stages: int
    warps: int
    resident: int = 1


INTERPRETER_ATTENTION = AttentionTile(16, 16, stages=1, warps=1, resident=2)


@dataclass(frozen=True)
class AttentionSchedule:
    """One call: a pass over each row's keys in `splits` shares and, with `prefix_splits` above 0, one over prefixes."""

    tile: AttentionTile
    query_tiles: int
    splits: int
    prefix_tile: AttentionTile
    prefix_query_tiles: int = 0
    prefix_splits: int = 0


def padded(dim: int) -> int:
    """A head dimension as a block: the next power of two, at least 16 (what a tensor-core product takes)."""
    return max(16, 1 << (dim - 1).bit_length())


def attention_tile(*, capability: tuple[int, int], half: bool, packed: int, head_dim: int) -> AttentionTile:
    """The tile for `packed` = new tokens x query heads a KV head, at a head dimension of `head_dim`."""
    wide = padded(head_dim) > 128
    if capability == (0, 0):
        return INTERPRETER_ATTENTION
    if not half:
        return AttentionTile(16, 16, stages=3, warps=8)  # four warps spill on sm_90
    if packed <= 16:
        resident = 1 if capability[0] == 8 else 2 if wide else 3
        return AttentionTile(16, 32 if wide else 64, stages=3, warps=4, resident=resident)
    if capability[0] == 9:  # 64 rows a warp group: wgmma
        if wide:
            return AttentionTile(64, 32, stages=3, warps=8)
        if packed <= 64:
            return AttentionTile(64, 32, stages=3, warps=4, resident=2)
        return AttentionTile(128, 64, stages=3, warps=8)
    return AttentionTile(32, 16, stages=3, warps=4) if wide else AttentionTile(64, 64, stages=3, warps=8)


def prefix_pays(*, max_new: int, group: int, rows: int, groups: int, max_prefix: int) -> bool:
    """Return True if reading shared prefixes once is worth a pass of its own: see PREFIX_RIDGE and docs/kernels.md."""
    return 0 < groups < rows and max_prefix >= PREFIX_LEAST and max_new * group < PREFIX_RIDGE


def attention_schedule(
    *,
    capability: tuple[int, int],
    slots: int,
    half: bool,
    rows: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    max_new: int,
    max_path: int,
    groups: int = 0,
    max_group_tokens: int = 0,
    max_prefix: int = 0,
) -> AttentionSchedule:
    """Tiles and splits of one call, from host-known sizes only (`slots`: the device's processors)."""

    def pass_of(packed: int, segments: int, keys: int, least: int = 1) -> tuple[AttentionTile, int, int]:
        tile = attention_tile(capability=capability, half=half, packed=packed, head_dim=head_dim)
        query_tiles = max(-(-packed // tile.m), 1)
        room = tile.resident * slots // max(query_tiles * segments * kv_heads, 1)
        # A share of fewer than four key tiles is not worth its partial result.
        return tile, query_tiles, max(min(max(room, least), -(-keys // (4 * tile.n)), MOST_SPLITS), 1)

    shared = prefix_pays(max_new=max_new, group=group, rows=rows, groups=groups, max_prefix=max_prefix)
    tile, query_tiles, splits = pass_of(max_new * group, rows, max_path - (max_prefix if shared else 0))
    if not shared:
        return AttentionSchedule(tile, query_tiles, splits, tile)
    # `groups` may be an upper bound (a captured graph serves any number of families), so it must not keep one family's
    # long prefix in one piece. Programs of families that there are not, and of prefixes that are shorter, end at once.
    least = -(-max_prefix // PREFIX_SHARE)
    return AttentionSchedule(tile, query_tiles, splits, *pass_of(max_group_tokens * group, groups, max_prefix, least))


# ------------------------------------------------------------------------------------------------------- row-wise


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def row_splits(rows: int, width: int, slots: int, block: int) -> tuple[int, int]:
    """(splits, columns a split) of a row-wise reduction: about eight programs a processor, whole blocks, at most 64."""
    blocks = -(-width // block)
    splits = max(1, min(8 * slots // max(rows, 1), blocks, 64))
    share = -(-blocks // splits)
    return -(-blocks // share), share * block
