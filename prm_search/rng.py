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
    rows = len(positions)
    key64 = np.array([_hash64(seed, s) for seed, s in zip(seeds, streams, strict=True)], dtype=np.uint64)
    line = np.array([x & 0xFFFFFFFFFFFFFFFF for x in lineages], dtype=np.uint64)
    counter = np.zeros((rows, 4), np.uint32)
    counter[:, 0], counter[:, 1] = line & _LOW, line >> _SHIFT
    counter[:, 2] = np.asarray(positions, dtype=np.uint32)
    key = np.stack([key64 & _LOW, key64 >> _SHIFT], axis=1).astype(np.uint32)
    random_words = philox(counter, key).astype(np.uint64)
    bits = ((random_words[:, 0] << _SHIFT) | random_words[:, 1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
