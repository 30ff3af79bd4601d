"""Steering inside vLLM (V1, on a CPU) against greedy decoding by plain transformers forwards without a cache."""

from __future__ import annotations

import gc
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_models
from vllm_models import plain_rows

pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.envs import disable_envs_cache
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdateBuilder, MoveDirectionality

from prm_search.demo import pair_dir
from prm_search.integrations.vllm.logits_processor import ImplicitPRMLogitsProcessor
from prm_search.integrations.vllm.runner_rows import BatchRows
from prm_search.steering.kl_bound import bounded_alpha

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
models = vllm_models.models
NAME = "prm_search.integrations.vllm.logits_processor:ImplicitPRMLogitsProcessor"
BETA, EOS = 0.05, 2
INF = float("inf")


class Spy(ImplicitPRMLogitsProcessor):
    """Counts what vLLM asks for."""

    made: list[Spy] = []  # noqa: RUF012

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.made.append(self)
        self.steps = self.removed = self.moved = self.returned = 0

    def update_state(self, change: Any) -> None:
        if change is not None:
            self.removed += len(change.removed)
            self.moved += len(change.moved)
            self.returned += sum(bool(output) for *_, output in change.added)
        super().update_state(change)

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        self.steps += bool(self._batch.requests)
        return super().apply(logits, ctx)


