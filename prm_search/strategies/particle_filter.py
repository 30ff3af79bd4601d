"""Sequential Monte Carlo over reasoning steps, and particle Gibbs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..checks import flag, is_one_of, number
from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, OwnNumbers, Run, at_least, distinct
from .beam import value_of
from .resampling import SCHEMES, effective_size, log_mean_exp, multinomial, normalised

Weights = Literal["increments", "last"]
_CLIP = 1e-7  # its_hub's bound on scores before their logit
AUTO = 0.25  # temperature="auto", in standard deviations; chosen on development problems of the demo's task


@dataclass(frozen=True)
class ParticleFilter:
    """Grow `particles` answers a step at a time, and resample them by their rewards.

    With weights="increments" a step multiplies its particle's weight by exp((v - v_parent) / temperature), v being the
    value of a prefix. The factors telescope, so this is proper sequential Monte Carlo for the distribution

        policy(y) * exp(v(y) / temperature) / Z,

    whatever the value and whenever it resamples (P. Del Moral, A. Doucet, A. Jasra, "Sequential Monte Carlo samplers",
    JRSS B 2006). `Result.log_z` estimates log Z (Z itself without bias), and the final weights weigh
    `select="weighted"` votes. For an implicit pair with v = q and temperature = beta the target is policy * pi_phi /
    pi_ref: the trained model's distribution of answers, relative to its reference.

    With weights="last" a particle's weight is its last value's odds, v / (1 - v), for step scores in [0, 1], as in
    its_hub's particle filter ("A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using
    Particle-Based Monte Carlo Methods", arXiv 2502.01618); these do not telescope, and there is no log_z. its_hub
    resamples multinomially at each step: resample="multinomial", ess=1.0.

    temperature="auto" follows the spread of the values, so that a filter resamples whatever their unit. At each step it
    is a quarter of the standard deviation of what the particles gained since their weights were last equal, over all
    steps of the sweep so far. Such a temperature depends on the particles: there is no stated target, and no log_z.
    Choosing it from the particles is what adaptive tempering does (A. Jasra et al., "Inference for Levy-driven
    stochastic volatility models via adaptive sequential Monte Carlo", Scandinavian Journal of Statistics 2011), there
    by the effective sample size.

    A finished particle keeps its weight and takes part in resampling. With sweeps > 1 each further sweep keeps one
    answer of the one before, drawn by its weight, and draws the others anew around it (particle Gibbs: C. Andrieu,
    A. Doucet, R. Holenstein, "Particle Markov chain Monte Carlo methods", JRSS B 2010); such sweeps resample
    multinomially, and log_z stays the first sweep's.

    Args:
        particles: answers grown at once, of each sweep.
        temperature: > 0, in the unit of the values; or "auto".
        resample: "systematic", "multinomial", "residual" or "stratified".
        ess: resample where the effective sample size is at most this share of the particles; 0 never, 1 always.
        weights: "increments" or "last".
        sweeps: sweeps of particle Gibbs; 1 for a plain filter.
        merge: count equal children on one node.
        value: what weighs; None for what the search ranks by.

    Raises:
        ValueError: a number is out of range, a name is unknown, or weights="last" has temperature="auto"; or, while it
            runs, weights="last" meets a value outside [0, 1].
        TypeError: a number is of another type.
    """

    particles: int = 16
    temperature: float | Literal["auto"] = 1.0
    resample: Literal["systematic", "multinomial", "residual", "stratified"] = "systematic"
    ess: float = 0.5
    weights: Weights = "increments"
    sweeps: int = 1
    merge: bool = True
    value: Value | str | None = None

    def __post_init__(self) -> None:
        flag("merge", self.merge)
        at_least("particles", self.particles)
        at_least("sweeps", self.sweeps)
        if self.sweeps > 1 and self.particles < 2:
            raise ValueError(f"particles={self.particles!r}: sweeps={self.sweeps} needs at least 2, one of them kept")
        if isinstance(self.temperature, str):
            if self.temperature != "auto":
                raise ValueError(f"temperature={self.temperature!r}: it is a finite number > 0, or 'auto'")
            if self.weights == "last":
                raise ValueError("temperature='auto' needs weights='increments', not 'last'")
        else:
            number("temperature", self.temperature, "a finite number > 0", lambda value: 0 < value < math.inf)
        number("ess", self.ess, "a number in [0, 1]", lambda value: 0 <= value <= 1)
        if not is_one_of(self.resample, SCHEMES):
            raise ValueError(f"resample={self.resample!r} is unknown; it is one of {', '.join(sorted(SCHEMES))}")
        if not is_one_of(self.weights, ("increments", "last")):
            raise ValueError(f"weights={self.weights!r}: it is 'increments' or 'last'")
        if self.value is not None:
            resolve_value(self.value)

    def run(self, root: Node) -> Run:
        resampling, choosing = OwnNumbers(root.tree, 0), OwnNumbers(root.tree, 1)
        seen: list[Node] = []
        kept: Node | None = None
        for sweeps_done in range(self.sweeps):
            sweep = _Sweep(self, root, kept, resampling)
            yield from sweep.grow(anew=sweeps_done + 1 < self.sweeps)
            seen += sweep.finished
            if not sweep.particles:  # the budget let the sweep have none
                break
            weights = normalised(sweep.scaled())
            for node in sweep.finished:
                node.weight = node.weight or 0.0
            for node, weight in zip(sweep.particles, weights, strict=True):
                node.weight = (node.weight or 0.0) + float(weight) / self.sweeps
            if kept is None and self.weights == "increments" and self.temperature != "auto":
                root.tree.log_z = sweep.log_z
            kept = sweep.particles[int(multinomial(weights, 1, choosing).argmax())]
        return distinct(seen)


class _Sweep:
    """One pass over all steps.

    Attributes:
        particles: at the end, the finished nodes that were reached, as often as they are particles.
        log_weights: of each particle's node, nats, since weights were last made equal. It is a function of the node:
            particles that share a node have shared their history. With temperature="auto" it is in the unit of the
            values, and `scaled` divides it.
        log_z: sum of the log-mean weights so far, nats.
        finished: every finished node met, repetitions included.
    """

    def __init__(self, config: ParticleFilter, root: Node, kept: Node | None, numbers: OwnNumbers) -> None:
        self.config, self.root, self.numbers = config, root, numbers
        self.kept: list[Node] = [] if kept is None else kept.path()
        self.particles: list[Node] = []
        self.log_weights: dict[Node, float] = {root: 0.0}
        self.log_z = 0.0
        self.finished: list[Node] = []
        self._temperature = 1.0 if isinstance(config.temperature, str) else config.temperature
        self._spread = _Spread() if isinstance(config.temperature, str) else None

    def scaled(self) -> np.ndarray:
        """Return the particles' log weights, [particles] nats."""
        log_weights = np.array([self.log_weights[node] for node in self.particles])
        return log_weights if self._spread is None else log_weights / self._spread.temperature

    def grow(self, *, anew: bool) -> Run:
        """Run the sweep. `anew` says that another one begins at the root after it."""
        config, root = self.config, self.root
        drawn = yield Expand([root], config.particles - bool(self.kept), merge=config.merge, alive=[root])
        depth = 0
        while True:
            self._enter(depth, drawn)
            if all(node.finished for node in self.particles):
                break
            offspring = self._offspring()
            stays: list[Node] = []
            growth = _Growth()
            for index, (node, n) in enumerate(zip(self.particles, offspring, strict=True)):
                if node.finished:
                    stays += [node] * n
                elif n:
                    growth.add(node, n)
                if index == 0 and self.kept and not node.finished:
                    growth.alive.append(node)
            self.particles = stays
            depth += 1
            drawn = yield Expand(
                growth.nodes, growth.numbers, merge=config.merge, alive=[root] if anew else distinct(growth.alive)
            )
        if self.particles:
            self.log_z += log_mean_exp([self.log_weights[node] for node in self.particles])
        return self.finished

    def _enter(self, depth: int, drawn: Sequence[Node]) -> None:
        """Weigh the nodes that were drawn, and make them particles; the kept answer's node is always the first."""
        nodes = [*([self.kept[min(depth, len(self.kept) - 1)]] if self.kept else []), *drawn]
        for node in nodes:
            if node not in self.log_weights:
                self.log_weights[node] = self._log_weight(node)
        self.finished += [node for node in nodes if node.finished]
        self.particles = [*nodes, *self.particles]

    def _log_weight(self, node: Node) -> float:
        value, temperature = value_of(node), self._temperature
        if self.config.weights == "last":
            if not 0 <= value <= 1:
                raise ValueError(
                    f"weights='last' needs values in [0, 1], such as a step PRM's scores by value='last', not {value!r}"
                )
            score = min(max(value, _CLIP), 1 - _CLIP)
            return (math.log(score) - math.log1p(-score)) / temperature
        parent = node.parent
        if parent is None:
            return 0.0
        increment = value - (0.0 if parent.parent is None else value_of(parent))
        # A prefix of infinite value and its child differ by nothing.
        return self.log_weights[parent] + (0.0 if math.isnan(increment) else increment / temperature)

    def _offspring(self) -> Sequence[int]:
        """Count what goes on from each particle, beside the kept answer; where it resamples, weights become equal."""
        config, n, kept = self.config, len(self.particles), bool(self.kept)
        if self._spread is not None:
            self._spread.see(np.array([self.log_weights[node] for node in self.particles]))
        log_weights = self.scaled()
        weights = normalised(log_weights)
        if effective_size(weights) > config.ess * n * (1 + 1e-9):
            return [0 if kept and index == 0 else 1 for index in range(n)]
        scheme = multinomial if kept else SCHEMES[config.resample]
        counts: list[int] = scheme(weights, n - kept, self.numbers).tolist()
        if config.weights == "increments":
            self.log_z += log_mean_exp(log_weights)
            self.log_weights.update(dict.fromkeys(self.particles, 0.0))
        return counts


class _Spread:
    """The spread of what particles gained, within their steps: what temperature="auto" follows.

    Attributes:
        temperature: AUTO standard deviations, in the unit of the values; 1 while nothing differs.
    """

    def __init__(self) -> None:
        self.temperature = 1.0
        self._squares, self._count = 0.0, 0

    def see(self, gains: np.ndarray) -> None:
        """Take in the particles' gains at a step, [particles]."""
        gains = gains[np.isfinite(gains)]
        if gains.size:
            self._squares += float(np.square(gains - gains.mean()).sum())
            self._count += gains.size
        self.temperature = AUTO * math.sqrt(self._squares / max(1, self._count)) or 1.0


class _Growth:
    """The content of an Expand, gathered particle by particle: no node may stand in it more often than its count.

    Attributes:
        nodes, numbers: of Expand.
        alive: the nodes that go on.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.numbers: list[int] = []
        self.alive: list[Node] = []
        self._places: dict[Node, list[int]] = {}
        self._asked: dict[Node, int] = {}

    def add(self, node: Node, n: int) -> None:
        """Ask for n more children of a node, spread evenly over its lineages."""
        places = self._places.setdefault(node, [])
        asked = self._asked.get(node, 0)
        self._asked[node] = asked + n
        for turn in range(asked, asked + n):
            if turn < node.count:
                places.append(len(self.nodes))
                self.nodes.append(node)
                self.numbers.append(1)
                self.alive.append(node)
            else:
                self.numbers[places[turn % node.count]] += 1
