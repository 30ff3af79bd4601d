"""Children while a server draws them, and the readers that turn its chunks into their tokens."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from ...drawing import Draw
from ...policy import RequestFailed
from ...tokens import TokenText
from .aligned import Piece, TokenAligner, spread
from .client import Delta, ServerToken
from .vocabulary import EOS, TextVocabulary

WRONG_COUNT = "a server's count of tokens was impossible: the pieces in which its text came are counted instead"


@dataclass(eq=False)
class EndpointRow(Draw):
    """One child being drawn.

    Attributes:
        dropped: tokens that the server drew and that are no part of it: beyond its end, or of a try that was cut.
        notes: what a reader of its counts should know.
    """

    dropped: int = 0
    notes: tuple[str, ...] = ()

    @property
    def sampled(self) -> int:
        """Tokens that the server drew for it, as far as they came here."""
        return self.drawn + self.dropped

    @property
    def in_step(self) -> int:
        """Tokens of the step under way."""
        return 0 if self.fresh else len(self.chain[-1].token_ids)

    def put(self, token: int, known: ServerToken, *, stop: bool = False) -> None:
        """Take the next token, if it is a part of the child.

        Raises:
            RequestFailed: the step rule needs the likeliest token's probability, and the server does not tell it.
        """
        sampling = self.request.sampling
        if not self.done and sampling.steps.confidence is not None:
            top = known.logprob if sampling.steps.confidence_of == "drawn" else known.tops[0][1] if known.tops else None
            if top is None or math.isnan(known.logprob):
                raise RequestFailed("StepRule(confidence=...) needs log-probabilities, and the server tells none")
            self.cut_before(math.exp(top), math.exp(known.logprob))
        if self.done:
            self.dropped += 1
        else:
            self.take(token, known.logprob, known.confidence(sampling.confidence_tokens), stop=stop)

    def mark(self) -> EndpointRow:
        """The state, for `reset`."""
        twin = copy.copy(self)
        twin.chain = copy.deepcopy(self.chain)
        twin.matcher = self.matcher.copy()
        twin.stops = None if self.stops is None else self.stops.copy()
        return twin

    def reset(self, state: EndpointRow) -> None:
        """Go back to a state that `mark` gave, which can be gone back to again; what was drawn since is dropped."""
        self.dropped += self.drawn - state.drawn
        fresh = state.mark()
        self.chain, self.fresh, self.matcher, self.stops = fresh.chain, fresh.fresh, fresh.matcher, fresh.stops
        self.drawn, self.left = fresh.drawn, fresh.left

    def forget_unknown(self) -> None:
        """Leave steps without log-probabilities, or confidences, where the server did not tell one of them."""
        for segment in self.chain:
            if any(map(math.isnan, segment.logprobs)):
                segment.logprobs = []
            if len(segment.confidences) < len(segment.token_ids):
                segment.confidences = []


class Reader(ABC):
    """Reads one choice of one HTTP request as the tokens of a row.

    Args:
        row: the child.
        limit: tokens asked for.

    Attributes:
        ended: the server has said why the choice ended.
        again: the server ended it where the child does not end: another request goes on from here.
    """

    def __init__(self, row: EndpointRow, limit: int) -> None:
        self.row, self.limit = row, limit
        self.ended = self.again = False
        self.finish: str | None = None
        self.named: str | None = None
        self._before = row.drawn + row.dropped

    @property
    def ready(self) -> bool:
        """Return True if nothing further is wanted of the server."""
        return self.row.done

    @property
    def natural(self) -> bool:
        """Return True if the model ended its answer."""
        return self.finish == "stop" and self.named is None

    def read(self, delta: Delta) -> None:
        """Take what a chunk adds."""
        if self.ended:
            return
        if delta.finish is not None:
            self.finish = delta.finish
            self.named = delta.stop_reason if isinstance(delta.stop_reason, str) else None
        self._take(delta)
        self.ended = delta.finish is not None

    @abstractmethod
    def _take(self, delta: Delta) -> None:
        """Feed the row."""

    @abstractmethod
    def _close(self, counted: int | None) -> None:
        """Feed the rest, the end of sequence included."""

    def close(self, counted: int | None) -> None:
        """Settle what the end of the choice means for the row.

        Args:
            counted: its tokens as the server counts them; None where it does not.

        Raises:
            RequestFailed: the choice ended in a way that no child does, or brought nothing.
        """
        self._close(counted)
        row = self.row
        if row.done:
            return
        if self.finish not in ("stop", "length"):
            raise RequestFailed(f"the server ended an answer with finish_reason {self.finish!r}")
        if self.finish == "stop" and self.named is not None:
            self.again = True
        elif not row.chain:
            raise RequestFailed(f"the server ended an answer ({self.finish}) before its first token")
        else:
            row.interrupt(self.finish)  # "length": of its context, since our own limits have not been reached
        if self.again and row.drawn + row.dropped == self._before:
            raise RequestFailed("the server drew nothing: it ended at a stop string at once")

    def abort(self) -> None:  # noqa: B027  # most have fed what came as it came
        """Feed what has come, since nothing more will."""


class IdReader(Reader):
    """Reads token ids."""

    def _take(self, delta: Delta) -> None:
        ids = delta.token_ids or ()
        tokens = delta.tokens or ()
        if len(tokens) != len(ids):
            tokens = tuple(ServerToken(None) for _ in ids)
        for place, (token, known) in enumerate(zip(ids, tokens, strict=True), start=1):
            self.row.put(token, known, stop=self.natural and place == len(ids))

    def _close(self, counted: int | None) -> None:
        if self.natural and not self.row.chain and self.row.stop_ids:  # an empty answer, whose end is not told
            self.row.put(min(self.row.stop_ids), ServerToken(None))


class _TextReader(Reader):
    """The common part of readers of text.

    Args:
        row, limit: see Reader.
        vocabulary: numbers the pieces.
        skip: text that the row has and the server's template has dropped: where its answer repeats it, that is
            dropped.
        kept: stop strings are part of the server's text.
    """

    def __init__(self, row: EndpointRow, limit: int, vocabulary: TextVocabulary, skip: bytes, kept: bool) -> None:
        super().__init__(row, limit)
        self._vocabulary, self._skip, self._kept = vocabulary, skip, kept

    def _put(self, pieces: list[Piece]) -> None:
        for data, token in pieces:
            same = 0
            while same < min(len(data), len(self._skip)) and data[same] == self._skip[same]:
                same += 1
            data, self._skip = data[same:], self._skip[same:] if same == len(data) else b""
            if same and not data:
                self.row.dropped += 1
            else:
                self.row.put(self._vocabulary.id_of(data), token)

    def _end_of_sequence(self, token: ServerToken) -> None:
        if self.natural and not self.row.done:
            self.row.put(EOS, token)


class TokenReader(_TextReader):
    """Reads text with its tokens."""

    def __init__(self, row: EndpointRow, limit: int, vocabulary: TextVocabulary, skip: bytes, kept: bool) -> None:
        super().__init__(row, limit, vocabulary, skip, kept)
        self._aligner = TokenAligner()
        self._empty: list[Piece] = []  # at the end of what came: one of them may be the end of sequence

    def _take(self, delta: Delta) -> None:
        text = delta.text
        if self.finish == "stop" and self.named is not None and not self._kept:
            text += self.named
        self._aligner.feed(text, delta.tokens or ())
        self._settle(self._aligner.take())

    def _settle(self, pieces: list[Piece]) -> None:
        pieces = self._empty + pieces
        full = next((place for place in range(len(pieces), 0, -1) if pieces[place - 1][0]), 0)
        self._empty = pieces[full:]
        self._put(pieces[:full])

    def _close(self, counted: int | None) -> None:
        self._settle(self._aligner.take(last=True))
        eos = ServerToken(None)
        if self.natural and self._empty:
            eos = self._empty.pop()[1]
        self._put(self._empty)
        self._empty = []
        self._end_of_sequence(eos)

    def abort(self) -> None:
        """See Reader.abort."""
        self._put(self._empty + self._aligner.take(last=True))


class ChunkReader(_TextReader):
    """Reads text alone. Its tokens are the server's count of them, spread over the text between the ends of steps."""

    def __init__(self, row: EndpointRow, limit: int, vocabulary: TextVocabulary, skip: bytes, kept: bool) -> None:
        super().__init__(row, limit, vocabulary, skip, kept)
        self._matcher = row.matcher.copy()
        self._stops = None if row.stops is None else row.stops.copy()
        self._text = ""
        self._chunks = 0
        self._ends: list[int] = []  # characters up to each end of a step
        self._whole = False  # the child is complete

    @property
    def ready(self) -> bool:
        """See Reader.ready."""
        return self.row.done or self._whole

    def _take(self, delta: Delta) -> None:
        text = delta.text
        if self.finish == "stop" and self.named is not None and not self._kept:
            text += self.named
        while text and self._skip:
            first = text[0].encode("utf-8", "replace")
            if not self._skip.startswith(first):
                self._skip = b""
                break
            self._skip, text = self._skip[len(first) :], text[1:]
        if not text or self._whole:
            return
        self._chunks += 1
        for character in text:
            self._text += character
            number = self._vocabulary.id_of(character.encode("utf-8", "replace"))
            if self._matcher.read(number):
                self._ends.append(len(self._text))
                self._whole = self.row.request.until == "step"
            data = character.encode("utf-8", "replace")
            if self._stops is not None and self._stops.feed(data) is not None:
                self._whole = True
            if self._whole:
                break
        self._whole = self._whole or self._chunks >= self.limit

    def _close(self, counted: int | None) -> None:
        count = self._count(counted)
        if self._text:
            for data in spread(self._text, count, self._ends):
                self.row.put(self._vocabulary.id_of(data), ServerToken(data))
        self._text = ""
        if not self._whole:
            self._end_of_sequence(ServerToken(None))

    def _count(self, counted: int | None) -> int:
        """Tokens of the text."""
        if self._whole or not self.ended:
            return self._chunks
        if counted is None or not 1 <= counted <= self.limit:
            if counted is not None:
                self.row.notes = (WRONG_COUNT,)
            return self.limit if self.finish == "length" else max(self._chunks, 1)
        return max(counted - 1, 1) if self.natural else counted  # one is the end of sequence

    def close(self, counted: int | None) -> None:
        """See Reader.close. A child that is complete here may be so before its server knows."""
        if self._whole and self.finish is None:
            self.finish = "length"
        super().close(counted)

    def abort(self) -> None:
        """See Reader.abort."""
        self._close(None)


def text_of(rows_text: TokenText, row: EndpointRow) -> str:
    """A row's text up to here, that of its path included, whole characters only."""
    node = row.request.node
    data = b"".join(step.text_bytes for step in node.path())
    data += rows_text.text_bytes([i for segment in row.chain for i in segment.token_ids])
    return data.decode("utf-8", "ignore")
