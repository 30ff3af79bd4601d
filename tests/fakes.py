"""A policy and a scorer with known answers: no model, exact probabilities, exact counts.

Tokens are bytes: 0 ends the sequence, ";" ends a step, the rest are letters.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prm_search.drawing import Draw, Segment, commit, nodes_of
from prm_search.protocols import BlockingPolicy, Request, Sampling
from prm_search.rng import uniforms
from prm_search.steps import StepRule
from prm_search.tree import Node, Prompt, SearchTree

EOS = 0
RULE = StepRule(delimiter=";", max_tokens=6)


def sampling(**given: object) -> Sampling:
    return Sampling(**{"steps": RULE, "max_new_tokens": 24, **given})


def ids(text: str) -> tuple[int, ...]:
    """Token ids of a text; "." stands for the end of the sequence."""
    return tuple(EOS if c == "." else ord(c) for c in text)


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(chr(i) for i in token_ids if i != EOS)


def piece(token_id: int) -> bytes:
    return b"" if token_id == EOS else bytes([token_id])


class Spelling:
    """Bytes of token ids; like TokenText, of a table, or of each id's own byte."""

    def __init__(self, table: Mapping[int, bytes] | None = None, special: frozenset[int] = frozenset([EOS])) -> None:
        self.piece = piece if table is None else table.__getitem__
        self.special = special


