"""The processor under Model Runner V2's interface, whose runner needs a GPU: request states, sampler and loader are
vLLM's own here; the forward pass and the Triton kernels that write the states are stood in for, in the runner's order
of calls. A run on a GPU this is not.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import vllm_models
from vllm_models import plain_rows

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from prm_search.demo import pair_dir
from prm_search.integrations.vllm.steering_config import RequestOptions

pytestmark = pytest.mark.vllm
models = vllm_models.models
NAME = "prm_search.integrations.vllm.logits_processor:ImplicitPRMLogitsProcessor"
BETA, EOS, LENGTH, VOCAB = 0.05, 2, 128, 38


@pytest.fixture
def pair_folder(tmp_path):
    """A copy of the demo's pair: what another test in this process has loaded, with another capacity, is not it."""
    return shutil.copytree(pair_dir(), tmp_path / "pair")


def staged_writes(self: StagedWriteTensor) -> None:
    """What `_apply_write_kernel` does."""
    low = 0
    where = zip(self._staged_write_indices, self._staged_write_starts, self._staged_write_cu_lens, strict=True)
    for index, start, high in where:
        values = torch.tensor(self._staged_write_contents[low:high], dtype=self.dtype)
        if self.gpu.ndim == 1:
            self.gpu[index] = values[0]
        else:
            self.gpu[index, start : start + len(values)] = values
        low = high
    self.clear_staged_writes()


class Runner:
    """What a processor meets of GPUModelRunner, in its order: finish, add, flush, forward, sample, write back."""

    def __init__(self, section: dict[str, Any], models: Sequence[Any], slots: int = 5) -> None:
        config = EngineArgs(
            str(pair_dir() / "policy"), dtype="float32", max_model_len=LENGTH, max_num_seqs=slots, enforce_eager=True,
            logits_processors=[NAME], additional_config={"prm_search": section},
        ).create_engine_config()  # fmt: skip
        self.states = RequestState(slots, LENGTH, 64, 0, VOCAB, torch.device("cpu"))
        (self.processor,) = build_custom_logits_processors(config, self.states, False, [NAME])
        self.sampler = Sampler(
            config, slots, VOCAB, torch.device("cpu"), self.states, custom_logits_processors=[self.processor]
        )
        self.models = models
        self.computed: dict[str, int] = {}
        self.untouched: list[torch.Tensor] = []

    def step(
        self,
        finished: Sequence[str] = (),
        added: Sequence[tuple[str, list[int], list[int], SamplingParams]] = (),
        scheduled: dict[str, int] | None = None,
    ) -> dict[str, int]:
        """One engine step.

        Args:
            finished: requests that are over, or preempted.
            added: name, prompt, output so far, parameters.
            scheduled: tokens to compute of each request.

        Returns:
            tokens sampled for those whose prefill is complete.
        """
        states = self.states
        for name in sorted(finished):
            states.remove_request(name)
            self.computed.pop(name)
        for name, prompt, output, params in added:
            states.add_request(name, len(prompt), [*prompt, *output], 0, params.max_tokens)
            self.computed[name] = 0
            self.sampler.add_request(states.req_id_to_index[name], params)
        if added:
            states.apply_staged_writes()
        self.sampler.apply_staged_writes()
        if not scheduled:
            return {}
        names = list(scheduled)
        slots = np.array([states.req_id_to_index[name] for name in names], np.int32)
        lengths = np.array([self.computed[name] + scheduled[name] for name in names], np.int32)
        paths = [states.all_token_ids.gpu[slot, :n].tolist() for slot, n in zip(slots, lengths, strict=True)]
        logits = torch.stack([plain_rows(self.models[:1], path)[0] for path in paths])
        before = logits.clone()
        index = torch.from_numpy(slots)
        done = self.sampler.apply_sampling_params(
            logits, index, index, slots, torch.from_numpy(lengths - 1), torch.tensor([path[-1] for path in paths]),
            torch.zeros(len(names), dtype=torch.int32), lengths,
        )  # fmt: skip
        sampled = {}
        for row, name in enumerate(names):
            self.computed[name] = int(lengths[row])
            slot = int(slots[row])
            if lengths[row] < states.prefill_len.np[slot]:
                continue
            sampled[name] = int(done[row].argmax())
            if torch.equal(done[row], before[row]):
                self.untouched.append(done[row])
            total = int(states.total_len.gpu[slot])
            states.all_token_ids.gpu[slot, total] = sampled[name]
            states.total_len.gpu[slot] += 1
        return sampled


@pytest.fixture(autouse=True)
def _writes(monkeypatch):
    monkeypatch.setattr(StagedWriteTensor, "apply_write", staged_writes)
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)


def expected(models: Sequence[Any], prompt: list[int], alpha: float, length: int) -> tuple[list[int], list[float]]:
    output: list[int] = []
    rewards = []
    while len(output) < length and EOS not in output and len(prompt) + len(output) < LENGTH:
        policy, prm, reference = plain_rows(models, [*prompt, *output])
        output.append(int((policy + alpha * (prm - reference)).argmax()))
        rewards.append(BETA * (prm - reference)[output[-1]].item())
    return output, rewards


def params(alpha: float | None, length: int, key: str | None = None) -> SamplingParams:
    extra = {} if alpha is None else {"prm_alpha": alpha}
    made = SamplingParams(temperature=0, max_tokens=length, extra_args=extra | ({"prm_report": key} if key else {}))
    made.update_from_generation_config({}, EOS)
    return made


