"""Ensemble: several scorers of any kind as one, with their spread."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np

from .. import checks
from ..calibration import Calibration
from ..protocols import Scorer, ScorerDefaults
from ..tokens import TokenizerMatch
from ..tree import Node, Prompt, SearchTree
from .base import ScorerBase
from .explicit.text_scorer import TextScorer
from .pair import Pair

Reduce = Literal["mean", "min", "lcb", "policy"]
Scale = Callable[[float], float]
_STEPWISE = ("last", "min", "mean", "prod")


@dataclass(frozen=True)
class _Estimate:
    """The members' joint say on a step."""

    mean: float
    least: float
    spread: float


class Ensemble(TextScorer):
    """Scorers of any kind as one: pairs, step PRMs, outcome models, judges, other ensembles.

    Each member's step reward x is put on one scale, where more is better, before they are put together:

    * a member with a range [low, high] (step PRMs, judges, classifiers): (x - low) / (high - low);
    * a member without bounds (pairs in beta * nats, scalar outcome models): 1 / (1 + exp(-x));
    * or what `scales` says for it, for instance a Calibration, which makes probabilities of all of them.

    A member that rewards finished answers alone has no say on other steps. With the weights w_i of those that have,
    normalised to sum to 1, mu = sum_i w_i x_i and sigma^2 = sum_i w_i (x_i - mu)^2, the step's reward is

    * "mean": mu;
    * "min": the least x_i;
    * "lcb": mu - k sigma, a lower confidence bound;
    * "policy": mu - sum_j pi_j mu_j, over the step's siblings j and itself. pi_j is the policy's probability of a
      sibling (the exponential of the sum of its raw log-probabilities), normalised to sum to 1 over those that were
      drawn; where a node carries no log-probabilities, the number of times each was drawn.

    "policy" is after DRE-MARL (arXiv 2210.07636). There a reward distribution is learned for every action of a state.
    The mixed reward m takes the observed reward for the action taken, and draws from the distributions for all others.
    The critic's target is the policy-weighted sum R = sum_k pi(a_k | s) m_k, plus gamma V(s'). The actor's advantage is
    the mean of m over actions, plus gamma V(s') - V(s).

    Ours differs. Actions are the steps that were drawn below one node, not all there are. The distribution of a branch
    is the members' (mean mu, spread sigma), not a learned one, and its mean is used, not a draw. No branch has an
    observed reward. Future values play no part. What goes out is the branch's mean minus R, an advantage: siblings rank
    as by "mean", and a step counts by how much better it is than what the policy would do there, so that steps below
    different parents compare. Siblings are those scored so far; a search scores the children of an expansion together.

    Every member's own rewards stay on the node under its name, and sigma under `spread_name`.

    Args:
        scorers: at least one, with different names.
        reduce: see above.
        k: standard deviations of "lcb".
        weights: of the members, > 0: a list in their order, or a dict by name; None for equal ones. "min" takes none.
        scales: by member's name, in place of the rules above: (low, high), a function of a reward, or the file of a
            Calibration, whose name ends with ".json".
        name: key of the rewards in Node.rewards.

    Attributes:
        scorers, reduce, k: as given.
        spread_name: key of the spreads in Node.rewards.
        default_value: what the members have in common where their rewards are step scores; else "min". None for
            "policy", whose rewards add up, and where all members reward answers.

    Raises:
        TypeError: a member is no scorer, or an argument of the wrong kind.
        ValueError: names are equal, or an argument is out of range or names no member.
    """

    kind = "ensemble"

    def __init__(
        self,
        scorers: Iterable[Scorer],
        reduce: Reduce = "mean",
        *,
        k: float = 1.0,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        scales: Mapping[str, Scale | tuple[float, float] | str | PathLike[str]] | None = None,
        name: str = "ensemble",
    ) -> None:
        self.scorers = _members(scorers, name)
        names = [member.name for member in self.scorers]
        tokenizers = [member.tokenizer for member in self._pairs() if member.tokenizer is not None]
        tokenizers += [own for member in self.scorers if (own := getattr(member, "tokenizer", None)) is not None]
        super().__init__(name, tokenizers[0] if tokenizers else None)
        if reduce not in get_args(Reduce):
            raise ValueError(f"reduce={reduce!r}: it is one of {', '.join(get_args(Reduce))}")
        checks.number("k", k, "a finite number >= 0", lambda x: 0 <= x < math.inf)
        if weights is not None and reduce == "min":
            raise ValueError("weights: reduce='min' takes the least, whatever they are")
        self.reduce, self.k = reduce, float(k)
        self.spread_name = f"{name}.spread"
        self._weights = _by_name("weights", weights, names)
        self._scales = {member.name: _scale(member) for member in self.scorers} | _scales(scales, names)
        self.whole = all(member.whole for member in self.scorers)
        self.reward_range = (0.0, 1.0) if reduce in ("mean", "min") and not scales else None
        values = {member.default_value for member in self.scorers if not member.whole}
        if reduce != "policy" and values:
            common = values.pop() if len(values) == 1 else None
            self.default_value = common if common in _STEPWISE else "min"

    def _pairs(self) -> list[Pair]:
        return [member for member in self.scorers if isinstance(member, Pair)]

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def models(self) -> Mapping[str, Hashable]:
        """Ids of all members' models, by "member.role"."""
        return {f"{member.name}.{role}": model for member in self.scorers for role, model in member.models.items()}

    @property
    def forward_calls(self) -> int | None:
        """Forwards run so far by the members that count theirs; None where none does."""
        counts = [calls for member in self.scorers if (calls := member.forward_calls) is not None]
        return sum(counts) if counts else None

    @property
    def policy_context(self) -> int | None:
        """Tokens of the policy that every member can read."""
        return min((c for member in self.scorers if (c := member.policy_context) is not None), default=None)

    def bind(self, policy: Any) -> None:
        """Have every member meet the policy."""
        for member in self.scorers:
            member.bind(policy)

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise ValueError where a member cannot score responses to a prompt."""
        for member in self.scorers:
            member.check_prompt(prompt)

    def notes_of(self, node: Node) -> tuple[str, ...]:
        """Return what members have to say of a scored path."""
        return tuple(n for member in self.scorers if isinstance(member, ScorerBase) for n in member.notes_of(node))

    def release(self, tree: SearchTree) -> None:
        """Have every member forget a tree."""
        for member in self.scorers:
            member.release(tree)

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Score nodes and their unscored ancestors by every member, then together; see Scorer.score_nodes."""
        todo = self.unscored(nodes)
        for member in self.scorers:
            member.score_nodes(nodes)
        self._reduce(todo)

    async def ascore_nodes(self, nodes: Sequence[Node]) -> None:
        """score_nodes beside the running event loop, all members at the same time."""
        todo = self.unscored(nodes)
        results = await asyncio.gather(*(m.ascore_nodes(nodes) for m in self.scorers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self._reduce(todo)

    def score_exact(self, nodes: Sequence[Node]) -> None:
        """score_nodes of nodes whose tokens and prompt are the ensemble's own, whatever policy members are bound to."""
        todo = self.unscored(nodes)
        for member in self.scorers:
            if isinstance(member, Pair):
                member.score_exact(member.unscored(nodes))
            else:
                member.score_nodes(nodes)
        self._reduce(todo)

    def scaled(self, node: Node) -> dict[str, float]:
        """Return the rewards of a scored node on the common scale, of the members that have a say on it."""
        return {
            member.name: self._scales[member.name](node.reward_of(member.name))
            for member in self.scorers
            if node.finished or not member.whole
        }

    def spread(self, node: Node) -> float:
        """Return sigma of a scored node. Raises KeyError where the ensemble has not scored it."""
        return node.reward_of(self.spread_name)

    def _reduce(self, todo: Sequence[Node]) -> None:
        estimates = {node: self._estimate(node) for node in todo}
        expected: dict[Node | None, float] = {}  # by parent
        if self.reduce == "policy":
            expected = {node.parent: self._expected(node) for node in {one.parent: one for one in todo}.values()}
        for node in todo:
            estimate = estimates[node]
            reward = 0.0 if estimate is None else self._reward(estimate, expected.get(node.parent, 0.0))
            for name, number in ((self.spread_name, 0.0 if estimate is None else estimate.spread), (self.name, reward)):
                if not math.isfinite(number):
                    raise ValueError(f"members of {self.name!r} give rewards that are not finite: {self.scaled(node)}")
                self._set(node, name, number)

    def _set(self, node: Node, name: str, number: float) -> None:
        token_rewards = np.zeros(len(node.token_ids), np.float32)
        token_rewards[-1] = number
        node.set_rewards(name, token_rewards, number)

    def _estimate(self, node: Node) -> _Estimate | None:
        scaled = self.scaled(node)
        if not scaled:
            return None
        total = math.fsum(self._weights[name] for name in scaled)
        shares = {name: self._weights[name] / total for name in scaled}
        mean = math.fsum(share * scaled[name] for name, share in shares.items())
        variance = math.fsum(share * (scaled[name] - mean) ** 2 for name, share in shares.items())
        return _Estimate(mean, min(scaled.values()), math.sqrt(variance))

    def _reward(self, estimate: _Estimate, expected: float) -> float:
        if self.reduce == "mean":
            return estimate.mean
        if self.reduce == "min":
            return estimate.least
        if self.reduce == "lcb":
            return estimate.mean - self.k * estimate.spread
        return estimate.mean - expected

    def _expected(self, node: Node) -> float:
        """The policy-weighted mean of what was scored below the parent of a node."""
        above = node.parent.children if node.parent is not None else [node]
        names = [member.name for member in self.scorers]
        siblings = [one for one in above if all(one.scored_by(name) for name in names)]
        pairs = [(one, estimate.mean) for one in siblings if (estimate := self._estimate(one)) is not None]
        logs = [_log_probability(one) for one, _ in pairs]
        if None in logs:
            shares = [float(one.count) for one, _ in pairs]
        else:
            known = [log for log in logs if log is not None]
            shares = [math.exp(log - max(known)) for log in known]
        if not pairs:
            return 0.0
        return math.fsum(share * mean for share, (_, mean) in zip(shares, pairs, strict=True)) / math.fsum(shares)

    def check_texts(self) -> None:
        """Raise ValueError where pairs have different tokenizers or chat templates, or reduce is "policy"."""
        if self.reduce == "policy":
            raise ValueError("reduce='policy' weighs the siblings of a search, which complete responses have none of")
        for pair in self._pairs():
            match = TokenizerMatch.of(pair.need_tokenizer(), self.tokenizer)
            if not (match.tokens and match.prompts):
                raise ValueError(
                    f"score: pair {pair.name!r} has another tokenizer or chat template than {self._pairs()[0].name!r}: "
                    "responses are given to all pairs of an ensemble as the same tokens"
                )


def _log_probability(node: Node) -> float | None:
    """Nats of a step under the policy, before temperature; None where the node carries none."""
    return None if node.logprobs is None else math.fsum(node.logprobs.tolist())


def _members(scorers: Iterable[Scorer], name: str) -> list[ScorerDefaults]:
    if isinstance(scorers, str | bytes) or not isinstance(scorers, Iterable):
        raise TypeError(f"scorers must be a list of scorers, got {type(scorers).__name__}")
    members = []
    for place, scorer in enumerate(scorers):
        checks.require(f"scorers[{place}]", scorer, Scorer)
        members.append(ScorerDefaults.of(scorer))
    if not members:
        raise ValueError("scorers is empty: at least one is needed")
    names = [name, f"{name}.spread", *(member.name for member in members)]
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise ValueError(f"scorers: two are named {twice[0]!r}; give each a name of its own (name=)")
    return members


def _by_name(
    argument: str, values: Sequence[float] | Mapping[str, float] | None, names: Sequence[str]
) -> dict[str, float]:
    """Weights by member; 1 where none are given."""
    if values is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(values, Mapping):
        _known(argument, values, names)
        pairs = {**dict.fromkeys(names, 1.0), **values}
    elif isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(f"{argument}={checks.shown(values)}: a list of numbers, or a dict by name, is needed")
    elif len(values) != len(names):
        raise ValueError(f"{argument} has {len(values)} numbers for {len(names)} scorers")
    else:
        pairs = dict(zip(names, values, strict=True))
    for name, value in pairs.items():
        checks.number(f"{argument}[{name!r}]", value, "a finite number > 0", lambda x: 0 < x < math.inf)
    return {name: float(value) for name, value in pairs.items()}


def _known(argument: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"{argument}: no member is named {unknown[0]!r}; they are {', '.join(names)}")


def _scale(member: ScorerDefaults) -> Scale:
    """The rule for a member's rewards."""
    return _sigmoid if member.reward_range is None else _linear(*member.reward_range)


def _scales(
    given: Mapping[str, Scale | tuple[float, float] | str | PathLike[str]] | None, names: Sequence[str]
) -> dict[str, Scale]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"scales={checks.shown(given)}: a dict by name is needed")
    _known("scales", given, names)
    scales: dict[str, Scale] = {}
    for name, scale in given.items():
        if callable(scale):
            scales[name] = scale
        elif isinstance(scale, str | PathLike) and str(scale).endswith(".json"):
            scales[name] = Calibration.load(scale)
        elif isinstance(scale, Sequence) and len(scale) == 2 and not isinstance(scale, str):
            for end in scale:
                checks.number(f"scales[{name!r}]", end, "a finite number", lambda x: abs(x) < math.inf)
            if not scale[0] < scale[1]:
                raise ValueError(f"scales[{name!r}]={scale!r}: low < high is needed")
            scales[name] = _linear(*scale)
        else:
            raise TypeError(
                f"scales[{name!r}]={checks.shown(scale)}: (low, high), a function, or a calibration's file (.json)"
            )
    return scales


def _linear(low: float, high: float) -> Scale:
    return lambda reward: (reward - low) / (high - low)


def _sigmoid(reward: float) -> float:
    return 1 / (1 + math.exp(-reward)) if reward >= 0 else math.exp(reward) / (1 + math.exp(reward))
