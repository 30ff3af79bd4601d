"""Recordings: every draw and score of searches on disk, from which other searches are answered. No torch.

A draw is a function of its prompt, the tokens before it, its random stream (lineage) and the sampling's seed and
filters. So the tokens of a recorded tree, with the lineages that drew them, answer any strategy that asks for the same
draws: votes over fewer samples, other values and selections, another StepRule or budget. A line of the file is one
search: its sampling, the tokens that end a response, its scorers' own values, and its tree.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .checks import shown
from .prompt import Prompt
from .sampling import Sampling
from .tokens.pieces import POLICY, Pieces
from .tree import Node, SearchTree

VERSION = 1
FILTERS = ("temperature", "top_p", "top_k", "min_p")
Filters = tuple[float, ...]


class NotRecorded(ValueError):
    """A draw or a score that the recording does not have."""


@dataclass(frozen=True)
class Reward:
    """A scorer's reward of a step; fields as of Node.set_rewards."""

    token_rewards: np.ndarray
    reward: float
    token_ids: tuple[int, ...] | None


@dataclass
class Draws:
    """The draws after one prefix, and the prefixes that go on from it.

    Attributes:
        tokens: lineage -> token, log-probability (nats) and confidence (None where it was not recorded).
        after: token -> the prefix that ends with it.
    """

    tokens: dict[int, tuple[int, float, float | None]] = field(default_factory=dict)
    after: dict[int, Draws] = field(default_factory=dict)