def engine(section: dict[str, Any], **given: Any) -> LLM:
    return LLM(
        str(pair_dir() / "policy"), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=6,
        disable_log_stats=True, logprobs_mode="processed_logprobs", additional_config={"prm_search": section},
        **{"logits_processors": [Spy], "max_num_batched_tokens": 48, "block_size": 32} | given,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vllm") / "rewards.jsonl"


@pytest.fixture(scope="module")
def llm(report):
    """Both models of the pair, prompts split over steps, and so few blocks that requests are preempted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        disable_envs_cache()
        section = {"model": str(pair_dir()), "report": str(report), "steps": {"delimiter": ";"}}
        made = engine(section, num_gpu_blocks_override=12)
        yield made
        del made
        gc.collect()


def prompts(count: int, seed: int, shortest: int = 3, longest: int = 90) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 38) for _ in range(draw.randrange(shortest, longest))] for _ in range(count)]


def greedy(
    models: Sequence[Any], prompt: Sequence[int], alpha: float, length: int, max_kl: float = INF, stops: bool = True
) -> tuple[list[int], list[float], list[float]]:
    """Tokens, their log-probabilities under the steered policy, and their log-ratios."""
    output: list[int] = []
    logprobs, ratios = [], []
    while len(output) < length and not (stops and EOS in output) and len(prompt) + len(output) < 128:
        policy, prm, reference = plain_rows(models, [*prompt, *output])
        ratio = prm - reference
        strength = torch.tensor([alpha])
        if max_kl < INF:
            strength = bounded_alpha(policy[None], ratio[None], strength, torch.tensor([max_kl]))
        steered = policy + strength * ratio
        output.append(int(steered.argmax()))
        logprobs.append(steered.log_softmax(-1)[output[-1]].item())
        ratios.append(ratio[output[-1]].item())
    return output, logprobs, ratios


def params(alpha: float | None, length: int = 24, **given: Any) -> SamplingParams:
    extra = {key: given.pop(key) for key in list(given) if key.startswith("prm_")}
    if alpha is not None:
        extra["prm_alpha"] = alpha
    return SamplingParams(
        temperature=0, max_tokens=length, logprobs=0, detokenize=False, extra_args=extra or None, **given
    )


def ask(llm: LLM, heads: Sequence[Sequence[int]], wants: Sequence[SamplingParams]) -> list[Any]:
    found = llm.generate([{"prompt_token_ids": list(head)} for head in heads], list(wants), use_tqdm=False)
    return [answer.outputs[0] for answer in found]


def same(got: Any, expected: tuple[list[int], list[float], list[float]]) -> None:
    tokens, logprobs, _ = expected
    assert list(got.token_ids) == tokens
    for token, at, value in zip(tokens, got.logprobs, logprobs, strict=True):
        assert at[token].logprob == pytest.approx(value, abs=1e-4)


def _exact(got: Any) -> list[float]:
    return [at[token].logprob for token, at in zip(got.token_ids, got.logprobs, strict=True)]


def records(report: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in report.read_text().splitlines()]


def flush(llm: LLM) -> None:
    """An engine that is driven by `generate` hears of the end of its last requests at its next step."""
    ask(llm, [[5]], [params(None, 2)])


def test_greedy_tokens_equal_plain_forwards(llm, models, report):
    """Mixed strengths, uneven lengths, prompts in chunks, more requests than rows, preemption."""
    spy = Spy.made[-1]
    heads = prompts(20, seed=0)
    alphas = [None, 0.5, 1.0, -1.0, 3.0, None, 0.0, 2.0, 1.5, -0.5] * 2
    lengths = [20, 30, 8, 25, 40, 12, 5, 33, 38, 1] * 2
    wants = [params(a, n) for a, n in zip(alphas, lengths, strict=True)]
    got = ask(llm, heads, wants)
    for answer, head, alpha, length in zip(got, heads, alphas, lengths, strict=True):
        same(answer, greedy(models, head, alpha or 0.0, length))
    assert spy.returned > 0, "nobody was preempted: give the engine fewer blocks"
    assert spy.moved > 0
    flush(llm)
    assert spy._batch.requests == {}
    assert spy._batch.guide.steering.live == 0


def test_one_forward_a_model_and_step_and_each_token_once(llm):
    spy = Spy.made[-1]
    steering = spy._batch.guide.steering
    heads = prompts(4, seed=3, shortest=5, longest=12)
    before, steps = [lm.forwards for lm in steering._lms], spy.steps
    counts = dict(steering.meter.counts)
    got = ask(llm, heads, [params(1.0, 10, ignore_eos=True)] * 4)
    assert [len(answer.token_ids) for answer in got] == [10] * 4
    # The prompts fit one step, so they take 10 steps; the last token of each is never encoded.
    assert spy.steps - steps == 10
    for lm, forwards in zip(steering._lms, before, strict=True):
        assert lm.forwards - forwards == 10
        encoded = steering.meter.counts["encoded", lm.id] - counts.get(("encoded", lm.id), 0)
        assert encoded == sum(map(len, heads)) + 4 * 9
    flush(llm)


def test_children_share_their_prompt(llm):
    steering = Spy.made[-1]._batch.guide.steering
    before = dict(steering.meter.counts)
    head = prompts(1, seed=4, shortest=40, longest=41)[0]
    want = SamplingParams(n=4, temperature=1.0, max_tokens=6, ignore_eos=True, extra_args={"prm_alpha": 1.0})
    (answer,) = llm.generate([{"prompt_token_ids": head}], want, use_tqdm=False)
    assert len(answer.outputs) == 4
    for lm in steering._lms:
        encoded = steering.meter.counts["encoded", lm.id] - before.get(("encoded", lm.id), 0)
        assert encoded == 40 + 4 * 5
    flush(llm)


def test_bounded_rows(llm, models):
    heads = prompts(5, seed=5, longest=40)
    bounds = [0.01, 0.1, 1.0, 50.0, 0.05]
    got = ask(llm, heads, [params(4.0, 12, prm_max_kl=bound) for bound in bounds])
    for answer, head, bound in zip(got, heads, bounds, strict=True):
        same(answer, greedy(models, head, 4.0, 12, bound))


def test_requests_that_did_not_opt_in_are_bit_identical(llm):
    heads = prompts(4, seed=6, longest=30)
    spy = Spy.made[-1]
    steps = spy.steps
    alone = ask(llm, heads, [params(None, ignore_eos=True)] * 4)  # batches of the same shape, so the same rounding
    assert spy.steps == steps
    mixed = ask(llm, heads, [params(a, ignore_eos=True) for a in (None, 2.0, None, 0.0)])
    assert mixed[1].token_ids != alone[1].token_ids
    for i in (0, 2, 3):
        assert mixed[i].token_ids == alone[i].token_ids
        assert _exact(mixed[i]) == _exact(alone[i])


def test_rewards_are_reported(llm, models, report):
    heads = prompts(9, seed=7, shortest=40, longest=80)
    lengths = [10, 40, 45, 1, 38, 48, 12, 43, 29]
    alphas = [1.0, None, 0.5, 2.0, 1.0, None, -1.0, 1.0, 0.7]
    already = len(records(report))
    returned = Spy.made[-1].returned
    wants = [
        params(alpha, n, prm_report=f"request-{i}", ignore_eos=i % 3 != 0)
        for i, (alpha, n) in enumerate(zip(alphas, lengths, strict=True))
    ]
    got = ask(llm, heads, wants)
    flush(llm)
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records(report)[already:]:
        found.setdefault(record["key"], []).append(record)
    assert len(found) == 9
    assert Spy.made[-1].returned > returned, "nobody was preempted"
    for i, (answer, head, alpha, length) in enumerate(zip(got, heads, alphas, lengths, strict=True)):
        tokens, _, ratios = greedy(models, head, alpha or 0.0, length, stops=i % 3 == 0)
        parts = found[f"request-{i}"]  # one, and one more for each time it was preempted
        assert [part["first"] for part in parts] == [
            sum(len(part["token_ids"]) for part in parts[:k]) for k in range(len(parts))
        ]
        assert [t for part in parts for t in part["token_ids"]] == tokens == list(answer.token_ids)
        rewards = [r for part in parts for r in part["token_rewards"]]
        assert rewards == pytest.approx([BETA * r for r in ratios], abs=1e-5)
        last = parts[-1]
        assert last["finish"] == ("stop" if tokens[-1] == EOS and i % 3 == 0 else "length")
        assert all(part["finish"] is None for part in parts[:-1])
        assert last["unguided"] is None
        assert (last["alpha"], last["prompt_tokens"]) == (alpha or 0.0, len(head))
        assert last["step_ends"][-1] == len(last["token_ids"])
        assert sum(last["step_rewards"]) == pytest.approx(last["q"][-1], abs=1e-6)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"prm_alpha": "much"}, "prm_alpha='much': a number from -1e6 to 1e6 is needed"),
        ({"prm_alpha": math.nan}, "prm_alpha=nan"),
        ({"prm_alpha": [1.0]}, "prm_alpha="),
        ({"prm_alpha": True}, "prm_alpha=True"),
        ({"prm_alpha": 1.0, "prm_max_kl": 0}, "prm_max_kl=0"),
        ({"prm_max_kl": 0.1}, "prm_max_kl=0.1 bounds prm_alpha, which is missing"),
        ({"prm_alpha": 1.0, "prm_report": ""}, "prm_report=''"),
        ({"prm_alhpa": 1.0}, "prm_alhpa: unknown"),
    ],
)
def test_bad_arguments_are_refused_before_they_reach_the_engine(llm, extra, message):
    with pytest.raises((VLLMValidationError, ValueError), match=message.replace("(", r"\(").replace("[", r"\[")):
        llm.generate([{"prompt_token_ids": [5]}], SamplingParams(extra_args=extra), use_tqdm=False)


def test_a_fault_in_one_request_ends_its_guidance_only(llm, models, monkeypatch):
    from prm_search.engine.language_model import LanguageModel

    plain = LanguageModel.extend

    def extend(self, branches, ids, want="target"):
        if any(branch.path_ids()[0] == 30 and branch.length > 8 for branch in branches):
            raise RuntimeError("a fault that only this request has")
        return plain(self, branches, ids, want)

    heads = [[30, 5, 6], [31, 5, 6], [32, 5, 6, 7]]
    monkeypatch.setattr(LanguageModel, "extend", extend)
    got = ask(llm, heads, [params(2.0, 12, ignore_eos=True)] * 3)
    monkeypatch.undo()
    for answer, head in list(zip(got, heads, strict=True))[1:]:
        expected = greedy(models, head, 2.0, 12)[0]
        assert list(answer.token_ids)[: len(expected)] == expected
    assert len(got[0].token_ids) == 12
    flush(llm)
    assert Spy.made[-1]._batch.guide.steering.live == 0


def test_the_policy_stands_for_the_reference(models, tmp_path, monkeypatch):
    """Loaded by name in a process of its own: only the PRM is run, and what is steered is the same."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    disable_envs_cache()  # an engine started earlier in this process has made vLLM remember another value
    report = tmp_path / "rewards.jsonl"
    section = {"model": str(pair_dir()), "reference": "policy", "report": str(report), "capacity": 1000}
    llm = engine(section, logits_processors=[NAME])
    heads = prompts(8, seed=8)
    alphas = [1.0, None, 2.0, -1.0, 0.5, 3.0, 1.0, 1.0]
    got = ask(llm, heads, [params(a, 20, prm_report=i) for i, a in enumerate(alphas)])
    for answer, head, alpha in zip(got, heads, alphas, strict=True):
        same(answer, greedy(models, head, alpha or 0.0, 20))
    # A bias would stand in both halves: such a request is not guided, and says so.
    biased = ask(llm, heads[:1], [params(1.0, 5, prm_report="biased", logit_bias={7: 1.0}, ignore_eos=True)])
    assert len(biased[0].token_ids) == 5
    # An engine with a process of its own needs no further request to see an end.
    while not any(record["key"] == "biased" for record in records(report)):
        time.sleep(0.1)
    found = {record["key"]: record for record in records(report)}
    assert "logit_bias" in found["biased"]["unguided"]
    for i, (head, alpha) in enumerate(zip(heads, alphas, strict=True)):
        expected = [BETA * r for r in greedy(models, head, alpha or 0.0, 20)[2]]
        assert found[i]["token_rewards"] == pytest.approx(expected, abs=1e-5)


def test_a_token_that_is_not_told_ends_guidance():
    """Async scheduling: -1 stands where a processor from an entry point would read a token."""
    told: list[tuple[Any, str]] = []
    guide = SimpleNamespace(give_up=lambda guided, reason: told.append((guided, reason)))
    batch = BatchRows(guide)
    batch.requests = {
        i: SimpleNamespace(stream=SimpleNamespace(output=out)) for i, out in enumerate([[], [5], [5, -1]])
    }
    assert batch.rows() is batch.requests
    assert [guided for guided, _ in told] == [batch.requests[2]]
    assert "--logits-processors" in told[0][1]


def test_an_entry_point_under_async_scheduling_is_refused():
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=True), model_config=SimpleNamespace(logits_processors=None)
    )
    with pytest.raises(ValueError, match="an entry point does not do"):
        ImplicitPRMLogitsProcessor(config, torch.device("cpu"), False)