@pytest.mark.parametrize("reference", [None, "policy"])
def test_any_order_of_calls_gives_the_tokens_of_plain_forwards(models, tmp_path, pair_folder, reference):
    """Chunked prefill, waiting, preemption into another slot, reuse of slots, n > 1, aborts."""
    draw = random.Random(3)
    path = tmp_path / "rewards.jsonl"
    section = {"model": str(pair_folder), "report": str(path), "capacity": 400}
    runner = Runner(section | ({"reference": reference} if reference else {}), models)
    guide = runner.processor._slots.guide
    waiting: list[tuple[str, list[int], list[int], SamplingParams]] = []
    for i in range(14):
        head = [draw.randrange(3, VOCAB) for _ in range(draw.randrange(2, 60))]
        if i % 4 == 3:
            head = waiting[-1][1]  # another child of the prompt before
        alpha = draw.choice([None, 1.0, 2.5, -1.0])
        key = f"r{i}" if draw.random() < 0.6 else None
        waiting.append((f"r{i}", head, [], params(alpha, draw.randrange(1, 25), key)))
    every = {name: (head, want) for name, head, _, want in waiting}
    live: dict[str, tuple[str, list[int], list[int], SamplingParams]] = {}
    over: list[str] = []
    answers: dict[str, list[int]] = {}
    preempted = aborted = 0
    while waiting or live or over:
        gone, over = over, []
        if len(live) > 2 and draw.random() < 0.1:
            victim = draw.choice(list(live))
            waiting.append(live.pop(victim))
            gone.append(victim)
            preempted += 1
        elif len(live) > 2 and aborted < 2 and draw.random() < 0.1:
            victim = draw.choice(list(live))
            answers[victim] = live.pop(victim)[2]
            gone.append(victim)
            aborted += 1
        added = []
        while waiting and len(live) < 5 and draw.random() < 0.7:
            request = waiting.pop(0)
            if request[0] in gone:
                waiting.append(request)
                break
            added.append(request)
            live[request[0]] = request
        scheduled = {}
        for name, (_, head, output, _want) in live.items():
            left = len(head) + len(output) - (0 if name in {a[0] for a in added} else runner.computed[name])
            if draw.random() < 0.85:
                scheduled[name] = min(left, draw.choice([7, 20, 200]))
        for name, token in runner.step(gone, added, scheduled).items():
            _, head, output, want = live[name]
            output.append(token)
            if token == EOS or len(output) >= want.max_tokens or len(head) + len(output) >= LENGTH:
                answers[name] = output
                over.append(name)
                del live[name]
    assert preempted > 0
    assert aborted > 0
    for _ in range(70):  # an abort is only seen by its slot staying empty
        runner.step()
    assert guide.steering.live == 0
    assert all(lm.tree.used == 0 for lm in guide.steering._lms)
    records: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["key"], []).append(record)
    whole = 0
    for name, (head, want) in every.items():
        asked = want.extra_args or {}
        tokens, rewards = expected(models, head, asked.get("prm_alpha", 0.0), want.max_tokens)
        got = answers[name]
        whole += got == tokens
        assert got == tokens[: len(got)]
        if "prm_report" not in asked:
            assert name not in records
            continue
        # An earlier stay may be told after a later one: its slot was only missed some steps on.
        parts = sorted(records.get(name, []), key=lambda part: part["first"])
        assert [token for part in parts for token in part["token_ids"]] == got
        assert [r for part in parts for r in part["token_rewards"]] == pytest.approx(rewards[: len(got)], abs=1e-5)
    assert whole >= len(every) - aborted


def test_a_step_is_one_forward_and_declined_requests_none(models, pair_folder):
    runner = Runner({"model": str(pair_folder)}, models)
    lms = runner.processor._slots.guide.steering._lms
    assert runner.sampler.add_request(4, params(None, 5)) is None
    assert not runner.sampler.needs_logits_processing[4]
    heads = {"a": [5, 6, 7], "b": [8, 9], "c": [5, 6, 7], "d": [10]}
    wants = {"a": 1.0, "b": None, "c": -2.0, "d": 0.0}
    requests = [(name, head, [], params(wants[name], 9)) for name, head in heads.items()]
    before = [lm.forwards for lm in lms]
    runner.step(added=requests, scheduled={name: len(head) for name, head in heads.items()})
    for _ in range(3):
        runner.step(scheduled=dict.fromkeys(heads, 1))
    assert [lm.forwards - then for lm, then in zip(lms, before, strict=True)] == [4, 4]
    meter = runner.processor._slots.guide.steering.meter
    assert [meter.counts["encoded", lm.id] for lm in lms] == [3 + 2 * 3] * 2
    assert len(runner.untouched) == 2 * 4
    runner.step(finished=["a", "c"], scheduled={"b": 1, "d": 1})
    assert [lm.forwards - then for lm, then in zip(lms, before, strict=True)] == [4, 4]


def test_penalties_and_the_policy_as_a_half_do_not_go_together(models, pair_folder):
    guide = Runner({"model": str(pair_folder), "reference": "policy"}, models).processor._slots.guide
    plain, penalised = params(1.0, 9), params(1.0, 9)
    penalised.frequency_penalty = 0.5
    assert guide.begin(RequestOptions(1.0), plain, [5, 6], []).stream.fault is None
    assert "frequency_penalty changes" in guide.begin(RequestOptions(1.0), penalised, [5, 6], []).stream.fault
