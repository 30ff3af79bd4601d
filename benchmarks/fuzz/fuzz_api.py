"""Wrong arguments to the library's functions and classes."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from fakes import RULE, FakePolicy, FakeScorer
from fuzz_cases import Allowed, Case, Target, flag, function, nothing, one_of, real, whole
from hf_models import llama, tokenizer

import prm_search as ps
from prm_search.evaluation.statistics import pass_at_k, wilson
from prm_search.policies.hf import Steered
from prm_search.serving.limits import Limits
from prm_search.steps import confidence_quantile
from prm_search.strategies import STRATEGIES
from prm_search.training import objectives
from prm_search.training.online import OnlineUpdater
from prm_search.training.recipe import Recipe
from prm_search.training.rollouts import sample_rollouts
from prm_search.triton_kernels import guide_logits, linear_logprob
from prm_search.values import VALUES, Advantage

VALUE = one_of(*VALUES, None, function=True)
POSITIVE = real(lambda x: 0 < x < math.inf)
ANSWER = one_of("boxed", "####", "number", None, function=True)
WORDS: dict[str, tuple[str, ...]] = {
    "reduce": ("mean", "max"),
    "resample": ("systematic",),
    "weights": ("increments",),
    "rule": ("puct",),
    "backup": ("mean",),
    "prior": ("gaussian",),
    "until": ("end",),
}
NUMBERS: dict[str, Allowed] = {
    "temperature": POSITIVE,
    "ess": real(lambda x: 0 <= x <= 1),
    "end_gate": real(lambda x: 0 <= x <= 1),
    "exploration": real(lambda x: 0 <= x < math.inf, none=True),
    "rollout_steps": whole(0),
    "per_parent": whole(1, none=True),
    "widening": real(lambda x: 0 <= x <= 1),
    "keep": real(lambda x: 0 < x <= 1),
    "threshold": real(lambda x: 0.5 < x < 1, none=True),
    "consensus": real(lambda x: 0 < x <= 1, none=True),
    "below": real(lambda x: 0 < x <= 1, none=True),
    "wave": whole(1, none=True),
    "candidates": whole(2, none=True),
    "stop": one_of("adaptive", "beta", None),
    "weight": one_of("confidence", None),
    "policies": lambda given: isinstance(given, list | tuple) and all(isinstance(each, str) for each in given),
    "thresholds": lambda given: isinstance(given, list | tuple) and not given,
}


def cases(rng: random.Random, size: int) -> Iterator[Case]:
    """All of them."""
    for target in (*_configs(), *_searches(), *_models(), *_training(), *_numbers()):
        yield from target.cases(rng, size)
    yield from _particular()


def _strategy_field(name: str, default: Any, alpha: Allowed) -> Allowed:
    if name == "value":
        return VALUE
    if name == "alpha":
        return alpha
    if name in WORDS:
        return one_of(*WORDS[name])
    return flag if isinstance(default, bool) else NUMBERS.get(name, whole(1))


def _configs() -> Iterator[Target]:
    steering = real(lambda x: abs(x) <= 1e6)
    for name, made in STRATEGIES.items():
        alpha = steering if name == "steer" else real(lambda x: 0 <= x <= 1)
        fields = {each.name: _strategy_field(each.name, each.default, alpha) for each in dataclasses.fields(made)}  # type: ignore[arg-type]
        yield Target(made.__name__, made, fields)
    yield Target(
        "StepRule",
        ps.StepRule,
        {
            "delimiter": _delimiters,
            "max_tokens": whole(1, none=True),
            "regex": lambda given: given is None or (isinstance(given, str) and given != ""),
            "confidence": real(lambda x: 0 <= x <= 1, none=True),
        },
        also={
            "regex": ["(", "a{99999999999}", "(" * 5000 + ")" * 5000, "x*", "[", "(?<=a+)b", "a**", "\\", "(?P<n"],
            "delimiter": [["x", ""], ["x", 5], [b"x"]],
        },
    )
    yield Target(
        "Budget",
        ps.Budget,
        {name: whole(1, none=True) for name in ("tokens", "nodes", "depth")}
        | {"seconds": real(lambda x: 0 < x < math.inf, none=True)},
    )
    text = lambda given: given is None or isinstance(given, str)  # noqa: E731
    yield Target("Advantage", Advantage, {"alpha": real(), "prover": text, "value": one_of(*VALUES, function=True)})
    counts = ("searches", "body_bytes", "max_tokens", "children", "sampled_tokens")
    yield Target("Limits", Limits, dict.fromkeys(counts, whole(1)) | {"seconds": POSITIVE, "patterns": flag})
    yield Target("confidence_quantile", confidence_quantile, {"quantile": real(lambda x: 0 <= x < 1)}, {"probs": [0.5]})


def _delimiters(given: Any) -> bool:
    texts = [given] if isinstance(given, str) or not hasattr(given, "__iter__") else list(given)
    return given is None or all(isinstance(each, str) and each for each in texts)


SETTINGS: dict[str, Allowed] = {
    "strategy": one_of(*STRATEGIES),
    "steps": lambda given: given is None,
    "select": one_of("best", "majority", "weighted"),
    "answer": ANSWER,
    "value": VALUE,
    "budget": whole(1, none=True),
    "seed": whole(-(10**999)),
    "weight": one_of("softmax", "sigmoid"),
    "weight_temperature": POSITIVE,
}
SAMPLING: dict[str, Allowed] = {
    "temperature": real(lambda x: 0 <= x < math.inf),
    "top_p": real(lambda x: 0 < x <= 1),
    "top_k": whole(0),
    "min_p": real(lambda x: 0 <= x <= 1),
    "max_new_tokens": whole(1),
}


def _searches() -> Iterator[Target]:
    def search(**given: Any) -> object:
        options = {"policy": FakePolicy(), "scorer": FakeScorer(), "steps": RULE, "max_new_tokens": 6} | given
        return ps.search(options.pop("prompts", [[65]]), **options)

    others = {
        "prompts": lambda given: given in ([], ["x"], (), [[]]) or given == {},
        "policy": nothing,
        "scorer": lambda given: given is None,
        "prover": lambda given: given is None,
        "on_event": function(none=True),
    }
    safe = {name: _scalar(allowed) for name, allowed in (SETTINGS | SAMPLING | others).items()}
    yield Target(
        "search",
        search,
        safe | {"prompts": lambda given: isinstance(given, list | tuple | dict | set | np.ndarray | range)},
    )
    model = llama()
    pair = ps.ImplicitPRM(llama(1), model, tokenizer=tokenizer())
    yield Target(
        "PRMGuidance",
        lambda **given: ps.PRMGuidance(given.pop("pair", pair), **given),
        {name: _scalar(allowed) for name, allowed in SETTINGS.items()}
        | {"pair": nothing, "seed": lambda given: given is None or SETTINGS["seed"](given)},
    )


def _scalar(allowed: Allowed) -> Allowed:
    """Numpy arrays compare item by item: they are wrong for every argument here."""
    return lambda given: not isinstance(given, np.ndarray) and allowed(given)


def _models() -> Iterator[Target]:
    model, trained, words = llama(), llama(1), tokenizer()
    policy, pair = ps.HFPolicy(model, words), ps.ImplicitPRM(trained, model, tokenizer=words)
    ids = lambda given: given is None or isinstance(given, list | tuple | set | range | dict | np.ndarray)  # noqa: E731
    yield Target(
        "HFPolicy",
        lambda **given: ps.HFPolicy(given.pop("model", model), given.pop("tokenizer", words), **given),
        {
            "model": nothing,
            "tokenizer": nothing,
            "max_rows": whole(1),
            "stop_ids": ids,
            "sampler": lambda given: given is None,
            "stop": function(none=True),
        },
        also={"stop_ids": [["x"], [None], [1.5], [-1], [10**30], np.array([0.5])]},
    )
    yield Target(
        "ImplicitPRM",
        lambda **given: ps.ImplicitPRM(
            given.pop("model", trained), given.pop("reference", model), **{"tokenizer": words} | given
        ),
        {
            "model": nothing,
            "reference": nothing,
            "beta": real(lambda x: 1e-30 <= x <= 1e30),
            "tokenizer": lambda given: given is None,
            "eos_token_id": whole(0, none=True),
            "name": lambda given: isinstance(given, str) and given != "",
        },
        also={"eos_token_id": [258, 10**9]},
    )
    yield Target(
        "Steered",
        lambda **given: Steered(given.pop("policy", policy), given.pop("pair", pair), given.pop("alpha", 1.0)),
        {"policy": nothing, "pair": nothing, "alpha": real(lambda x: abs(x) <= 1e6)},
    )
    lists = lambda given: isinstance(given, list | tuple | range | set | dict | np.ndarray)  # noqa: E731

    def score(**given: Any) -> object:
        options = {"prompts": ["a"], "responses": [[5, 6]]} | given
        return pair.score(options.pop("prompts"), options.pop("responses"), **options)

    yield Target(
        "ImplicitPRM.score",
        score,
        {
            "prompts": lists,
            "responses": lists,
            "steps": lambda given: given is None or lists(given),
            "logprobs": lambda given: given is None or lists(given),
            "append_eos": lambda given: flag(given) or lists(given),
            "batch_tokens": whole(1),
        },
        also={
            "prompts": [[""], [None], [5], [[900]], [[-1]], [[1.5]]],
            "responses": [[""], [None], [5], [[900]], [[1.5]], [[]]],
            "steps": [[[1.5, 2]], [[2, 1]], [[3]], [["x"]], [[True, 2]], [[0, 2]], [None], [[]], [[math.nan, 2]]],
            "logprobs": [
                [[0.5, -1.0]],
                [[math.inf, -1.0]],
                [[-math.inf, -1.0]],
                [[math.nan, -1.0]],
                [[-1.0]],
                [["x", "y"]],
                [5],
            ],
            "append_eos": [["no"], [None], [1, 0], [5], [True, False]],
        },
    )
    yield Target(
        "ImplicitPRM.score_nodes",
        lambda nodes: pair.score_nodes(nodes),
        {
            "nodes": lambda given: (
                not isinstance(given, list | tuple | set | dict | range | np.ndarray | str | bytes)
                or len(given) == 0
                or np.ndim(given) == 0
            )
        },
        also={"nodes": [[1], ["x"], [None], [object()], 5, None]},
    )


def _training() -> Iterator[Target]:
    share, positive = real(lambda x: 0 <= x < 1), real(lambda x: 0 < x < math.inf, none=True)
    count = whole(1, none=True)
    yield Target(
        "Recipe",
        Recipe,
        {
            "objective": one_of("ce", "dpo", "kto", "nca", "ipvrm"),
            "beta": real(lambda x: 1e-30 <= x <= 1e30, none=True),
            "balanced": one_of(None, "none", "dataset", "instance"),
            "margin": one_of(0.0, 0, False),
            "lora": count,
            "freeze_layers": whole(0),
            "learning_rate": positive,
            "epochs": POSITIVE,
            "batch": whole(1),
            "micro_batch": whole(1),
            "max_length": whole(1),
            "negatives": real(lambda x: 0 <= x < math.inf),
            "problems": count,
            "per_problem": count,
            "holdout": share,
            "seed": whole(-(10**999)),
            "bf16": flag,
            "pack": flag,
            "sampled_reference": flag,
            "save_steps": whole(1),
        },
    )
    reward, label = torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0.0])
    bad = [
        torch.tensor([1.0]),
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([2.0, 0.0]),
        torch.tensor([math.nan, 0.0]),
        [1.0, 0.0],
    ]
    odd = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0.5, 0.5]]), [0.5, 0.5]]
    junk = lambda given: isinstance(given, torch.Tensor)  # noqa: E731
    yield Target(
        "ce",
        objectives.ce,
        {"reward": _not(odd, junk), "label": _not(bad, junk)},
        {"reward": reward, "label": label},
        {"reward": odd, "label": bad},
    )
    for made in (objectives.dpo, objectives.nca):
        yield Target(
            made.__name__,
            made,
            {"chosen": _not(odd, junk), "rejected": _not(odd, junk)},
            {"chosen": reward, "rejected": reward},
            {"chosen": odd, "rejected": odd},
        )
    low = [torch.tensor(-0.5), torch.tensor([-1.0, 0.0]), torch.tensor(math.nan)]
    yield Target(
        "kto",
        objectives.kto,
        {"baseline": _not(low, junk), "label": _not(bad, junk)},
        {"reward": reward, "label": label, "baseline": torch.tensor(0.0)},
        {"baseline": low, "label": bad},
    )
    mask = torch.ones(2, 1, dtype=torch.bool)
    yield Target(
        "ipvrm",
        objectives.ipvrm,
        {"margin": real(lambda x: 0 <= x < math.inf), "mask": junk, "label": _not(bad, junk)},
        {"token_rewards": reward[:, None], "mask": mask, "label": label},
        {"label": bad},
    )
    problem = ps.Problem(ps.Prompt(token_ids=(65,)), "1") if hasattr(ps, "Problem") else None
    if problem is not None:
        yield Target(
            "sample_rollouts",
            lambda **given: list(
                sample_rollouts(
                    [problem],
                    **{
                        "policy": FakePolicy(),
                        "n": 2,
                        "sampling": ps.Sampling(RULE, max_new_tokens=4),
                        "label": lambda text, answer: (None, False),
                    }
                    | given,
                )
            ),
            {"policy": nothing, "n": whole(1), "batch": whole(1)},
        )
    pair = ps.ImplicitPRM(llama(1), llama(), tokenizer=tokenizer())
    yield Target(
        "OnlineUpdater",
        lambda **given: OnlineUpdater(given.pop("pair", pair), **given),
        {
            "pair": nothing,
            "learning_rate": POSITIVE,
            "clip": POSITIVE,
            "every": whole(1),
            "micro_batch": whole(1),
            "discount": real(lambda x: 0 < x <= 1),
            "band": lambda given: given is None,
        },
        also={"band": [(0.5, 0.5), (0.8, 0.2), (math.nan, 1), ("a", "b"), (0.1,), (-1, 1), (0, 2)]},
    )


def _not(wrong: list[Any], allowed: Allowed) -> Allowed:
    """Allowed, but for these very objects."""
    return lambda given: not any(given is each for each in wrong) and allowed(given)


def _numbers() -> Iterator[Target]:
    hidden, weight, targets = torch.zeros(2, 4), torch.zeros(6, 4), torch.tensor([0, 1])
    yield Target(
        "linear_logprob",
        lambda **given: linear_logprob(hidden, weight, given.pop("targets", targets), **given),
        {"scale": real(), "softcap": real(lambda x: 0 < x < math.inf, none=True)},
        also={"scale": [math.nan, math.inf], "softcap": [0.0, -1.0, math.nan]},
    )
    rows = torch.zeros(2, 6)
    tensors = lambda given: isinstance(given, torch.Tensor)  # noqa: E731
    odd = [torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, 1.0]), torch.ones(3)]
    yield Target(
        "guide_logits",
        lambda alpha: guide_logits(rows, rows, rows, alpha),
        {"alpha": _not(odd, lambda given: tensors(given) or real()(given))},
        also={"alpha": odd},
    )
    yield Target(
        "pass_at_k",
        lambda **given: pass_at_k(**{"n": 4, "right": 2, "k": 2} | given),
        {
            "n": whole(2),
            "right": lambda given: whole(0)(given) and given <= 4,
            "k": lambda given: whole(1)(given) and given <= 4,
        },
    )
    yield Target(
        "wilson",
        lambda **given: wilson(**{"successes": 1, "n": 4} | given),
        {"successes": real(lambda x: 0 <= x <= 4), "n": real(lambda x: 1 <= x < math.inf)},
    )


def _particular() -> Iterator[Case]:
    """Mistakes that are not one argument's."""
    yield Case(
        "api",
        "a vocabulary of one",
        "vocabulary",
        "vocab_size=1",
        lambda: ps.ImplicitPRM(llama(1, vocab_size=1, eos_token_id=0), llama(0, vocab_size=1, eos_token_id=0)),
    )
    for given in ("x", 5, [], {}):
        yield Case(
            "api", "SearchTree.from_json", "source", repr(given), lambda given=given: ps.SearchTree.from_json(given)
        )  # type: ignore[misc]
    for name in ("text", "messages", "token_ids"):
        for wrong in ("" if name == "text" else [], 5, b"x", {}, [None], [[1]], {"role": 1}):
            if not (name == "messages" and wrong == {}):
                yield Case(
                    "api", "Prompt", name, repr(wrong), lambda name=name, wrong=wrong: ps.Prompt(**{name: wrong})
                )  # type: ignore[misc]