def test_rows_follow_vllms_own_updates():
    """Random additions, removals, moves and swaps, told by vLLM's builder."""
    draw = random.Random(0)
    begun: list[int] = []
    ended: list[int] = []
    guide = SimpleNamespace(
        options=lambda params: params,
        begin=lambda options, params, prompt, output: begun.append(prompt) or prompt,
        end=ended.append,
    )
    batch, builder, rows = BatchRows(guide), BatchUpdateBuilder(), {}
    fresh = 0
    for _ in range(300):
        for index in [i for i in rows if draw.random() < 0.2]:
            builder.removed_append(index)
            del rows[index]
        for _ in range(draw.randrange(3)):
            index = builder.pop_removed()
            index = (max(rows, default=-1) + 1) if index is None else index
            opted = draw.random() < 0.7
            builder.added.append((index, True if opted else None, fresh, []))
            rows[index] = fresh if opted else None
            fresh += 1
        while rows and max(rows) >= len(rows):  # condense
            last, empty = max(rows), next(i for i in range(len(rows)) if i not in rows)
            builder.moved.append((last, empty, MoveDirectionality.UNIDIRECTIONAL))
            rows[empty] = rows.pop(last)
        if len(rows) > 1 and draw.random() < 0.3:
            a, b = draw.sample(list(rows), 2)
            builder.moved.append((a, b, MoveDirectionality.SWAP))
            rows[a], rows[b] = rows[b], rows[a]
        batch.update(builder.get_and_reset(len(rows)))
        assert batch.requests == {index: name for index, name in rows.items() if name is not None}
        assert sorted(ended) == sorted(set(begun) - set(batch.requests.values()))