class Recorder:
    """Writes searches to a file, each as soon as it is finished.

    Args:
        path: JSON Lines; made anew, or gone on with where it exists and `resume` says so.
        resume: keep what is there.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | PathLike[str], *, resume: bool = False) -> None:
        self._file = open(path, "a" if resume else "w", encoding="utf-8")  # noqa: SIM115  # closed by close

    def add(
        self,
        tree: SearchTree,
        sampling: Sampling,
        *,
        stop_ids: Iterable[int] = (),
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a search.

        Args:
            tree: its tree, scored.
            sampling: how it was drawn.
            stop_ids: the policy's tokens that end a response.
            values: scorer -> its own value's name, where it has one.
        """
        self.write(recorded(tree, sampling, stop_ids=stop_ids, values=values))

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a search as `recorded` has it."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def recorded(
    tree: SearchTree,
    sampling: Sampling,
    *,
    stop_ids: Iterable[int] = (),
    values: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A search as a line of a recording, plain values; arguments as of Recorder.add."""
    return {
        "recording": VERSION,
        "seed": sampling.seed,
        "filters": {name: getattr(sampling, name) for name in FILTERS},
        "stop_ids": sorted(stop_ids),
        "special": sorted(getattr(tree.vocabularies.get(POLICY), "special", ())),
        "values": {name: value for name, value in (values or {}).items() if isinstance(value, str)},
        "tree": json.loads(tree.to_json()),
    }


class Recording:
    """A recording, read whole.

    Args:
        path: see Recorder. A last line that was cut is left out.

    Attributes:
        path: of the file.
        stop_ids: tokens that end a response.
        special: tokens that are no text.
        pieces: bytes of the token ids.
        scorers: scorer -> its own value's name, or None.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no recording; the message names the line.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.stop_ids: frozenset[int] = frozenset()
        self.special: frozenset[int] = frozenset()
        self.scorers: dict[str, str | None] = {}
        self.filters: set[tuple[Filters, int]] = set()
        self._draws: dict[tuple[Hashable, ...], Draws] = {}
        self._rewards: dict[tuple[Hashable, ...], Reward] = {}
        self._prompts: dict[Hashable, tuple[int, ...]] = {}
        bytes_of: dict[int, bytes] = {}
        count = 0
        for where, record in self._lines():
            count += 1
            try:
                tree = SearchTree.from_json(json.dumps(record["tree"]))
                self._add(record, tree)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{where} is no search of a recording: {error}") from error
            vocabulary = tree.vocabularies.get(POLICY)
            if vocabulary is not None:
                bytes_of |= {i: vocabulary.piece(i) for node in tree.nodes for i in node.token_ids}
        if not count:
            raise ValueError(f"{self.path} holds no recording")
        self.pieces = Pieces(bytes_of)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return a prompt's recorded token ids. Raises NotRecorded."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        ids = self._prompts.get(_spelled(prompt))
        if ids is None:
            raise NotRecorded(f"{self.path}: the prompt {shown(prompt.text or prompt.messages)} is not recorded")
        return ids

    def draws(self, node: Node, sampling: Sampling) -> Draws:
        """Return what was drawn after a node's path. Raises NotRecorded, naming what differs."""
        filters = _filters({name: getattr(sampling, name) for name in FILTERS}, sampling.seed)
        if filters not in self.filters:
            known = "; ".join(sorted(_said(*each) for each in self.filters))
            raise NotRecorded(f"{self.path}: recorded is {known}, and {_said(*filters)} is asked for")
        draws = self._draws.get((filters, node.tree.stream))
        for token in node.path_ids():
            draws = None if draws is None else draws.after.get(token)
        return Draws() if draws is None else draws

    def reward(self, name: str, node: Node) -> Reward:
        """Return a scorer's reward of a step. Raises NotRecorded."""
        reward = self._rewards.get((name, node.tree.prompt_ids, _steps(node)))
        if reward is None:
            raise NotRecorded(f"{self.path}: {name} has no recorded reward of the step {shown(node.text)}")
        return reward

    def missing(self, node: Node, text: str) -> NotRecorded:
        """Return the error of a draw that is not there."""
        prompt = node.tree.prompt
        asked = shown(prompt.text or prompt.messages or prompt.token_ids)
        return NotRecorded(f"{self.path}: a draw after {shown(node.path_text() + text)} to {asked} is not recorded")

    def _lines(self) -> Iterator[tuple[str, Any]]:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):  # of a run that was killed while it wrote
                    return
                raise ValueError(f"{self.path}, line {number} is no JSON: {error}") from error
            if not isinstance(record, dict) or record.get("recording") != VERSION:
                raise ValueError(f"{self.path}, line {number} is no search of a recording (version {VERSION})")
            yield f"{self.path}, line {number}", record

    def _add(self, record: Mapping[str, Any], tree: SearchTree) -> None:
        filters = _filters(record["filters"], record["seed"])
        self.filters.add(filters)
        self.stop_ids |= frozenset(record["stop_ids"])
        self.special |= frozenset(record["special"])
        if tree.prompt.text is not None or tree.prompt.messages is not None:
            self._prompts[_spelled(tree.prompt)] = tree.prompt_ids
        for name in tree.nodes[-1].rewards if len(tree.nodes) > 1 else ():
            self.scorers.setdefault(name, record["values"].get(name))
        ends = {tree.root: self._draws.setdefault((filters, tree.stream), Draws())}
        for node in tree.nodes[1:]:
            assert node.parent is not None
            draws = ends[node.parent]
            for place, token in enumerate(node.token_ids):
                logprob = 0.0 if node.logprobs is None else float(node.logprobs[place])
                confidence = None if node.confidences is None else float(node.confidences[place])
                for lineage in node.lineages:
                    draws.tokens[lineage] = token, logprob, confidence
                draws = draws.after.setdefault(token, Draws())
            ends[node] = draws
            for name, rewards in node.rewards.items():
                reward = Reward(rewards, node.reward_of(name), node.reward_ids.get(name))
                self._rewards[name, tree.prompt_ids, _steps(node)] = reward


def told_by(policy: Any, *scorers: Any) -> dict[str, Any]:
    """Return what a policy and scorers tell a Recorder: `stop_ids` and `values`."""
    named = [scorer for scorer in scorers if scorer is not None]
    return {
        "stop_ids": getattr(policy, "stop_ids", ()),
        "values": {scorer.name: getattr(scorer, "default_value", None) for scorer in named},
    }


def _filters(given: Mapping[str, Any], seed: int) -> tuple[Filters, int]:
    """The settings that a draw depends on; at temperature 0 no seed is one."""
    values = tuple(float(given[name]) for name in FILTERS)
    return values, 0 if values[0] == 0 else seed


def _said(values: Filters, seed: int) -> str:
    return ", ".join([*(f"{name} {value:g}" for name, value in zip(FILTERS, values, strict=True)), f"seed {seed}"])


def _steps(node: Node) -> tuple[tuple[int, ...], ...]:
    return tuple(step.token_ids for step in node.path())


def _spelled(prompt: Prompt) -> Hashable:
    return prompt.text if prompt.messages is None else json.dumps([dict(m) for m in prompt.messages], sort_keys=True)
