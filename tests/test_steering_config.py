"""What steering inside vLLM is told, refuses and reports; none of it needs vLLM."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from pairs import byte_tokenizer

from prm_search.integrations.vllm.steering_config import RequestOptions, SteeringConfig, default_capacity
from prm_search.integrations.vllm.steering_report import Report, finished
from prm_search.integrations.vllm.worker import Guided, check_vocabulary, refuse_features
from prm_search.steering import Stream
from prm_search.steps import StepRule
from prm_search.tokens import TokenText


def config(**section: Any) -> SteeringConfig:
    return SteeringConfig.of({"prm_search": section})


def test_a_config_says_what_it_says():
    made = config(model="a", reference="policy", dtype="bfloat16", capacity=100, beta=0.1, steps={"delimiter": "\n"})
    assert (made.model, made.capacity, made.beta, made.follows_policy) == ("a", 100, 0.1, True)
    assert made.steps == StepRule("\n")
    assert config(model="a").steps == StepRule()
    assert not config(model="a").follows_policy
    assert config(model="policy", reference="b").follows_policy


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, '"model" is missing'),
        ({"model": "a", "refrence": "b"}, "unknown key 'refrence'; known are model, reference"),
        ({"model": 3}, "model=3: a non-empty string"),
        ({"model": ""}, "model=''"),
        ({"model": "a", "reference": 1}, "reference=1"),
        ({"model": "policy"}, 'reference=None: with model="policy"'),
        ({"model": "policy", "reference": "policy"}, "reference='policy': with"),
        ({"model": "a", "beta": 0}, "beta=0"),
        ({"model": "a", "beta": "x"}, "beta='x'"),
        ({"model": "a", "capacity": 0}, "capacity=0"),
        ({"model": "a", "capacity": 1.5}, "capacity=1.5"),
        ({"model": "a", "dtype": "int8"}, "dtype='int8': one of auto, float32"),
        ({"model": "a", "trust_remote_code": "yes"}, "trust_remote_code='yes'"),
        ({"model": "a", "report": 5}, "report=5"),
        ({"model": "a", "steps": "\n"}, r"steps='\\n': an object with delimiter"),
        ({"model": "a", "steps": {"confidence": 0.5}}, "steps: unknown key 'confidence'"),
        ({"model": "a", "steps": {"delimiter": ""}}, "steps: delimiter=''"),
    ],
)
def test_a_wrong_config_is_refused_by_name(section, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        config(**section)
    assert 'additional_config["prm_search"]' in str(caught.value)


@pytest.mark.parametrize("given", [None, {}, {"other": 1}, {"prm_search": "pair"}])
def test_a_missing_config_says_where_it_belongs(given):
    with pytest.raises(ValueError, match=r'additional_config\["prm_search"\] is missing'):
        SteeringConfig.of(given)


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}, {"prm_alpha": 0}, {"prm_alpha": 0.0, "prm_max_kl": 1.0}])
def test_requests_that_ask_for_nothing_are_not_opted_in(extra):
    assert RequestOptions.of(extra) is None


def test_requests_that_ask():
    assert RequestOptions.of({"prm_alpha": 2, "x": 1}) == RequestOptions(2.0)
    assert RequestOptions.of({"prm_alpha": -1.5, "prm_max_kl": 0.1}) == RequestOptions(-1.5, 0.1)
    assert RequestOptions.of({"prm_report": 7}) == RequestOptions(0.0, math.inf, 7)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"prm_alpha": "1"}, "prm_alpha='1'"),
        ({"prm_alpha": math.inf}, "prm_alpha=inf"),
        ({"prm_alpha": 10**400}, "prm_alpha=1000"),
        ({"prm_report": 2**63}, "prm_report=92"),
        ({"prm_alpha": -1e39}, r"prm_alpha=-1e\+39"),
        ({"prm_alpha": None, "prm_max_kl": 1.0}, "prm_max_kl=1.0 bounds prm_alpha"),
        ({"prm_alpha": 1, "prm_max_kl": -1}, "prm_max_kl=-1"),
        ({"prm_alpha": 1, "prm_max_kl": [1]}, r"prm_max_kl=\[1\]"),
        ({"prm_report": True}, "prm_report=True"),
        ({"prm_report": 1.5}, "prm_report=1.5"),
        ({"prm_beta": 1}, "prm_beta: unknown; known are prm_alpha, prm_max_kl, prm_report"),
    ],
)
def test_bad_requests_are_refused_by_name(extra, message):
    with pytest.raises(ValueError, match=message):
        RequestOptions.of(extra)


def test_the_default_capacity_holds_every_request_within_reason():
    assert default_capacity(8, 100) == 800
    assert default_capacity(256, 4096) == 65536
    assert default_capacity(1, 131072) == 131072


def engine(**given: Any) -> Any:
    """The parts of a VllmConfig that are looked at."""
    fields = {
        "speculative_config": None,
        "diffusion_config": None,
        "lora_config": None,
        "parallel_config": SimpleNamespace(pipeline_parallel_size=given.pop("pipeline", 1)),
        "model_config": SimpleNamespace(model="served", get_vocab_size=lambda: given.get("vocab", 340)),
    }
    return SimpleNamespace(**fields | {key: value for key, value in given.items() if key != "vocab"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speculative_config": object()}, "speculative_config"),
        ({"diffusion_config": object()}, "diffusion"),
        ({"pipeline": 2}, "pipeline_parallel_size=2"),
        ({"lora_config": object()}, "enable_lora"),
    ],
)
def test_engines_that_steering_does_not_work_with_are_refused(given, message):
    following = config(model="a", reference="policy")
    refuse_features(engine(), following)
    with pytest.raises(ValueError, match=message):
        refuse_features(engine(**given), following)
    if "lora_config" in given:
        refuse_features(engine(**given), config(model="a", reference="b"))


def test_vocabularies_are_compared():
    ours = byte_tokenizer()
    check_vocabulary(engine(), byte_tokenizer(), ours, 352)
    with pytest.raises(ValueError, match="another vocabulary than 'served'"):
        check_vocabulary(engine(), byte_tokenizer(["other words, other merges"]), ours, 352)
    with pytest.raises(ValueError, match="'served' has 340 tokens, the pair's models only 100"):
        check_vocabulary(engine(), byte_tokenizer(), ours, 100)
    check_vocabulary(engine(vocab=352), None, ours, 352)
    with pytest.raises(ValueError, match="'served' has 340 tokens, the pair 352"):
        check_vocabulary(engine(vocab=340), None, ours, 352)


def test_where_a_request_ends():
    assert finished([5, 6, 7], {2}, 10) == (3, None)
    assert finished([5, 2], {2}, 10) == (2, "stop")
    assert finished([5, 2, 9, 9], {2}, 10) == (2, "stop")  # sampled beyond the end by a scheduler that runs ahead
    assert finished([5, 6, 7], {2}, 3) == (3, "length")
    assert finished([5, 6, 7, 8], {2}, 3) == (3, "length")
    assert finished([5, 6, 2], {2}, 3) == (3, "stop")
    assert finished([], {2}, 3) == (0, None)


def test_a_guided_request_knows_its_ends():
    params = SimpleNamespace(eos_token_id=2, stop_token_ids=[9], max_tokens=4)
    request = Guided(Stream((5,) * 6, [5, 5], 1.0, math.inf, True), RequestOptions(1.0), params)
    assert request.gone(100) == (2, None)
    assert request.gone(8) == (2, "length")
    request.stream.output.append(9)
    assert request.gone(100) == (3, "stop")
    params.stop_token_ids, params.max_tokens = None, None
    assert request.gone(100) == (3, None)


def observed(output: list[int], ratios: list[float], first: int = 0) -> Stream:
    stream = Stream((1, 2), output, 0.5, math.inf, True)
    stream.first, stream.log_ratios = first, ratios
    return stream


@pytest.fixture
def report(tmp_path):
    words = byte_tokenizer()
    made = Report(str(tmp_path / "rewards.jsonl"), 0.1, StepRule(";", None), TokenText(words).piece)
    return made, lambda text: words(text)["input_ids"]


def test_a_record(report):
    made, encode = report
    ids = [i for part in ("a", ";", "b", "c") for i in encode(part)]
    made.write("k", observed(ids, [1.0, 2.0, -3.0, 4.0]), 4, "length")
    made.write(5, observed([], []), 0, None)
    first, second = [json.loads(line) for line in made.path.read_text().splitlines()]
    assert (first["key"], first["finish"]) == ("k", "length")
    assert first["token_ids"] == ids
    assert first["token_rewards"] == pytest.approx([0.1, 0.2, -0.3, 0.4])
    assert first["q"] == pytest.approx([0.1, 0.3, 0.0, 0.4], abs=1e-6)
    assert first["step_ends"] == [2, 4]
    assert first["step_rewards"] == pytest.approx([0.3, 0.1])
    assert (first["alpha"], first["max_kl"], first["beta"], first["prompt_tokens"]) == (0.5, None, 0.1, 2)
    assert second["key"] == 5
    assert second["token_ids"] == second["q"] == second["step_ends"] == []


def test_a_record_of_a_later_stay_and_of_tokens_beyond_the_end(report):
    made, encode = report
    ids = [i for part in ("a", ";", "b", "c", "d") for i in encode(part)]
    # Observed from the second token on; the last two were sampled after the end.
    record = made.record("k", observed(ids, [2.0, -3.0, 4.0, 9.0], first=1), 3, "stop")
    assert record["first"] == 1
    assert record["token_ids"] == ids[1:3]
    assert record["step_ends"] == [1, 2]
    assert record["token_rewards"] == pytest.approx([0.2, -0.3])
    # One whose last token was never told, as of a request that async scheduling ended.
    record = made.record("k", observed([*ids, -1], [1.0] * 5), 6, None)
    assert record["token_ids"] == ids


def test_tokens_without_a_reward_are_null(report):
    made, encode = report
    ids = encode("abc")
    record = made.record("k", observed(ids, [1.0, math.nan, -math.inf][: len(ids)]), len(ids), "length")
    assert record["token_rewards"] == [pytest.approx(0.1), None, None][: len(ids)]
    assert record["q"] == pytest.approx([0.1] * len(ids))


def test_a_report_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"report='.*/none/x' cannot be written to: No such file"):
        Report(str(tmp_path / "none" / "x"), 0.1, StepRule(), lambda i: b"")