def fraction(*words: object) -> float:
    """A number in [0, 1) that is a pure function of the words."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@dataclass(frozen=True)
class ToyLM:
    """A language model of some order over a few bytes; p(token | context) is a hash of the last `order` tokens."""

    letters: str = "ab;."
    order: int = 3
    seed: int = 0
    sharpness: float = 1.0

    @property
    def vocabulary(self) -> tuple[int, ...]:
        return ids(self.letters)

    def probs(self, context: Sequence[int]) -> np.ndarray:
        """[V] float64, positive, sums to 1."""
        recent = tuple(context[-self.order :]) if self.order else ()
        weights = np.array([0.05 + fraction(self.seed, recent, token) for token in self.vocabulary]) ** self.sharpness
        return weights / weights.sum()


@dataclass(frozen=True)
class SpelledLM:
    """Says one text, byte by byte, and then ends; its most probable next token has the probability `top`.

    Args:
        text: what it says.
        prompt: tokens of the prompts it is asked.
    """

    text: str
    prompt: int = 1
    top: float = 1.0

    @property
    def vocabulary(self) -> tuple[int, ...]:
        return (EOS, *sorted(set(self.text.encode())))

    def probs(self, context: Sequence[int]) -> np.ndarray:
        """[V] float64, sums to 1."""
        said, vocabulary = self.text.encode(), self.vocabulary
        at = len(context) - self.prompt
        rest = (1 - self.top) / (len(vocabulary) - 1)
        probs = np.full(len(vocabulary), rest)
        probs[vocabulary.index(said[at] if at < len(said) else EOS)] = self.top
        return probs


class ByteTokens:
    """The vocabulary of the fakes, as Draw asks for it."""

    piece = staticmethod(piece)

    @staticmethod
    def text_bytes(token_ids: Iterable[int]) -> bytes:
        return b"".join(map(piece, token_ids))


@dataclass(eq=False)
class Child(Draw):
    """A child while it is drawn, one token of a ToyLM at a time."""

    def step(self, lm: ToyLM) -> None:
        request, how = self.request, self.request.sampling
        raw = lm.probs(self.ids())
        if self.rank is not None:
            place = int(np.argsort(-raw, kind="stable")[self.rank])
        elif how.temperature == 0:
            place = int(raw.argmax())
        else:
            probs = raw ** (1 / how.temperature)
            (u,) = uniforms([how.seed], [request.node.tree.stream], [self.lineage], [self.position])
            place = int(np.searchsorted(np.cumsum(probs / probs.sum())[:-1], u, side="right"))
        if not self.cut_before(float(raw.max()), float(raw[place])):
            self.take(lm.vocabulary[place], float(np.log(raw[place])), confidence(raw, how.confidence_tokens))


def children_of(request: Request) -> list[Child]:
    return Child.of(request, ByteTokens(), frozenset({EOS}))


def finish(request: Request, children: Sequence[Child], sampler: Hashable) -> list[Node]:
    """Commit what the children drew and count it."""
    return [nodes[-1] for _, nodes in nodes_of(request, children, sampler)]


def interrupt(request: Request, children: Sequence[Child], sampler: Hashable) -> list[Node]:
    """The same where they have to end now."""
    for child in children:
        child.interrupt()
    return finish(request, children, sampler)


def confidence(probs: np.ndarray, tokens: int) -> float | None:
    """Minus the mean log-probability of the most probable tokens; None of none of them."""
    return -float(np.log(np.sort(probs)[::-1][:tokens]).mean()) if tokens else None


class FakePolicy:
    """Draws one token of every child a call of advance, at most `rows` at a time, as a continuous decoder does.

    Attributes:
        order: called with the waiting children to order them before each call; for tests of independence.
        fail_at: the call of advance that raises RuntimeError; None never.
    """

    takes_stop = True
    top_tokens = 4
    ranks = True

    def __init__(
        self,
        lm: ToyLM | None = None,
        *,
        id: Hashable = "toy",
        rows: int | None = None,
        context: int | None = None,
        order: Callable[[list[Child]], list[Child]] = list,
        fail_at: int | None = None,
    ) -> None:
        self.lm, self.id, self.rows, self.context = lm or ToyLM(), id, rows, context
        self.order, self.fail_at = order, fail_at
        self.forward_calls = 0
        self.trees: set[SearchTree] = set()  # not released
        self.requests: dict[Request, list[Child]] = {}

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        found = prompt.token_ids or ids(prompt.text or "".join(m["content"] for m in prompt.messages or ()))
        if self.context is not None and len(found) >= self.context:
            raise ValueError(f"the prompt has {len(found)} tokens; the context of {self.context} leaves no room")
        return tuple(found)

    def expand(self, nodes: Sequence[Node], n: int, *, sampling: Sampling, until: str = "step") -> list[list[Node]]:
        requests = [Request.draw(node, n, sampling, until=until) for node in nodes]
        self.submit(requests)
        answers: dict[Request, list[Node]] = {}
        while len(answers) < len(requests):
            answers.update(self.advance())
        return [answers[request] for request in requests]

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.trees.add(request.node.tree)
            self.requests[request] = children_of(request)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        self.forward_calls += 1
        if self.forward_calls == self.fail_at:
            raise RuntimeError("the policy failed")
        waiting = [child for children in self.requests.values() for child in children if not child.done]
        for child in self.order(waiting)[: self.rows]:
            child.step(self.lm)
        ended = [r for r, children in self.requests.items() if all(child.done for child in children)]
        return [(request, finish(request, self.requests.pop(request), self.id)) for request in ended]

    def interrupt(self, request: Request) -> list[Node]:
        return interrupt(request, self.requests.pop(request), self.id)

    def drop(self, requests: Sequence[Request]) -> None:
        for request in requests:
            drawn = sum(child.sampled for child in self.requests.pop(request))
            request.node.tree.meter.add("sampled", self.id, drawn)

    def release(self, tree: SearchTree) -> None:
        self.trees.discard(tree)
        self.requests = {r: children for r, children in self.requests.items() if r.node.tree is not tree}


class FakeBlockingPolicy(BlockingPolicy):
    """The same draws, a whole batch of requests a call."""

    takes_stop = True
    top_tokens = 4
    ranks = True

    def __init__(self, lm: ToyLM | None = None, *, id: Hashable = "toy") -> None:
        super().__init__()
        self.lm, self.id = lm or ToyLM(), id

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return prompt.token_ids or ids(prompt.text or "")

    def run(self, requests: Sequence[Request]) -> list[list[Node]]:
        answers = []
        for request in requests:
            children = children_of(request)
            for child in children:
                while not child.done:
                    child.step(self.lm)
            answers.append(finish(request, children, self.id))
        return answers


class ScriptedPolicy(BlockingPolicy):
    """Draws what a script says: path text -> the steps of its children, in the order in which they are drawn.

    A node's children beyond its script start it again from the beginning. A step that ends with "." ends the response.
    """

    id = "script"

    def __init__(self, script: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.script = script
        self.asked: list[tuple[str, int]] = []  # path text, children

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return prompt.token_ids or ids(prompt.text or "")

    def run(self, requests: Sequence[Request]) -> list[list[Node]]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> list[Node]:
        node, count = request.node, len(request.lineages)
        self.asked.append((node.path_text(), count))
        before = sum(child.count for child in node.children)
        chains = [self._chain(request, node.path_text(), before + i) for i in range(count)]
        tokens = sum(len(segment.token_ids) for chain in chains for segment in chain)
        node.tree.meter.add("sampled", self.id, tokens)
        return [nodes[-1] for nodes in commit(request, chains, self.id)]

    def _chain(self, request: Request, path: str, place: int) -> list[Segment]:
        chain: list[Segment] = []
        while True:
            steps = self.script[path]
            step = steps[place % len(steps)]
            chain.append(
                Segment(list(ids(step)), [-1.0] * len(step), text_of(ids(step)), "stop" if step[-1] == "." else "step")
            )
            if request.until == "step" or chain[-1].finish == "stop":
                return chain
            path, place = path + chain[-1].text, 0


class FakeScorer:
    """Rewards that are a known function of a path: reward(prompt ids, path ids up to and with the token) a token.

    Counts on the tree's meter what an incremental scorer would encode, and refuses what no scorer could do.
    """

    def __init__(
        self,
        reward: Callable[[tuple[int, ...], tuple[int, ...]], float] | None = None,
        *,
        name: str = "prm",
        fail_at: int | None = None,
    ) -> None:
        self.reward = reward or (lambda prompt, path: fraction(name, prompt, path) - 0.5)
        self.name, self.fail_at = name, fail_at
        self.models: dict[str, Hashable] = {"prm": f"{name}-trained", "reference": f"{name}-reference"}
        self.trees: set[SearchTree] = set()  # not released
        self.calls = 0

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the scorer failed")
        for node in nodes:
            tree = node.tree
            if tree not in self.trees:
                self.trees.add(tree)
                for model in self.models.values():
                    tree.meter.add("encoded", model, len(tree.prompt_ids))
            for part in node.path():
                if part.scored_by(self.name):
                    continue
                before = [] if part.parent is None else part.parent.path_ids()
                paths = [(*before, *part.token_ids[: i + 1]) for i in range(len(part.token_ids))]
                part.set_rewards(self.name, np.array([self.reward(tree.prompt_ids, path) for path in paths]))
                for model in self.models.values():
                    tree.meter.add("encoded", model, len(part.token_ids))

    def release(self, tree: SearchTree) -> None:
        self.trees.discard(tree)


def step_scores(table: Mapping[str, float]) -> Callable[[tuple[int, ...], tuple[int, ...]], float]:
    """A reward for FakeScorer: each letter's own number, whatever comes before it; 0 for others."""
    return lambda prompt, path: table.get(chr(path[-1]), 0.0)


