"""ReplayPolicy: a policy that draws what a recording has. No model, no torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from os import PathLike

from ..drawing import Draw, nodes_of
from ..policy import PolicyBase
from ..prompt import Prompt
from ..recording import Draws, Recording
from ..sampling import Request
from ..tree import Node, SearchTree


class ReplayPolicy(PolicyBase):
    """A policy without a model: it answers from a recording, token by token, what was drawn there.

    Other strategies, step rules, budgets, values and selections ask it as they ask a model, where they need no draw
    that was not made. Any other is refused. Log-probabilities are the recorded ones; a live scorer can score the draws.

    Args:
        recording: a Recording, or its file.

    Raises:
        OSError, ValueError: see Recording. Draws raise NotRecorded, a ValueError.
    """

    takes_stop = True

    def __init__(self, recording: Recording | str | PathLike[str]) -> None:
        self.recording = recording if isinstance(recording, Recording) else Recording(recording)
        self._requests: list[Request] = []

    @property
    def id(self) -> Hashable:
        """Id of the recorded policy: its file's."""
        return ("replay", str(self.recording.path))

    def session(self) -> ReplayPolicy:
        """The same recording for one more loop."""
        return ReplayPolicy(self.recording)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a recorded prompt. Raises NotRecorded."""
        return self.recording.encode(prompt)

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests on."""
        self._requests += requests

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """Answer all requests. Raises NotRecorded for a draw that was not made."""
        waiting, self._requests = self._requests, []
        return [(request, self._drawn(request)) for request in waiting]

    def interrupt(self, request: Request) -> list[Node]:
        """End a request now: nothing of it has been drawn."""
        self._requests.remove(request)
        return []

    def release(self, tree: SearchTree) -> None:
        """Forget a tree's requests."""
        self._requests = [request for request in self._requests if request.node.tree is not tree]

    def _drawn(self, request: Request) -> list[Node]:
        children = Draw.of(request, _Bytes(self.recording), self.recording.stop_ids)
        start = self.recording.draws(request.node, request.sampling)
        for child in children:
            self._follow(child, start)
        return [nodes[-1] for _, nodes in nodes_of(request, children, self.id)]

    def _follow(self, child: Draw, draws: Draws) -> None:
        unsure = child.request.sampling.steps.confidence is not None
        while not child.done:
            drawn = draws.tokens.get(child.lineage)
            if drawn is None or child.request.ranked or unsure:
                written = child.tokens.text_bytes(token for segment in child.chain for token in segment.token_ids)
                raise self.recording.missing(child.request.node, written.decode("utf-8", "replace"))
            token, logprob, confidence = drawn
            child.take(token, logprob, confidence)
            draws = draws.after[token]


class _Bytes:
    """The recorded bytes of token ids, as Draw asks for them."""

    def __init__(self, recording: Recording) -> None:
        self.piece, self.special = recording.pieces.piece, recording.special

    def text_bytes(self, ids: Iterable[int], /) -> bytes:
        """Bytes of the text that these tokens add, without special tokens."""
        return b"".join(self.piece(token) for token in ids if token not in self.special)
