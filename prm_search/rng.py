"""Counter-based random numbers: a draw depends on what it is for, never on when it happens or beside what.

A uniform number is a function of (seed, prompt stream, lineage, response position) through Philox 4x32-10 (Salmon et
al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). So the make-up and the order of a batch change nothing. A
child that inherits its parent's lineage draws what an uninterrupted sample would have drawn.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def _hash64(*integers: int) -> int:
    packed = struct.pack(f"<{len(integers)}Q", *(w & 0xFFFFFFFFFFFFFFFF for w in integers))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def stream(prompt_ids: Sequence[int], occurrence: int = 0) -> int:
    """64-bit id of a prompt's random stream. Equal prompts differ by their occurrence (0 for the first)."""
    return _hash64(occurrence, len(prompt_ids), *prompt_ids)


def child_lineage(lineage: int, position: int, index: int) -> int:
    """Lineage of the index-th child drawn after `position` response tokens: the 0th goes on in its parent's."""
    return lineage if index == 0 else _hash64(lineage, position, index)


def strategy_lineage(purpose: int) -> int:
    """Lineage of the numbers that a strategy draws for itself (resampling, Thompson sampling), one a purpose.

    It is a hash of words that no child's lineage is a hash of, so a strategy's numbers are independent of its samples'.
    """
    return _hash64(0x73747261, purpose, 0x74656779, 4)


def strategy_uniforms(seed: int, stream: int, purpose: int, first: int, n: int) -> np.ndarray:
    """Numbers `first` to `first + n - 1` of a strategy's own sequence: [n] float64 in [0, 1).

    Args:
        seed, stream: of the search and its tree.
        purpose: which sequence.
        first: how many of it have been used.
        n: how many are wanted.
    """
    return uniforms([seed] * n, [stream] * n, [strategy_lineage(purpose)] * n, range(first, first + n))


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox 4x32-10, vectorised.

    Args:
        counter: [N, 4] uint32.
        key: [N, 2] uint32.

    Returns:
        [N, 4] uint32 random words.
    """
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = key[:, 0].astype(np.uint64), key[:, 1].astype(np.uint64)
    for _ in range(10):
        p0, p1 = _M0 * c[0], _M1 * c[2]
        c = [(p1 >> _SHIFT) ^ c[1] ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c[3] ^ k1, p0 & _LOW]
        k0, k1 = (k0 + np.uint64(_W0)) & _LOW, (k1 + np.uint64(_W1)) & _LOW
    return np.stack(c, axis=1).astype(np.uint32)


def counters_of(
    seeds: Sequence[int], streams: Sequence[int], lineages: Sequence[int], positions: Sequence[int]
) -> np.ndarray:
    """The counters behind uniform numbers, one a row: [N, 3] int64 of key, lineage and position, as bits.

    Args: see `uniforms`.
    """
    key = [_hash64(seed, stream) for seed, stream in zip(seeds, streams, strict=True)]
    line = [lineage & 0xFFFFFFFFFFFFFFFF for lineage in lineages]
    table = np.array([key, line, [0] * len(key)], dtype=np.uint64).T.astype(np.int64, order="C")
    table[:, 2] = positions
    return table


def uniforms_at(counters: np.ndarray) -> np.ndarray:
    """The uniform numbers of counters: [N] float64 in [0, 1), multiples of 2**-53.

    Args:
        counters: [N, 3], see `counters_of`.
    """
    bits = counters.astype(np.uint64)
    counter = np.zeros((len(bits), 4), np.uint32)
    counter[:, 0], counter[:, 1], counter[:, 2] = bits[:, 1] & _LOW, bits[:, 1] >> _SHIFT, bits[:, 2] & _LOW
    key = np.stack([bits[:, 0] & _LOW, bits[:, 0] >> _SHIFT], axis=1).astype(np.uint32)
    random_words = philox(counter, key).astype(np.uint64)
    mantissa = ((random_words[:, 0] << _SHIFT) | random_words[:, 1]) >> np.uint64(11)
    return mantissa.astype(np.float64) * 2.0**-53


def uniforms(
    seeds: Sequence[int], streams: Sequence[int], lineages: Sequence[int], positions: Sequence[int]
) -> np.ndarray:
    """One uniform number in [0, 1) a row.

    Args:
        seeds, streams, lineages: 64-bit integers, one a row.
        positions: response position of the token to draw, one a row.

    Returns:
        [N] float64, multiples of 2**-53.
    """
    return uniforms_at(counters_of(seeds, streams, lineages, positions))
