"""The work of a call, cut into forwards that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .kv_tree import Branch


@dataclass
class Piece:
    """Own tokens [begin, end) of a branch, to be encoded."""

    branch: Branch
    begin: int
    end: int

    def ids(self) -> list[int]:
        """Return its tokens."""
        return self.branch.token_ids[self.begin : self.end]


def missing(branch: Branch) -> list[Piece]:
    """Return what has to be encoded so that the whole path is resident and its last hidden row known, root first."""
    if branch.row() is not None:
        return []
    pieces: list[Piece] = []
    need = len(branch.token_ids)
    tip: Branch | None = branch
    while tip is not None:
        if tip.encoded < need:
            pieces.append(Piece(tip, tip.encoded, need))
        if tip.encoded:
            break  # what is resident stands on resident ancestors
        need = tip.start - (tip.parent.start if tip.parent is not None else 0)
        tip = tip.parent
    pieces.reverse()
    return pieces


def whole(branch: Branch) -> bool:
    """Return True if the whole path is resident, and its last hidden row known."""
    need, tip = len(branch.token_ids), branch
    while tip.encoded < need or not tip.encoded:
        if tip.encoded < need or tip.parent is None:
            return False
        need, tip = tip.start - tip.parent.start, tip.parent
    return branch.row() is not None


@dataclass
class Batch:
    """Branches that are encoded together, and what that takes.

    Attributes:
        branches: how many of the pending branches, from the first.
        pieces: what to encode, ancestors first.
        path: every branch on their paths, to be pinned meanwhile, with how many of its own tokens the paths take in.
    """

    branches: int
    pieces: list[Piece]
    path: list[tuple[Branch, int]]


def next_batch(pending: Sequence[Branch], capacity: int, free: int, limit: int) -> Batch:
    """As many of the pending branches as fit together, but at least one.

    Args:
        pending: branches with something missing.
        capacity: KV slots for what is resident on their paths and what is new.
        free: slots that are free: as long as they suffice nothing is evicted, and nothing needs a pin.
        limit: new tokens.
    """
    if sum(len(branch.token_ids) - branch.encoded for branch in pending) <= limit:
        every: dict[int, Piece] = {}
        for branch in pending:
            for part in missing(branch):
                known = every.get(id(part.branch))
                every[id(part.branch)] = part if known is None or known.end < part.end else known
        if sum(piece.end - piece.begin for piece in every.values()) <= min(free, limit):
            return Batch(len(pending), list(every.values()), [])
    pieces: dict[int, Piece] = {}
    path: dict[int, tuple[Branch, int]] = {}
    tokens = held = taken = 0
    for branch in pending:
        parts = missing(branch)
        cost = sum(max(0, part.end - max(part.begin, _end(pieces, part.branch))) for part in parts)
        hold = sum(b.encoded for b in branch.lineage() if id(b) not in path)
        if taken and (held + hold + tokens + cost > capacity or tokens + cost > limit):
            break
        for part in parts:
            end = max(part.end, _end(pieces, part.branch))
            pieces[id(part.branch)] = Piece(part.branch, part.begin, end)
        own = len(branch.token_ids)
        for b in branch.lineage():
            path[id(b)] = b, max(own, path[id(b)][1] if id(b) in path else 0)
            own = b.start - (b.parent.start if b.parent is not None else 0)
        tokens, held, taken = tokens + cost, held + hold, taken + 1
    return Batch(taken, list(pieces.values()), list(path.values()))


def _end(pieces: dict[int, Piece], branch: Branch) -> int:
    return pieces[id(branch)].end if id(branch) in pieces else 0


def split(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """Cut pieces into runs of at most `limit` tokens, in order."""
    waves: list[list[Piece]] = [[]]
    room = limit
    for piece in pieces:
        begin = piece.begin
        while begin < piece.end:
            if room == 0:
                waves.append([])
                room = limit
            end = min(piece.end, begin + room)
            waves[-1].append(Piece(piece.branch, begin, end))
            room -= end - begin
            begin = end
    return waves


def chains(wave: Sequence[Piece]) -> list[list[int]]:
    """Pieces that follow one another on one path, joined into runs of new tokens without a gap."""
    tips: dict[int, list[int]] = {}  # id of the branch at a run's end -> the run
    joined: list[list[int]] = []
    for i, piece in enumerate(wave):
        parent = piece.branch.parent
        run = tips.pop(id(parent), None) if parent is not None and piece.begin == 0 else None
        if run is not None and wave[run[-1]].branch.start + wave[run[-1]].end == piece.branch.start:
            run.append(i)
        else:
            if run is not None:
                tips[id(parent)] = run
            run = [i]
            joined.append(run)
        tips[id(piece.branch)] = run
    return joined


def stem_of(branch: Branch) -> int:
    """Equal for branches that leave one parent at one place: their paths begin with the same `branch.start` slots."""
    return id(branch) if branch.parent is None else hash((id(branch.parent), branch.start))
