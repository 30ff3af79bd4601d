"""One step ahead: the next forward is launched before the host reads the tokens it starts from; no draw changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeScorer
from growing import PROMPT, TOKENIZER, policy_of
from models import tiny
from torch.overrides import TorchFunctionMode

import prm_search as ps
from prm_search.engine import decoder as decoder_module
from prm_search.engine.language_model import LanguageModel
from prm_search.engine.row_encoder import RowEncoder
from prm_search.sampling import Request, Sampling
from prm_search.tree import Prompt, SearchTree

RULE = ps.StepRule(delimiter=[chr(i) for i in range(33, 127, 4)], max_tokens=6)
READS = frozenset(("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"))


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device that works beside the host."""
    monkeypatch.setattr(decoder_module, "AHEAD_ON", frozenset(("cpu",)))


def test_ahead_is_on_where_a_device_works_beside_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(512)
    assert not policy._decoder.ahead
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda", 0))
    assert policy.session()._decoder.ahead


STRATEGIES: list[ps.Strategy] = [
    ps.BestOfN(5), ps.Beam(2, 3), ps.Beam(2, 2, merge=False), ps.DVTS(2, 2, 2), ps.Lookahead(2, 2, steps=1),
    ps.ParticleFilter(4), ps.MCTS(5, 2), ps.Rebase(4), ps.AdaptiveBranch(6), ps.SelfConsistency(4),
]  # fmt: skip


def searched(policy: ps.HFPolicy, strategy: ps.Strategy, pair: ps.Scorer, **options: Any) -> list[Any]:
    prompts = [PROMPT, PROMPT[5:30], PROMPT]
    results = ps.search(
        prompts, policy=policy, scorer=pair, strategy=strategy, steps=RULE, max_new_tokens=26, seed=3,
        answer=lambda text: text[-1:], **options,
    )  # fmt: skip
    return [
        (
            [(tuple(node.path_ids()), node.finish) for node in result.candidates],
            [tuple(node.token_ids) for node in result.tree.nodes[1:]],
            dict(result.usage.sampled_tokens),
            dict(result.usage.encoded_tokens),
        )
        for result in results
    ]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: type(one).__name__)
def test_no_strategy_draws_or_counts_otherwise(strategy: ps.Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(decoder_module, "AHEAD_ON", frozenset(devices))
        policy = policy_of(4096)
        prm = LanguageModel.of(tiny(seed=1).double(), capacity=4096)
        found.append(searched(policy, strategy, ps.ImplicitPRM(prm, policy, tokenizer=TOKENIZER)))
        assert (policy.lm.wasted > 0) == bool(devices)
        assert policy.lm.tree.used == 0
    assert found[0] == found[1]


def test_steering_models_are_ahead_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(decoder_module, "AHEAD_ON", frozenset(devices))
        policy = policy_of(4096)
        prm = LanguageModel.of(tiny(seed=1).double(), capacity=4096)
        pair = ps.ImplicitPRM(prm, policy, tokenizer=TOKENIZER)
        found.append(searched(policy, ps.Steer(0.7, n=3), pair))
        assert (prm.wasted > 0) == bool(devices)
        assert prm.wasted == policy.lm.wasted
    assert found[0] == found[1]


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a device, outside the one transfer that it knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.allowed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and not self.allowed:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def watched(monkeypatch: pytest.MonkeyPatch, events: list[str], reads: Reads) -> None:
    """Write down when a copy of the tokens begins, when a forward is launched, and when the host waits."""
    copy: Callable[..., Any] = decoder_module.begin_copy
    launch = RowEncoder.begin_ahead

    def begin_copy(columns: Sequence[torch.Tensor]) -> Callable[[], np.ndarray]:
        events.append("copy")
        wait = copy(columns)

        def waited() -> np.ndarray:
            events.append("wait")
            reads.allowed = True
            numbers: np.ndarray = wait()
            reads.allowed = False
            return numbers

        return waited

    def begin_ahead(lm: RowEncoder, growth: Any, tokens: torch.Tensor) -> Any:
        pending = launch(lm, growth, tokens)
        events.append("launch" if pending is not None else "no room")
        return pending

    monkeypatch.setattr(decoder_module, "begin_copy", begin_copy)
    monkeypatch.setattr(RowEncoder, "begin_ahead", begin_ahead)


@pytest.mark.parametrize("mode", ["auto", "packed"])  # a static step on a CPU asks whether slots are padding
def test_the_host_reads_once_a_step_and_after_the_launch(
    mode: Any, on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    reads = Reads()
    watched(monkeypatch, events, reads)
    policy = policy_of(4096)
    policy.lm.token_steps.set_mode(mode)
    session, tree = policy.session(), SearchTree(Prompt(token_ids=PROMPT))
    sampling = Sampling(ps.StepRule(None, max_tokens=None), max_new_tokens=40)
    session.submit([Request.draw(tree.root, 4, sampling, until="end", merge=False)])
    session.advance()
    for _ in range(12):
        events.clear()
        with reads:
            session.advance()
        assert events == ["copy", "launch", "wait"]
    assert not reads.names
    session.release(tree)


def test_a_scorer_is_called_while_the_others_next_forward_is_under_way(
    on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that have ended are scored in that round: not once all others have, and no other row waits for it."""
    events: list[str] = []
    watched(monkeypatch, events, Reads())
    policy = policy_of(4096)
    score = FakeScorer.score_nodes

    def scored(scorer: FakeScorer, nodes: Sequence[ps.Node]) -> None:
        events.append(f"score {len(nodes)}")
        score(scorer, nodes)

    monkeypatch.setattr(FakeScorer, "score_nodes", scored)
    prompts = [PROMPT[i:] for i in range(4)]
    results = ps.search(
        prompts, policy=policy, scorer=FakeScorer(), strategy=ps.Beam(1, 2), steps=RULE, max_new_tokens=30, seed=1
    )
    at = [i for i, event in enumerate(events) if event.startswith("score")]
    beside = [i for i in at if events[i - 2 : i] == ["launch", "wait"] and events[i + 1 : i + 2] == ["copy"]]
    assert len(beside) > len(at) / 2  # of the rest, what is scored last has no row beside it
    assert len(at) > max(len(result.candidates[0].path()) for result in results)  # prompts go on each by itself
