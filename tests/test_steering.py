"""Steering of many requests in somebody else's decode loop, against plain forwards without a cache."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from models import VOCABULARY, naive_rows, tiny

from prm_search.engine.language_model import LanguageModel
from prm_search.engine.pending import Pending
from prm_search.engine.prompts import SHARED_AT_LEAST, SharedPrompts
from prm_search.steering import Steering, Stream
from prm_search.steering.kl_bound import bounded_alpha

INF = float("inf")


@pytest.fixture(scope="module")
def modules():
    return tiny("llama", seed=1), tiny("llama", seed=2)


@pytest.fixture
def warned() -> list[str]:
    return []


def steering_of(modules, capacity=4096, warn=None, policy=None):
    """A Steering over fresh LanguageModels: `of` would hand out one that another test has used."""
    lms = [None if module is policy else LanguageModel(module, capacity=capacity) for module in modules]
    return Steering(*lms, warn=warn), lms


def naive_ratio(modules, ids: Sequence[int]) -> np.ndarray:
    return naive_rows(modules[0], ids)[-1] - naive_rows(modules[1], ids)[-1]


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def prompts(seed: int = 0) -> Iterator[list[int]]:
    """Prompts that have nothing in common: each begins with a token of its own."""
    draw = random.Random(seed)
    for first in range(3, VOCABULARY):
        yield [first, *(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(2, 30)))]


class Batch:
    """Requests in rows, as an engine moves them about, with a greedy decoder that knows nothing of the steering."""

    def __init__(self, steering: Steering, modules, seed: int) -> None:
        self.steering, self.modules = steering, modules
        self.draw = random.Random(seed)
        self.rows: dict[int, tuple[Stream, list[int]]] = {}
        self.fresh = prompts(seed)
        self.encoded = 0
        self.step = 0

    def add(self) -> None:
        live = [(list(s.prompt), out) for s, out in self.rows.values()]
        kind = self.draw.random()
        if live and kind < 0.3:  # another child of a prompt
            prompt, output = self.draw.choice(live)[0], []
        else:
            prompt, output = next(self.fresh), []
            if kind > 0.8:  # one that was preempted comes back
                output = [self.draw.randrange(3, VOCABULARY) for _ in range(4)]
        if not any(prompt == other for other, _ in live):
            self.encoded += len(prompt)
        alpha, bound = self.draw.choice([(0.0, INF), (0.7, INF), (-1.5, INF), (2.0, 0.05)])
        stream = self.steering.open(prompt, output, alpha=alpha, max_kl=bound, observed=self.draw.random() < 0.5)
        self.encoded += len(output)
        row = next(i for i in range(99) if i not in self.rows)
        self.rows[row] = stream, output

    def remove(self) -> None:
        stream, _ = self.rows.pop(self.draw.choice(list(self.rows)))
        self.steering.close(stream)
        self.check(stream)

    def move(self) -> None:
        a, b = self.draw.sample(range(8), 2)
        self.rows = {{a: b, b: a}.get(row, row): value for row, value in self.rows.items()}

    def advance(self) -> None:
        self.step += 1
        logits = logits_of(10, self.step)
        before = logits.clone()
        some = {row: (s, out) for row, (s, out) in self.rows.items() if self.draw.random() < 0.8}
        self.steering.steer(logits, {row: stream for row, (stream, _) in some.items()})
        for row in range(10):
            if row not in some or some[row][0].alpha == 0:
                assert torch.equal(logits[row], before[row])
                continue
            stream, output = some[row]
            ratio = naive_ratio(self.modules, [*stream.prompt, *output])
            alpha = stream.alpha
            if stream.max_kl < INF:
                given = [torch.tensor([value]) for value in (alpha, stream.max_kl)]
                alpha = bounded_alpha(before[row : row + 1], torch.from_numpy(ratio)[None], *given).item()
            assert np.abs(logits[row].numpy() - (before[row].numpy() + alpha * ratio)).max() < 2e-4
        for row, (_, output) in some.items():
            if self.draw.random() < 0.7:  # the others were half prefilled: what was sampled is thrown away
                output.append(int(logits[row].argmax()))
                self.encoded += 1

    def check(self, stream: Stream) -> None:
        """Every token sampled since the stream was opened has its log-ratio, the last one too."""
        assert stream.fault is None
        if not stream.observed:
            assert not stream.log_ratios
            return
        assert len(stream.log_ratios) == len(stream.output) - stream.first
        for i, value in enumerate(stream.log_ratios, stream.first):
            ratio = naive_ratio(self.modules, [*stream.prompt, *stream.output[:i]])
            assert value == pytest.approx(ratio[stream.output[i]], abs=1e-4)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("capacity", [4096, 120])
def test_any_mixture_of_requests_equals_plain_forwards(modules, seed, capacity, warned):
    steering, lms = steering_of(modules, capacity, warned.append)
    batch = Batch(steering, modules, seed)
    events = [batch.add, batch.add, batch.advance, batch.advance, batch.advance, batch.move, batch.remove]
    for _ in range(60):
        event = batch.draw.choice(events)
        full = len(batch.rows) >= 8
        if (event == batch.add and full) or (event in (batch.remove, batch.move) and len(batch.rows) < 2):
            continue
        event()
        assert all(lm.tree.used <= capacity for lm in lms)
    forwards = [lm.forwards for lm in lms]
    last = {row: stream for row, (stream, _) in batch.rows.items()}
    steering.steer(logits_of(10), last)
    assert capacity < 4096 or all(lm.forwards <= before + 1 for lm, before in zip(lms, forwards, strict=True))
    steering.steer(logits_of(10), last)
    while batch.rows:
        batch.remove()
    assert not warned
    assert steering.live == 0
    assert all(lm.tree.used == 0 for lm in lms)


def test_every_token_is_encoded_once_and_a_step_is_one_forward(modules):
    steering, lms = steering_of(modules)
    source = prompts(5)
    families = [next(source) for _ in range(3)]
    outputs = [[] for _ in range(9)]
    streams = {i: steering.open(families[i % 3], out) for i, out in enumerate(outputs)}
    for step in range(6):
        logits = logits_of(9, step)
        steering.steer(logits, streams)
        assert [lm.forwards for lm in lms] == [step + 1] * 2
        for row, out in enumerate(outputs):
            out.append(int(logits[row].argmax()))
    steering.steer(logits_of(9), streams)
    expected = sum(map(len, families)) + sum(map(len, outputs))
    for lm in lms:
        assert steering.meter.counts["encoded", lm.id] == expected
        assert steering.meter.counts["reencoded", lm.id] == 0
    steering.steer(logits_of(9), streams)  # nothing new: half-prefilled rows come again
    assert [lm.forwards for lm in lms] == [7, 7]


def test_what_two_prompts_begin_with_is_encoded_once(modules):
    steering, lms = steering_of(modules)
    system = list(range(5, 5 + 2 * SHARED_AT_LEAST))
    heads = [[*system, 50, 51, 52], [*system, 60, 61], system, [*system[:-4], 9]]
    streams = {}
    for row, prompt in enumerate(heads):
        streams[row] = steering.open(prompt, [])
        logits = logits_of(4)
        before = logits.clone()
        steering.steer(logits, streams)
        for at, other in enumerate(heads[: row + 1]):
            assert np.abs((logits - before)[at].numpy() - naive_ratio(modules, other)).max() < 1e-4
    # Each fork inside another prompt encodes the token before it once more.
    assert steering.meter.counts["encoded", lms[0].id] == len(system) + 3 + 2 + 0 + 1
    assert steering.meter.counts["reencoded", lms[0].id] == 3
    steering.close(streams.pop(0))
    logits = logits_of(4)
    before = logits.clone()
    steering.steer(logits, streams)
    for at, stream in streams.items():
        assert np.abs((logits - before)[at].numpy() - naive_ratio(modules, stream.prompt)).max() < 1e-4
    for stream in streams.values():
        steering.close(stream)
    assert lms[0].tree.used == 0


def test_prompts_that_begin_alike_for_a_few_tokens_stand_alone():
    lm = LanguageModel(tiny("llama"), capacity=64)
    shared = SharedPrompts(lm.tree)
    a = shared.open((1, 2, 3, 4))
    b = shared.open((1, 2, 3, 5))
    assert a.parent is not b.parent
    assert b.parent.parent is None


def test_the_policy_stands_for_its_half(modules):
    policy = modules[1]
    steering, lms = steering_of(modules, policy=policy)
    outputs: list[list[int]] = [[], []]
    heads = [[5, 6, 7], [8, 9]]
    streams = {i: steering.open(heads[i], outputs[i], alpha=0.8, observed=True) for i in range(2)}
    for _ in range(5):
        paths = [[*heads[i], *outputs[i]] for i in range(2)]
        logits = torch.from_numpy(np.stack([naive_rows(policy, path)[-1] for path in paths])).float() + 3.0
        logits[1, 11] = -INF
        before = logits.clone()
        steering.steer(logits, streams)
        for i in range(2):
            moved = (logits - before)[i].numpy()
            expected = 0.8 * naive_ratio(modules, paths[i])
            allowed = np.isfinite(before[i].numpy())
            # Where tokens are masked, the policy's half is that of the allowed ones: a constant, no matter to sampling.
            offset = (moved - expected)[allowed]
            assert np.abs(offset - offset.mean()).max() < 1e-4
            assert i == 1 or abs(offset.mean()) < 1e-4
        assert logits[1, 11] == -INF
        for i in range(2):
            outputs[i].append(int(logits[i].argmax()))
    assert lms[1] is None
    assert lms[0].forwards == 5
    steering.close(streams[0])
    expected = [naive_ratio(modules, [*heads[0], *outputs[0][:i]])[outputs[0][i]] for i in range(5)]
    assert streams[0].log_ratios == pytest.approx(expected, abs=1e-4)


def test_both_halves_cannot_be_the_policy():
    with pytest.raises(ValueError, match="both the policy"):
        Steering(None, None)


def test_masks_and_padding_stay(modules):
    steering, _ = steering_of(modules)
    logits = torch.cat([logits_of(2), torch.full((2, 8), -3.0)], dim=1)
    logits[0, 20] = -INF
    before = logits.clone()
    steering.steer(logits, {0: steering.open([5, 6], []), 1: steering.open([7], [])})
    assert logits[0, 20] == -INF
    assert torch.equal(logits[:, VOCABULARY:], before[:, VOCABULARY:])
    assert (logits[:, :VOCABULARY] != before[:, :VOCABULARY]).sum() > VOCABULARY


@pytest.mark.parametrize(
    ("prompt", "output", "message"),
    [
        ([], [], "no token ids"),
        ([5, VOCABULARY], [], f"token id {VOCABULARY} lies outside"),
        ([5], [-1], "token id -1 lies outside"),
        ([5] * 257, [], "257 tokens exceed the pair's context, or its KV capacity, of 256"),
    ],
)
def test_a_request_that_cannot_be_steered_says_so_once(modules, warned, prompt, output, message):
    steering, lms = steering_of(modules, warn=warned.append)
    stream = steering.open(prompt, output)
    logits = logits_of(1)
    before = logits.clone()
    for _ in range(3):
        steering.steer(logits, {0: stream})
    assert len(warned) == 1
    assert message in warned[0]
    assert message in stream.fault
    assert torch.equal(logits, before)
    steering.close(stream)
    assert lms[0].forwards == 0


def test_a_request_that_grows_out_of_the_context_goes_on_unguided(modules, warned):
    steering, _ = steering_of(modules, capacity=8, warn=warned.append)
    outputs = [[], []]
    streams = {0: steering.open([5, 6, 7, 8, 9, 10], outputs[0]), 1: steering.open([11], outputs[1])}
    for _ in range(5):
        logits = logits_of(2)
        before = logits.clone()
        steering.steer(logits, streams)
        changed = (logits != before).any(dim=1).tolist()
        assert changed == [len(outputs[0]) <= 2, True]
        for out in outputs:
            out.append(12)
    assert len(warned) == 1
    assert "unguided after 3 tokens: 9 tokens exceed" in warned[0]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("when", ["launched", "read"])
@pytest.mark.parametrize("guilty", [0, 3, 6])
def test_a_fault_in_one_row_leaves_the_others(modules, warned, monkeypatch, guilty, when, which):
    """Whatever raises, only the row that it raises for is given up; the rest are steered in the same call."""
    steering, lms = steering_of(modules, warn=warned.append)
    source = prompts(1)
    heads = [next(source) for _ in range(7)]
    outputs = [[] for _ in heads]
    streams = {i: steering.open(heads[i], outputs[i], observed=True) for i in range(7)}
    steering.steer(logits_of(7), streams)
    for out in outputs:
        out.append(4)
    plain, culprit = LanguageModel.begin_extend, streams[guilty]

    def fail():
        raise torch.OutOfMemoryError("no memory for this row")

    def begin(self, branches, ids, want="target"):
        if self is lms[which] and any(branch in culprit._branches for branch in branches):
            return fail() if when == "launched" else Pending(fail)
        return plain(self, branches, ids, want)

    monkeypatch.setattr(LanguageModel, "begin_extend", begin)
    logits = logits_of(7, 1)
    before = logits.clone()
    steering.steer(logits, streams)
    for i in range(7):
        moved = (logits - before)[i].numpy()
        expected = 0 if i == guilty else naive_ratio(modules, [*heads[i], 4])
        assert np.abs(moved - expected).max() < 1e-4
    assert len(warned) == 1
    assert "unguided after 1 tokens: OutOfMemoryError: no memory for this row" in warned[0]
    monkeypatch.undo()
    for out in outputs:
        out.append(4)
    steering.steer(logits_of(7), streams)
    assert len(warned) == 1
    assert steering.meter.counts["encoded", lms[0].id] == sum(map(len, heads)) + (7 if which else 6) + 6


def test_nan_weights_end_guidance_not_the_engine(warned):
    broken = tiny("llama", seed=4)
    with torch.no_grad():
        broken.get_input_embeddings().weight[7] = math.nan
    steering, _ = steering_of((tiny("llama", seed=1), broken), warn=warned.append)
    streams = {0: steering.open([5, 6], []), 1: steering.open([5, 7], [])}
    logits = logits_of(2)
    before = logits.clone()
    steering.steer(logits, streams)
    assert (logits != before).any(dim=1).tolist() == [True, False]
    assert len(warned) == 1
    assert "not numbers" in warned[0]


def test_an_output_that_was_rewound_is_read_again(modules):
    steering, _ = steering_of(modules)
    output: list[int] = []
    stream = steering.open([5, 6, 7], output, observed=True)
    for token in (8, 9, 10):
        steering.steer(logits_of(1), {0: stream})
        output.append(token)
    steering.steer(logits_of(1), {0: stream})
    del output[1:]
    logits = logits_of(1)
    before = logits.clone()
    steering.steer(logits, {0: stream})
    assert np.abs((logits - before)[0].numpy() - naive_ratio(modules, [5, 6, 7, 8])).max() < 1e-4
    output.append(20)
    steering.close(stream)
    expected = [naive_ratio(modules, [5, 6, 7])[8], naive_ratio(modules, [5, 6, 7, 8])[20]]
    assert stream.log_ratios == pytest.approx(expected, abs=1e-4)


def test_thrashing_is_told_once(modules, warned):
    steering, _ = steering_of(modules, capacity=220, warn=warned.append)
    draw = random.Random(0)
    heads = [[i, *(draw.randrange(3, VOCABULARY) for _ in range(99))] for i in range(3, 7)]
    streams = {i: steering.open(head, []) for i, head in enumerate(heads)}
    for _ in range(30):
        for stream in streams.values():
            stream.output.append(draw.randrange(3, VOCABULARY))
        steering.steer(logits_of(4), streams)
    assert len(warned) == 1
    assert "a capacity above 220 tokens" in warned[0]
    assert all(stream.fault is None for stream in streams.values())


@pytest.mark.parametrize(("scale", "spread"), [(1.0, 1.0), (5.0, 5.0), (3.0, 0.1)])
@pytest.mark.parametrize("bound", [1e-3, 0.05, 1.0])
def test_the_bound_holds_and_is_used_up(scale, spread, bound):
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(32, 300, generator=draw) * scale
    ratio = torch.randn(32, 280, generator=draw) * spread
    logits[:, ::7] = -INF
    ratio[:, 5] = -INF
    alpha = torch.full((32,), 3.0)
    alpha[::2] *= -1
    got = bounded_alpha(logits, ratio, alpha, torch.full((32,), bound))

    def kl(a: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(32, 300, dtype=torch.float64)
        wide[:, :280] = torch.where(ratio.isfinite(), ratio, 0.0)
        steered = (logits.double() + a.double()[:, None] * wide).log_softmax(-1)
        parts = steered.exp() * (steered - logits.double().log_softmax(-1))
        return torch.where(parts.isnan(), 0.0, parts).sum(-1)

    reaches = kl(alpha) > bound
    assert torch.equal(got[~reaches], alpha[~reaches])
    assert (kl(got) <= bound * 1.001).all()
    assert (kl(got)[reaches] >= bound * 0.99).all()
    assert (got * alpha > 0).all()


def test_a_row_without_any_token_keeps_its_strength():
    logits = torch.full((1, 8), -INF)
    got = bounded_alpha(logits, torch.ones(1, 8), torch.tensor([2.0]), torch.tensor([0.1]))
    assert got.tolist() == [2.0]


# --- one token for each stream --------------------------------------------------------------------------------------


def steered(steering: Steering, tokens: Sequence[int], prompt: Sequence[int] = (3, 4, 5)) -> torch.Tensor:
    """The logits of a stream that reads these tokens, one a call."""
    output: list[int] = []
    stream, rows = steering.open(prompt, output), []
    for token in tokens:
        rows.append(logits_of(1, token))
        steering.steer(rows[-1], {0: stream})
        output.append(token)
    assert stream.fault is None
    steering.close(stream)
    return torch.cat(rows)


def test_a_token_of_a_stream_is_replayed_from_a_tape_and_is_the_same(modules):
    """To the bit: the first are eager, one is recorded, and after those that run both ways none is without a tape."""
    results = []
    for taped in (True, False):
        steering, lms = steering_of(modules)
        for lm in lms:
            lm.runner.taped = taped
        results.append(steered(steering, range(10, 30)))
        replays = [lm.token_steps.tapes.replays for lm in lms]
        assert all(replays) if taped else not any(replays)
    assert torch.equal(*results)


def test_weights_that_change_between_requests_are_seen_by_the_next():
    pair = tiny("llama", seed=1), tiny("llama", seed=2)
    steering, lms = steering_of(pair)
    steered(steering, range(10, 30))
    assert all(lm.token_steps.tapes.replays for lm in lms)
    layer = pair[0].model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 3)  # another tensor: what tapes hold is the old one
    got = steered(steering, range(10, 20))
    want = [logits_of(1, 10 + i).numpy()[0] + naive_ratio(pair, [3, 4, 5, *range(10, 10 + i)]) for i in range(10)]
    assert np.abs(got.numpy() - np.stack(want)).max() < 2e-4
