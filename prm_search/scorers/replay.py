"""ReplayScorer: the rewards that a recording has. No model, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from ..protocols import ScorerDefaults
from ..recording import Recording
from ..tree import Node


class ReplayScorer(ScorerDefaults):
    """The recorded rewards of one scorer.

    Args:
        recording: a Recording, or its file.
        name: the scorer's; None for the only one.

    Raises:
        OSError, ValueError: see Recording; or it has no such scorer. Scoring raises NotRecorded, a ValueError.
    """

    def __init__(self, recording: Recording | str | PathLike[str], name: str | None = None) -> None:
        self.recording = recording if isinstance(recording, Recording) else Recording(recording)
        known = self.recording.scorers
        if name is None and len(known) == 1:
            name = next(iter(known))
        if name not in known:
            raise ValueError(f"name={name!r}: the scorers of {self.recording.path} are {sorted(known)}")
        self.name = str(name)
        self.default_value = known[self.name]

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Give nodes and their ancestors the recorded rewards. Raises NotRecorded."""
        for node in nodes:
            for step in node.path():
                if not step.scored_by(self.name):
                    recorded = self.recording.reward(self.name, step)
                    step.set_rewards(self.name, recorded.token_rewards, recorded.reward, recorded.token_ids)
