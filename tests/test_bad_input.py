"""Bad input through the public API, on real (tiny) models: each mistake is named with what it was and what is allowed,
nothing is sampled for it, and nothing is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benches
import hf_models
import numpy as np
import pairs
import pytest
import torch
from benches import TOKENIZER, Bench
from hf_models import STEPS, VOCAB, llama, near

import prm_search as ps
from prm_search.engine.language_model import LanguageModel
from prm_search.sampling import Sampling
from prm_search.serving.config import ServeConfig
from prm_search.training.recipe import Recipe

_shared, bench, _ = benches.FIXTURES
NAN, INF = math.nan, math.inf


# -- search: its arguments --------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": NAN}, ValueError, "temperature=nan: a finite number >= 0"),
    ({"temperature": -0.5}, ValueError, "temperature=-0.5: a finite number >= 0"),
    ({"temperature": INF}, ValueError, "temperature=inf: a finite number >= 0"),
    ({"temperature": "hot"}, TypeError, "temperature='hot': a finite number >= 0 is needed, not str"),
    ({"temperature": None}, TypeError, "temperature=None: a finite number >= 0 is needed, not NoneType"),
    ({"top_p": 0}, ValueError, r"top_p=0: a number in \(0, 1\]"),
    ({"top_p": 1.5}, ValueError, r"top_p=1.5: a number in \(0, 1\]"),
    ({"top_p": NAN}, ValueError, r"top_p=nan: a number in \(0, 1\]"),
    ({"top_p": "all"}, TypeError, r"top_p='all': a number in \(0, 1\]"),
    ({"min_p": 2}, ValueError, r"min_p=2: a number in \[0, 1\]"),
    ({"min_p": -0.1}, ValueError, r"min_p=-0.1: a number in \[0, 1\]"),
    ({"min_p": None}, TypeError, r"min_p=None: a number in \[0, 1\]"),
    ({"top_k": -1}, ValueError, "top_k=-1: an integer >= 0"),
    ({"top_k": 2.0}, ValueError, "top_k=2.0: an integer >= 0"),
    ({"top_k": INF}, ValueError, "top_k=inf: an integer >= 0"),
    ({"top_k": None}, TypeError, "top_k=None: an integer >= 0"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0: an integer >= 1"),
    ({"max_new_tokens": INF}, ValueError, "max_new_tokens=inf: an integer >= 1"),
    ({"max_new_tokens": NAN}, ValueError, "max_new_tokens=nan: an integer >= 1"),
    ({"max_new_tokens": "8"}, TypeError, "max_new_tokens='8': an integer >= 1"),
    ({"max_new_tokens": True}, TypeError, "max_new_tokens=True: an integer >= 1"),
    ({"seed": None}, TypeError, "seed must be an int, got NoneType"),
    ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
    ({"strategy": "beams"}, ValueError, "strategy='beams' is unknown; it is one of .*beam, best_of_n"),
    ({"strategy": None}, TypeError, "strategy must be a name or a configured strategy"),
    ({"select": "worst"}, ValueError, r"select='worst' is unknown; it is one of \('best', 'majority', 'weighted'\)"),
    ({"answer": "roman"}, ValueError, "answer='roman' is unknown; it is one of .*boxed"),
    ({"value": "quality"}, ValueError, r"value='quality' is unknown; it is one of \['last'.*'q'\]"),
    ({"value": 3}, TypeError, "value must be one of .* or a function of a node, got int"),
    ({"weight": "linear"}, ValueError, "weight='linear': it is 'softmax' or 'sigmoid'"),
    ({"weight_temperature": NAN}, ValueError, "weight_temperature=nan: a finite number > 0"),
    ({"weight_temperature": "x"}, TypeError, "weight_temperature='x': a finite number > 0"),
    ({"budget": 0}, ValueError, "budget: tokens=0: an integer >= 1 or None"),
    ({"budget": -3}, ValueError, "budget: tokens=-3: an integer >= 1 or None"),
    ({"budget": "some"}, TypeError, r"budget must be a Budget, an int \(sampled tokens\) or None, got str"),
    ({"steps": "\n"}, TypeError, "steps must be a StepRule, got str"),
    ({"on_event": "x"}, TypeError, "on_event='x': a function of an Event, or None, is needed, not str"),
    ({"policy": llama}, TypeError, "policy must be a Policy, but function has no advance"),
    ({"scorer": TOKENIZER}, TypeError, "scorer must be a Scorer"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), OPTIONS, ids=[f"{i}-{'-'.join(case[0])}" for i, case in enumerate(OPTIONS)]
)
def test_arguments_of_search(bench: Bench, options: dict[str, Any], error: type[Exception], message: str) -> None:
    before = bench.policy.forward_calls
    with pytest.raises(error, match=message):
        bench.search(**options)
    assert bench.policy.forward_calls == before


MADE: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: ps.Beam(0, 4), ValueError, "width=0: an integer >= 1"),
    (lambda: ps.Beam(4, 0), ValueError, "expansions=0: an integer >= 1"),
    (lambda: ps.Beam(2.0, 4), ValueError, "width=2.0: an integer >= 1"),  # type: ignore[arg-type]
    (lambda: ps.Beam(per_parent=0), ValueError, "per_parent=0: an integer >= 1"),
    (lambda: ps.BestOfN(0), ValueError, "n=0: an integer >= 1"),
    (lambda: ps.BestOfN(value="quality"), ValueError, "value='quality' is unknown"),
    (lambda: ps.DVTS(subtrees=0), ValueError, "subtrees=0: an integer >= 1"),
    (lambda: ps.Lookahead(rollouts=0), ValueError, "rollouts=0: an integer >= 1"),
    (lambda: ps.Lookahead(reduce="sum"), ValueError, "reduce='sum': it is 'mean', 'max' or 'policy'"),  # type: ignore[arg-type]
    (lambda: ps.Steer(NAN), ValueError, "alpha=nan: a number from -1e6 to 1e6"),
    (lambda: ps.Steer("much"), TypeError, "alpha='much': a number from -1e6 to 1e6"),  # type: ignore[arg-type]
    (lambda: ps.Steer(1.0, n=0), ValueError, "n=0: an integer >= 1"),
    (lambda: ps.Budget(seconds=0), ValueError, "budget: seconds=0: a finite number > 0 or None"),
    (lambda: ps.Budget(seconds="1"), TypeError, "budget: seconds='1': a finite number > 0 or None"),  # type: ignore[arg-type]
    (lambda: ps.Budget(nodes=0), ValueError, "budget: nodes=0: an integer >= 1 or None"),
    (lambda: ps.StepRule(delimiter=""), ValueError, "delimiter='': an empty string ends no step"),
    (lambda: ps.StepRule(delimiter=5), TypeError, "delimiter=5: a string, strings or None"),  # type: ignore[arg-type]
    (lambda: ps.StepRule(max_tokens=0), ValueError, "max_tokens=0: an integer >= 1 or None"),
    (lambda: ps.StepRule(regex="("), ValueError, r"regex='\(' is not a pattern"),
    (lambda: ps.StepRule(regex="a{99999999999}"), ValueError, r"regex='a.* is not a pattern: .*too large"),
    (lambda: ps.StepRule(regex="(" * 9000 + ")" * 9000), ValueError, r"regex='\(\(.* is not a pattern"),
    (lambda: ps.StepRule(regex="(?P<" + "a" * 9000), ValueError, r"regex='\(\?P.* is not a pattern"),
    (lambda: ps.StepRule(regex=5), TypeError, "regex=5: a string or None is needed, not int"),  # type: ignore[arg-type]
    (lambda: ps.StepRule(regex=b";"), TypeError, "regex=b';': a string or None"),  # type: ignore[arg-type]
    (lambda: ps.StepRule(confidence=2), ValueError, r"confidence=2: a probability in \[0, 1\] or None"),
    (lambda: ps.StepRule(confidence="x"), TypeError, "confidence='x': a probability"),  # type: ignore[arg-type]
    (lambda: ps.values.Advantage(NAN), ValueError, "alpha=nan: a finite number"),
    (lambda: ps.values.Advantage(prover=3), TypeError, "prover must be the name of a scorer .*, got int"),  # type: ignore[arg-type]
    (lambda: ps.Beam(merge="no"), TypeError, "merge='no': True or False is needed, not str"),  # type: ignore[arg-type]
    (lambda: ps.DVTS(merge=1), TypeError, "merge=1: True or False is needed, not int"),  # type: ignore[arg-type]
    (lambda: ps.Lookahead(merge=None), TypeError, "merge=None: True or False"),  # type: ignore[arg-type]
    (lambda: Sampling("x"), TypeError, "steps must be a StepRule, got str"),  # type: ignore[arg-type]
    (lambda: Sampling(STEPS, seed=1.5), TypeError, "seed must be an int, got float"),  # type: ignore[arg-type]
    (lambda: ps.HFPolicy(llama(), TOKENIZER, stop_ids=5), TypeError, "stop_ids=5: token ids from 0 to .* not int"),  # type: ignore[arg-type]
    (lambda: ps.HFPolicy(llama(), TOKENIZER, stop_ids="5"), TypeError, "stop_ids='5': token ids from 0 .* not str"),  # type: ignore[arg-type]
    (lambda: ps.HFPolicy(llama(), TOKENIZER, stop_ids=[2.0]), TypeError, r"stop_ids=\[2.0\]: token ids .* not float"),  # type: ignore[list-item]
    (lambda: ps.HFPolicy(llama(), TOKENIZER, stop_ids=[VOCAB]), ValueError, rf"stop_ids=.*from 0 to {VOCAB - 1} are"),
    (
        lambda: ps.HFPolicy(llama(), TOKENIZER, sampler="greedy"),
        TypeError,
        "sampler must be a Sampler or None",
    ),  # type: ignore[arg-type]
    (lambda: ps.HFPolicy(llama(), TOKENIZER, stop="x"), TypeError, "stop='x': a function of rows, or None"),  # type: ignore[arg-type]
    (lambda: ps.Steered(ps.HFPolicy(llama(), TOKENIZER), None, 1), TypeError, "pair must be an ImplicitPRM, got NoneT"),  # type: ignore[arg-type]
    (lambda: ps.HFPolicy("gpt2", TOKENIZER), TypeError, "a causal LM .* as model is needed, got str"),
    (lambda: ps.HFPolicy(None, TOKENIZER), TypeError, "a causal LM .* as model is needed, got NoneType"),  # type: ignore[arg-type]
    (lambda: ps.HFPolicy(TOKENIZER, llama), TypeError, "tokenizer must be a transformers tokenizer, got function"),
    (lambda: ps.HFPolicy(llama(), None), TypeError, "tokenizer must be a transformers tokenizer, got NoneType"),
    (lambda: ps.HFPolicy(llama(), TOKENIZER, max_rows=0), ValueError, "max_rows=0: a number of rows >= 1"),
    (lambda: ps.HFPolicy(llama(), TOKENIZER, capacity=0), ValueError, "capacity=0: a number of tokens >= 1, or None"),
    (lambda: ps.HFPolicy(llama(), TOKENIZER, capacity=9.5), ValueError, "capacity=9.5: a number of tokens"),  # type: ignore[arg-type]
    (lambda: ps.HFPolicy(llama().train(), TOKENIZER), ValueError, r"in training mode.*call \.eval\(\)"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), beta=NAN), ValueError, "beta=nan: a finite number > 0"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), beta=0), ValueError, "beta=0: a finite number > 0"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), beta=1e39), ValueError, r"beta=1e\+39: a finite number > 0.* 1e30"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), beta=1e-50), ValueError, "beta=1e-50: a finite number > 0.* 1e-30"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), beta=10**400), ValueError, r"beta=10+\.\.\.: a finite number > 0"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), beta=10**5000), ValueError, "beta=an integer of about 5001 digits"),
    (lambda: ps.ImplicitPRM.from_pretrained("nowhere", beta=10**400), ValueError, "beta=10"),
    (lambda: Recipe(beta=1e39), ValueError, r"beta=1e\+39: a finite number > 0"),
    (lambda: Recipe(beta=10**400), ValueError, "beta=10"),
    (lambda: Recipe(learning_rate=10**400), ValueError, "learning_rate=10"),
    (lambda: ServeConfig(pair="demo", beta=1e-50), ValueError, "beta=1e-50: a finite number > 0"),
    (lambda: ServeConfig(pair="demo", beta="1"), TypeError, "beta='1': a finite number > 0"),  # type: ignore[arg-type]
    (
        lambda: ps.ImplicitPRM(llama(), llama(1), tokenizer=5),
        TypeError,
        "tokenizer must be .*, got int",
    ),
    (lambda: ps.ImplicitPRM(llama(), llama(1), tokenizer="gpt2"), TypeError, "tokenizer must be .*, got str"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), eos_token_id="</s>"), TypeError, "eos_token_id='</s>': a token id >= 0"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), eos_token_id=1.5), ValueError, "eos_token_id=1.5: a token id >= 0"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), eos_token_id=-1), ValueError, "eos_token_id=-1: a token id >= 0"),
    (
        lambda: ps.ImplicitPRM(llama(), llama(1), eos_token_id=10**6),
        ValueError,
        "eos_token_id=1000000: the mod",
    ),
    (lambda: ps.ImplicitPRM(llama(), llama(1), capacity=0.5), ValueError, "capacity=0.5: a number of tokens >= 1"),
    (lambda: ps.ImplicitPRM(LanguageModel.of(llama()), llama(1), capacity="x"), TypeError, "capacity='x': a number of"),
    (lambda: ps.ImplicitPRM(llama(), llama(1), name=5), TypeError, "name=5: a non-empty string"),  # type: ignore[arg-type]
    (lambda: ps.ImplicitPRM(5, llama(1)), TypeError, "model: a causal LM .* is needed, got int"),
    (lambda: ps.ImplicitPRM(llama(), 5), TypeError, "reference: a causal LM .* is needed, got int"),
    (lambda: ps.ImplicitPRM(llama(), llama(1)).score_nodes([1]), TypeError, r"nodes\[0\] must be a Node .*, got int"),  # type: ignore[list-item]
    (
        lambda: ps.ImplicitPRM(llama(), llama(1)).score_nodes(ps.SearchTree("a").root),
        TypeError,
        "nodes must be a li",
    ),  # type: ignore[arg-type]
    (lambda: ps.ConstantReference("x"), TypeError, "logprob='x': a log-probability"),  # type: ignore[arg-type]
    (lambda: ps.ConstantReference(-1e39), ValueError, r"logprob=-1e\+39: a log-probability is needed"),
    (lambda: ps.ImplicitPRM(llama()), ValueError, "reference is missing: pass the model that the PRM was initialised"),
    (lambda: ps.ImplicitPRM(llama(), "nonsense"), ValueError, "reference='nonsense': a model or 'policy' is needed"),
    (lambda: ps.ImplicitPRM("nonsense", llama()), TypeError, "model='nonsense': a model is needed"),
    (lambda: ps.ConstantReference(0.5), ValueError, "logprob=0.5: a log-probability is needed, finite and <= 0"),
]


@pytest.mark.parametrize(("make", "error", "message"), MADE, ids=[message[:24] for _, _, message in MADE])
def test_what_cannot_be_made(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# -- prompts ----------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "x"}]
PROMPTS: list[tuple[Any, type[Exception], str]] = [
    ([""], ValueError, r"prompts\[0\]: empty prompt: text is ''; at least one token"),
    (["hi", []], ValueError, r"prompts\[1\]: empty prompt: token_ids is \(\)"),
    (["hi", "a" * 256], ValueError, r"prompts\[1\]: the prompt has 256 tokens; the context of 256 leaves no room"),
    (["hi", [5, VOCAB]], ValueError, rf"prompts\[1\]: prompt ids 5\.\.{VOCAB} lie outside the vocabulary of {VOCAB}"),
    ([[-1]], ValueError, r"prompts\[0\]: prompt ids -1..-1 lie outside"),
    ([CHAT], ValueError, r"prompts\[0\]: .*has no chat template.*set its chat_template"),
    ([None], TypeError, r"prompts\[0\]: prompt must be a str, a list of token ids or chat messages, or a Prompt"),
    ([b"hi"], TypeError, r"prompts\[0\]: prompt must be .*, got bytes"),
    ([{3, 4}], TypeError, r"prompts\[0\]: prompt must be .*, got set"),
    ([[3, 4.0]], TypeError, r"prompts\[0\]: prompt must be .*, got list"),
    (CHAT, TypeError, r"prompts\[0\]: prompt must be .*, got dict"),
    ("hi", TypeError, r"prompts must be a list of prompts, got one str: pass \[prompt\]"),
    (ps.Prompt(text="hi"), TypeError, r"prompts must be a list of prompts, got one Prompt: pass \[prompt\]"),
    (7, TypeError, "prompts must be a list of prompts, got one int"),
]


@pytest.mark.parametrize(("prompts", "error", "message"), PROMPTS, ids=[message[:40] for _, _, message in PROMPTS])
def test_prompts(bench: Bench, prompts: Any, error: type[Exception], message: str) -> None:
    before = bench.policy.forward_calls
    with pytest.raises(error, match=message):
        bench.search(prompts)
    assert bench.policy.forward_calls == before


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "one of text, messages or token_ids"),
        ({"text": "a", "messages": CHAT}, ValueError, "text or messages, not both"),
        ({"messages": []}, ValueError, r"empty prompt: messages is \[\]"),
        ({"messages": "hi"}, TypeError, "messages must be a list, got str"),
        ({"messages": ["hi"]}, TypeError, "messages must be dicts with role and content, got 'hi'"),
        ({"text": 5}, TypeError, "text must be a str, got int"),
        ({"token_ids": [1.5]}, TypeError, "token_ids must be integers: 'float'"),
        ({"token_ids": "12"}, TypeError, "token_ids must be a list, got str"),
    ],
)
def test_a_prompt_by_itself(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ps.Prompt(**given)


def test_a_tree_by_hand(bench: Bench) -> None:
    tree = ps.SearchTree(ps.Prompt(text="hi"))
    with pytest.raises(ValueError, match="a node needs at least one token"):
        tree.add(tree.root, [])
    with pytest.raises(TypeError, match="token_ids must be integers: 'float'"):
        tree.add(tree.root, [5, 6.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="parent belongs to another tree"):
        tree.add(ps.SearchTree("hi").root, [5])
    with pytest.raises(ValueError, match="logprobs has 2 entries for 1 tokens"):
        tree.add(tree.root, [5], logprobs=np.zeros(2))
    with pytest.raises(ValueError, match=r"finish='end' is unknown; it is one of \('step'"):
        tree.add(tree.root, [5], finish="end")
    with pytest.raises(TypeError, match=r"prompt must be .*, got int"):
        ps.SearchTree(5)  # type: ignore[arg-type]
    assert len(tree.nodes) == 1
    node = tree.add(tree.root, [5, VOCAB + 3])
    with pytest.raises(ValueError, match=f"token ids 5..{VOCAB + 3} lie outside the vocabulary of {VOCAB}"):
        bench.pair.score_nodes([node])
    bench.pair.release(tree)


# -- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((["a"], [""], {"append_eos": False}), ValueError, r"responses\[0\] is empty: at least one token"),
        ((["a", ""], ["b", "b"], {}), ValueError, r"prompts\[1\]: empty prompt"),
        ((["a"], ["b", "c"], {}), ValueError, "prompts has 1 entries and responses 2"),
        (("a", ["b"], {}), TypeError, "prompts must be a list, one entry a response, got str"),
        ((["a"], "b", {}), TypeError, "responses must be a list, one entry a response, got str"),
        ((["a", "a"], ["b", [5, 900]], {}), ValueError, r"responses\[1\]: token ids 5..900 lie outside the vocabulary"),
        (([[900]], ["b"], {}), ValueError, r"prompts\[0\]: token ids 900..900 lie outside the vocabulary of 258"),
        ((["a"], ["b" * 300], {}), ValueError, r"responses\[0\]: 302 tokens with its prompt exceed .* 256 tokens"),
        ((["a"], [[5, 1.5]], {}), TypeError, r"responses\[0\] must be a text or a flat list of token ids"),
        ((["a"], [None], {}), TypeError, r"responses\[0\] must be a text or token ids, got NoneType"),
        ((["a"], [[5, 6]], {"steps": [[1]]}), ValueError, r"steps\[0\]=\[1\]: token counts that rise .* 2 tokens"),
        ((["a"], [[5, 6]], {"steps": "\n"}), TypeError, "steps must be a StepRule or one list of step ends"),
        ((["a"], [[5, 6]], {"logprobs": [[-1.0]]}), ValueError, r"logprobs\[0\] has shape \(1,\) for .* 2 tokens"),
        ((["a"], [[5, 6]], {"logprobs": [[NAN, -1.0]]}), ValueError, r"logprobs\[0\] holds NaN"),
        ((["a"], ["b"], {"batch_tokens": 0}), ValueError, "batch_tokens=0: at least 1"),
        ((["a"], ["b"], {"batch_tokens": NAN}), ValueError, "batch_tokens=nan: at least 1"),
        ((["a"], ["b"], {"batch_tokens": 2.0}), ValueError, "batch_tokens=2.0: at least 1 token, a whole number"),
        ((["a"], ["b"], {"batch_tokens": "9"}), TypeError, "batch_tokens='9': at least 1"),
        (
            (["a"], [[5, 6]], {"logprobs": [[0.5, -1.0]]}),
            ValueError,
            r"logprobs\[0\]\[0\]=0.5: a log-probability is",
        ),
        (
            (["a"], [[5, 6]], {"logprobs": [[-1.0, float("-inf")]]}),
            ValueError,
            r"logprobs\[0\]\[1\]=-inf: .*finite and",
        ),
        ((["a"], [[5, 6]], {"logprobs": [[-1e39, -1.0]]}), ValueError, r"logprobs\[0\]\[0\]=-inf: .*finite and <= 0"),
        ((["a"], [[5, 6]], {"logprobs": [["x", -1.0]]}), TypeError, r"logprobs\[0\] must be numbers, one a token"),
        ((["a"], [[5, 6]], {"logprobs": [None]}), ValueError, r"logprobs\[0\] has shape \(\) for"),
        ((["a"], [[5, 6]], {"steps": [[1.5, 2]]}), TypeError, r"steps\[0\]=\[1.5, 2\]: a list of integers is needed"),
        ((["a"], [[5, 6]], {"steps": [[True, 2]]}), TypeError, r"steps\[0\]=\[True, 2\]: a list of integers"),
        ((["a"], [[5, 6]], {"steps": [2]}), TypeError, r"steps\[0\]=2: a list of integers"),
        ((["a"], ["b"], {"append_eos": ["no"]}), TypeError, r"append_eos\[0\]='no': True or False is needed"),
        ((["a"], ["b"], {"append_eos": [0]}), TypeError, r"append_eos\[0\]=0: True or False is needed"),
        ((["a"], ["b"], {"append_eos": "yes"}), TypeError, "append_eos must be a list"),
        ((["a"], ["b"], {"append_eos": 1}), TypeError, "append_eos must be a list"),
    ],
)
def test_score(bench: Bench, given: tuple[Any, Any, dict[str, Any]], error: type[Exception], message: str) -> None:
    prompts, responses, options = given
    with pytest.raises(error, match=message):
        bench.pair.score(prompts, responses, **options)


def test_a_model_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="has a vocabulary of 1 token: at least 2 are needed"):
        ps.ImplicitPRM(pairs.llama(1, vocab=1), pairs.llama(2, vocab=1))
    with pytest.raises(ValueError, match="has a vocabulary of 1 token"):
        ps.HFPolicy(pairs.llama(1, vocab=1), TOKENIZER)


def test_a_pair_without_a_tokenizer_scores_ids_of_a_policy_only(bench: Bench) -> None:
    pair = ps.ImplicitPRM(bench.trained, bench.model)
    with pytest.raises(ValueError, match="this pair has no tokenizer: pass ImplicitPRM"):
        pair.score(["a"], ["b"])
    assert bench.search(scorer=pair)[0].value is not None  # the policy's


# -- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"strategy": "beams"}, ValueError, "strategy='beams' is unknown"),
        ({"select": "worst"}, ValueError, "select='worst' is unknown"),
        ({"answer": "roman"}, ValueError, "answer='roman' is unknown"),
        ({"value": "quality"}, ValueError, "value='quality' is unknown"),
        ({"budget": 0}, ValueError, "budget: tokens=0"),
        ({"budget": -1}, ValueError, "budget: tokens=-1"),
        ({"weight_temperature": NAN}, ValueError, "weight_temperature=nan"),
        ({"steps": 8}, TypeError, "steps must be a StepRule, got int"),
        ({"seed": "x"}, TypeError, "seed must be an int, got str"),
        ({"prompts": "hi"}, TypeError, "prompts must be a list with text or messages for each row, got str"),
        ({"prompts": [""]}, ValueError, r"prompts\[0\]: empty prompt"),
    ],
)
def test_guidance(bench: Bench, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ps.PRMGuidance(bench.pair, **given)


def test_guidance_without_a_pair(bench: Bench) -> None:
    with pytest.raises(TypeError, match="pair must be a Scorer, but LlamaForCausalLM has no"):
        ps.PRMGuidance(bench.model)  # type: ignore[arg-type]


def test_generate(bench: Bench) -> None:
    guidance = ps.PRMGuidance(bench.pair, strategy=ps.Beam(2, 2), steps=STEPS, seed=0)

    def generate(ids: list[list[int]], **options: Any) -> Any:
        given = {"custom_generate": ps.generate, "do_sample": True, "max_new_tokens": 4, "prm_guidance": guidance}
        return bench.model.generate(torch.tensor(ids), **given | options)

    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt ids 5..900 lie outside the vocabulary of 258"):
        generate([[5, 6], [5, 900]])
    with pytest.raises(ValueError, match=r"prompts\[0\]: the prompt has 256 tokens; the context of 256 leaves no room"):
        generate([[5] * 256])
    with pytest.raises(ValueError, match="attention_mask must be zeros and then ones"):
        generate([[5, 6], [0, 0]], attention_mask=torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="inputs_embeds cannot be used with prm_guidance"):
        generate([[]])
    with pytest.raises(TypeError, match="prm_guidance must be a PRMGuidance, got str"):
        generate([[5]], prm_guidance="beam")
    assert generate([[5, 6]]).shape == (1, 6)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints(bench: Bench, tmp_path: Path) -> None:
    whole, empty, torn = tmp_path / "whole", tmp_path / "empty", tmp_path / "torn"
    for folder in (whole, torn):
        bench.trained.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    empty.mkdir()
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot load the model from '.*torn'"):
        ps.ImplicitPRM.from_pretrained(torn, whole)
    with pytest.raises(ValueError, match=r"cannot load the model from '.*torn'"):
        ps.HFPolicy.from_pretrained(torn)
    with pytest.raises(FileNotFoundError, match=r"there is no model in '.*empty': no config.json"):
        ps.ImplicitPRM.from_pretrained(empty, whole)
    with pytest.raises(FileNotFoundError, match=r"'.*absent' is not a folder with a model"):
        ps.HFPolicy.from_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"reference is missing, and '.*whole' has no pair.json and is no adapter"):
        ps.ImplicitPRM.from_pretrained(whole)
    with pytest.raises(OSError, match="nonsense"):
        ps.ImplicitPRM.from_pretrained(whole, "nonsense")


# -- vocabularies and contexts ----------------------------------------------------------------------------------------


def test_a_pair_of_two_vocabularies(bench: Bench) -> None:
    other = ps.HFPolicy(llama(3), hf_models.tokenizer(reverse=True))
    with pytest.raises(ValueError, match="reference has another vocabulary than the model"):
        ps.ImplicitPRM(bench.trained, other, tokenizer=TOKENIZER)


def test_models_too_small_for_the_tokens(bench: Bench) -> None:
    """Widths may differ by padding, so it is a token that shows what is missing."""
    small = ps.ImplicitPRM(llama(1, vocab_size=100), bench.model, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"token ids \d+..\d+ lie outside the vocabulary of 100"):
        bench.search(scorer=small)
    with pytest.raises(ValueError, match=r"drew token \d+, but .* has 100 tokens: a pair that steers needs all of"):
        bench.search(scorer=small, strategy=ps.Steer(1.0))
    with pytest.raises(ValueError, match=r"prompts\[0\]: token ids 200..200 lie outside the vocabulary of 100"):
        small.score([[200]], [[5]])
    assert small.prm.tree.used == 0


def test_no_common_vocabulary(bench: Bench) -> None:
    """Text is read anew; what cannot be done with text is refused."""
    other = pairs.metaspace_tokenizer()
    model = llama(2, vocab_size=len(other))
    pair = ps.ImplicitPRM(model, llama(4, vocab_size=len(other)), tokenizer=other)
    result = bench.search(["hi"], scorer=pair)[0]
    assert result.value is not None
    assert math.isfinite(result.value)
    with pytest.raises(ValueError, match="given only as the policy's token ids"):
        bench.search([[5, 6]], scorer=pair)
    with pytest.raises(ValueError, match="steering needs a pair with the policy's vocabulary"):
        bench.search(["hi"], scorer=pair, strategy=ps.Steer(1.0))
    follower = ps.ImplicitPRM(model, "policy", tokenizer=other)
    with pytest.raises(ValueError, match="reference='policy': the policy has another vocabulary"):
        bench.search(["hi"], scorer=follower)
    assert pair.prm.tree.used == 0


def test_a_pair_with_less_context_than_the_policy(bench: Bench) -> None:
    pair = ps.ImplicitPRM(llama(5, max_position_embeddings=32), bench.model, tokenizer=TOKENIZER, name="short")
    for strategy in (ps.Beam(2, 2), ps.Steer(1.0)):
        result = bench.search(["a" * 28], scorer=pair, strategy=strategy)[0]
        assert len(result.token_ids) <= 4
    with pytest.raises(ValueError, match=r"prompts\[1\]: the prompt has 40 tokens; the short's context of 32 leaves"):
        bench.search(["a", "a" * 40], scorer=pair)
    assert pair.prm.tree.used == 0


def test_capacity_below_a_path(bench: Bench) -> None:
    policy = ps.HFPolicy(near(bench.model, 6), TOKENIZER, capacity=10)
    (result,) = bench.search(["a" * 6], policy=policy)
    assert result.stopped == "length"
    assert len(result.token_ids) == 4
    with pytest.raises(ValueError, match=r"prompts\[0\]: the prompt has 12 tokens; the context of 10 leaves no room"):
        bench.search(["a" * 12], policy=policy)
    pair = ps.ImplicitPRM(near(bench.model, 7), near(bench.model, 8), tokenizer=TOKENIZER, capacity=10)
    assert len(bench.search(["a" * 6], scorer=pair)[0].token_ids) == 4
    with pytest.raises(ValueError, match="capacity=20: this model is in use with 10 tokens of KV already"):
        ps.HFPolicy(policy.lm.module, TOKENIZER, capacity=20)
    assert policy.lm.tree.used == pair.prm.tree.used == 0


# -- odd, and right ---------------------------------------------------------------------------------------------------


def test_a_delimiter_that_never_comes(bench: Bench) -> None:
    rule = ps.StepRule(delimiter="never seen", max_tokens=None)
    result = bench.search(["hi"], steps=rule)[0]
    assert result.stopped == "length"
    assert [len(node.path()) for node in result.candidates] == [1] * len(result.candidates)


def test_all_candidates_cut(bench: Bench) -> None:
    for select in ("best", "majority", "weighted"):
        result = bench.search(["hi"], select=select, max_new_tokens=2, strategy=ps.BestOfN(3))[0]
        assert result.stopped == "length"
        assert result.selection is not None
        assert {node.finish for node in result.candidates} == {"length"}
        assert result.node is result.candidates[0]
        assert result.usage.sampled_tokens == {"policy": 6}
    starved = bench.search(["hi"], budget=1, max_new_tokens=5)[0]
    assert starved.stopped == "tokens"
    assert [len(node.token_ids) for node in starved.candidates] == [1]


@pytest.mark.parametrize("seed", [-1, 2**64, 2**200, -(2**70)])
def test_any_integer_is_a_seed(bench: Bench, seed: int) -> None:
    first, second = (bench.search(["hi"], seed=seed)[0] for _ in range(2))
    assert first.token_ids == second.token_ids


def test_kinds_of_prompts(bench: Bench) -> None:
    expected = [result.token_ids for result in bench.search(["a", "b", "a"])]
    assert [result.token_ids for result in bench.search(iter(["a", "b", "a"]))] == expected
    assert expected[0] != expected[2]  # equal prompts draw differently
    ids = [np.array(TOKENIZER(text)["input_ids"]) for text in ("a", "b", "a")]
    assert [result.token_ids for result in bench.search(ids)] == expected
    assert bench.search([]) == []


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-40, 1e-300, 5e-324])
def test_a_temperature_next_to_zero_is_greedy(bench: Bench, temperature: float) -> None:
    cold = bench.search(temperature=temperature, strategy=ps.BestOfN(2))
    zero = bench.search(temperature=0.0, strategy=ps.BestOfN(2))
    assert [r.token_ids for r in cold] == [r.token_ids for r in zero]
    assert [(len(r.candidates), r.candidates[0].count) for r in cold] == [(1, 2)] * 2