class FakeAsyncPolicy:
    """The same draws as coroutines, which give way to others after every token, `pauses(request)` times more before."""

    takes_stop = True
    top_tokens = 4
    ranks = True

    def __init__(
        self,
        lm: ToyLM | None = None,
        *,
        id: Hashable = "toy",
        pauses: Callable[[Request], int] = lambda request: 0,
        fail_at: int | None = None,
    ) -> None:
        self.lm, self.id, self.pauses, self.fail_at = lm or ToyLM(), id, pauses, fail_at
        self.calls = 0
        self.running: set[Request] = set()
        self.interrupted: set[Request] = set()
        self.released: list[SearchTree] = []

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return prompt.token_ids or ids(prompt.text or "")

    async def run(self, request: Request) -> list[Node]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the policy failed")
        self.running.add(request)
        try:
            for _ in range(self.pauses(request)):
                await asyncio.sleep(0)
            children = children_of(request)
            while not all(child.done for child in children) and request not in self.interrupted:
                for child in children:
                    if not child.done:
                        child.step(self.lm)
                await asyncio.sleep(0)
        finally:
            self.running.discard(request)
        if request in self.interrupted:
            return interrupt(request, children, self.id)
        return finish(request, children, self.id)

    def interrupt(self, request: Request) -> None:
        self.interrupted.add(request)

    def release(self, tree: SearchTree) -> None:
        self.released.append(tree)


class FakeAsyncScorer(FakeScorer):
    """Scores as a coroutine."""

    async def ascore_nodes(self, nodes: Sequence[Node]) -> None:
        await asyncio.sleep(0)
        self.score_nodes(nodes)


class Clock:
    """A clock that tests set."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now
