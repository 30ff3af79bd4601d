"""Step: what a node holds of its own tokens, and its JSON record. No torch, no model, no other node."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np


class Step:
    """The step of a node: tokens, text, log-probabilities, rewards. `Node` has the attributes' meanings."""

    __slots__ = (
        "_q", "_reward", "confidences", "drawn", "finish", "hidden", "lineages", "logprobs", "reward_ids", "rewards",
        "rollout", "sampler", "text_bytes", "token_ids", "value", "weight",
    )  # fmt: skip

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids: tuple[int, ...] = tuple(token_ids)
        self.text_bytes = b""
        self.hidden = 0
        self.logprobs: np.ndarray | None = None
        self.confidences: np.ndarray | None = None
        self.sampler: Hashable | None = None
        self.rewards: dict[str, np.ndarray] = {}
        self.reward_ids: dict[str, tuple[int, ...]] = {}
        self.value: float | None = None
        self.finish: str | None = None
        self.lineages: tuple[int, ...] = (0,)
        self.drawn = 0
        self.rollout = False
        self.weight: float | None = None
        self._reward: dict[str, float] = {}
        self._q: dict[str, float] = {}

    @property
    def text(self) -> str:
        """The step's own text."""
        return self.text_bytes[: max(len(self.text_bytes) - self.hidden, 0)].decode("utf-8", "replace")

    @text.setter
    def text(self, text: str | bytes) -> None:
        self.text_bytes = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")

    @property
    def count(self) -> int:
        """Merged duplicates this node stands for, at least 1."""
        return len(self.lineages)

    @property
    def finished(self) -> bool:
        """Return True if nothing may follow: the response ended, is full, or the budget is spent."""
        return self.finish in ("stop", "length", "budget", "weak")

    def copied(self) -> dict[str, Any]:
        """Every field by its name; dicts are copies."""
        values = {name: getattr(self, name) for name in Step.__slots__}
        return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON, as `restore` takes them."""
        text = self.text
        cut = text.encode() != self.text_bytes  # inside a character: the text alone does not tell the bytes
        return {
            "token_ids": list(self.token_ids),
            "text": text,
            **({"text_bytes": self.text_bytes.hex()} if cut else {}),
            **({"hidden": self.hidden} if self.hidden else {}),
            "logprobs": None if self.logprobs is None else self.logprobs.tolist(),
            **({} if self.confidences is None else {"confidences": self.confidences.tolist()}),
            "sampler": None if self.sampler is None else str(self.sampler),
            "rewards": {name: values.tolist() for name, values in self.rewards.items()},
            "reward_ids": {name: list(ids) for name, ids in self.reward_ids.items()},
            "reward": dict(self._reward),
            "q": dict(self._q),
            "value": self.value,
            "weight": self.weight,
            "finish": self.finish,
            "lineages": list(self.lineages),
            "drawn": self.drawn,
            "rollout": self.rollout,
        }

    def restore(self, record: Mapping[str, Any], where: str) -> None:
        """Take over a record that `checks.check_tree` has passed.

        Raises:
            ValueError: bytes and text disagree. The message begins with `where`, the record's place.
        """
        self.text, self.hidden = record["text"], record.get("hidden", 0)
        if "text_bytes" in record:
            self.text_bytes = bytes.fromhex(record["text_bytes"])
            if self.text != record["text"]:
                told = f"{record['text_bytes']!r} do not spell the text {record['text']!r}"
                raise ValueError(f"{where}.text_bytes {told}")
        self.value, self.finish, self.weight = record["value"], record["finish"], record.get("weight")
        self.logprobs = None if record["logprobs"] is None else np.asarray(record["logprobs"], np.float32)
        self.confidences = None if record.get("confidences") is None else np.asarray(record["confidences"], np.float32)
        self.sampler = record["sampler"]
        self.rewards = {name: np.asarray(values, np.float32) for name, values in record["rewards"].items()}
        self.reward_ids = {name: tuple(ids) for name, ids in record["reward_ids"].items()}
        self._reward, self._q = dict(record["reward"]), dict(record["q"])
        self.lineages, self.drawn, self.rollout = tuple(record["lineages"]), record["drawn"], record["rollout"]
