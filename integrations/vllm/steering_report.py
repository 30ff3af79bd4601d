"""The side channel of steering inside vLLM: a processor returns logits only, so rewards go to a file, line by line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prm_search.scorers.scores import Scores
from prm_search.steering import Stream
from prm_search.steps import StepRule
from prm_search.tokens.pieces import text_pieces


class Report:
    """A file of JSON lines that any number of workers append to: each record is one write.

    Args:
        path: the file; created where it is not there.
        beta: rewards a nat.
        steps: where steps end.
        piece: bytes that a token id adds.

    Raises:
        ValueError: the file cannot be written to.
    """

    def __init__(self, path: str, beta: float, steps: StepRule, piece: Callable[[int], bytes]) -> None:
        self.path = Path(path).expanduser()
        self.beta = beta
        self.steps = steps
        self.piece = piece
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"report={path!r} cannot be written to: {error.strerror}") from error

    def write(self, key: str | int, stream: Stream, end: int, finish: str | None) -> None:
        """Append the record of a stream that is over.

        Args:
            key: of the record.
            stream: the request.
            end: output tokens that count; an engine may have sampled beyond its end.
            finish: "stop", "length", or None where the tokens do not tell.
        """
        line = json.dumps(self.record(key, stream, end, finish), allow_nan=False) + "\n"
        os.write(self._file, line.encode())

    def record(self, key: str | int, stream: Stream, end: int, finish: str | None) -> dict[str, Any]:
        """Return what is written: rewards of the output tokens `first`, `first + 1`, ... in beta * nats."""
        ratios = stream.log_ratios[: max(0, end - stream.first)]
        ids = [int(i) for i in stream.output[: stream.first + len(ratios)]]
        own = ids[stream.first :]
        rewards = self.beta * np.asarray(ratios, np.float32)
        ends = [end - stream.first for end in self.steps.ends(ids, self.piece) if end > stream.first]
        known = np.nan_to_num(rewards, nan=0.0, posinf=0.0, neginf=0.0)  # a token that a model rules out has none
        scores = Scores(tuple(own), known, np.asarray(ends), text_pieces(own, self.piece)) if own else None
        return {
            "key": key,
            "finish": finish,
            "unguided": stream.fault,
            "alpha": stream.alpha,
            "max_kl": None if math.isinf(stream.max_kl) else stream.max_kl,
            "beta": self.beta,
            "prompt_tokens": len(stream.prompt),
            "first": stream.first,
            "token_ids": own,
            "token_rewards": [float(r) if math.isfinite(r) else None for r in rewards],
            "q": [] if scores is None else scores.q.tolist(),
            "step_ends": ends,
            "step_rewards": [] if scores is None else scores.step_rewards.tolist(),
        }


def finished(output: Sequence[int], stops: Collection[int], limit: int) -> tuple[int, str | None]:
    """Return where and why a request ends, as far as its token ids tell: a stop string is only seen in the front end.

    Args:
        output: tokens so far, perhaps with some that were sampled beyond the end.
        stops: token ids that end it.
        limit: output tokens it may have.

    Returns:
        the tokens that count, and "stop", "length", or None where it is not over by them.
    """
    for place, token in enumerate(output[:limit], 1):
        if token in stops:
            return place, "stop"
    return (limit, "length") if len(output) >= limit else (len(output), None)
