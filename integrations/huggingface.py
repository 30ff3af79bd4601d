"""`model.generate(..., prm_guidance=...)`: a search in place of generate's own decoding loop.

`generate` prepares inputs, processors and criteria as always; `ps.generate` reads them, runs the search over the same
model, and lays the responses out as generate would. Nothing here decides what is sampled or kept.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList, StopStringCriteria

from prm_search.checks import tokenizer as check_tokenizer
from prm_search.driver.result import Result
from prm_search.engine.adapters import unwrap
from prm_search.engine.language_model import LanguageModel
from prm_search.guidance import PRMGuidance
from prm_search.integrations.hf_call import Call, check_model
from prm_search.integrations.hf_rows import CriteriaStop, ProcessorSampler, RowIds
from prm_search.integrations.hf_search import laid_out, language_model, search
from prm_search.policies.hf import HFPolicy
from prm_search.strategies import Steer
from prm_search.tree import Prompt


@dataclass
class GuidedOutput(GenerateDecoderOnlyOutput):
    """The output of `generate(..., prm_guidance=..., return_dict_in_generate=True)`.

    Attributes:
        sequences: [prompts * k, length] int64: the padded prompts and the k best responses of each.
        prm: one Result a prompt: row i is `prm[i // k].candidates[i % k]`, whose `path()` gives the steps with their
            boundaries, token rewards, rewards and values; `usage` and `tree` are the whole search's.
    """

    prm: list[Result] | None = None


def generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Sequence[Any] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    generation_config: Any = None,
    *,
    prm_guidance: PRMGuidance | None = None,
    prm_tokenizer: Any = None,
    prm_streamer: Any = None,
    **model_kwargs: Any,
) -> GuidedOutput | torch.Tensor:
    """A decoding loop for `model.generate(..., custom_generate=ps.generate, do_sample=True, prm_guidance=...)`.

    generate hands no streamer, tokenizer or assistant model to such a function; `ps.enable` makes up for that.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: from generate.
        prm_guidance: how to search.
        prm_tokenizer: the model's tokenizer; None: the pair's.
        prm_streamer: gets each step when it is settled, [1, T] ids, and the end; for a single row. Pass it as
            `streamer` too, for the prompt.

    Returns:
        What generate returns: [prompts * num_return_sequences, length] ids, or a GuidedOutput.

    Raises:
        TypeError: prm_guidance is no PRMGuidance, or the call does not come from generate.
        ValueError: something in the call cannot be honoured; the message names it.
    """
    if generation_config is None:
        raise TypeError("ps.generate is for model.generate(..., custom_generate=ps.generate, prm_guidance=...)")
    guidance = _checked(prm_guidance)
    call = Call.read(model, input_ids, stopping_criteria or [], generation_config, model_kwargs)
    many = len(call.prompts) * call.returned > 1
    if prm_streamer is not None and many:
        raise ValueError("streamer: steps can be streamed for one prompt and num_return_sequences=1 only")
    lm = language_model(model)
    tokenizer = _tokenizer(prm_tokenizer, guidance, lm)
    pad = call.pad if call.pad is not None else tokenizer.pad_token_id
    if pad is None and many:
        raise ValueError("pad_token_id is needed to return several rows, whose lengths differ: pass pad_token_id=")
    ids = RowIds(call.input_ids)
    policy = HFPolicy(
        lm,
        tokenizer,
        stop_ids=call.stop_ids,
        sampler=ProcessorSampler(logits_processor or [], ids, call.returned),
        stop=CriteriaStop(call.criteria, ids) if call.criteria else None,
    )
    greedy = not generation_config.do_sample
    settings = guidance.settings(
        max_new_tokens=call.room,
        temperature=0.0 if greedy else 1.0,  # the warpers hold the temperature
        seed=0 if greedy or guidance.seed is not None else int(torch.randint(1 << 62, ())),
        seconds=call.seconds,
    )
    if isinstance(settings.strategy, Steer):
        policy = settings.strategy.wrap(policy, guidance.pair)
    results = search(_prompts(call, guidance), policy, guidance, settings, ids, prm_streamer)
    sequences = laid_out(call, results, pad)
    if generation_config.return_dict_in_generate:
        return GuidedOutput(sequences=sequences, prm=results)
    return sequences


def enable(model: Any, tokenizer: Any) -> None:
    """Make `model.generate` take `prm_guidance=`; without it, it stays what it was.

    An absent do_sample then becomes True. The change lives on this object alone; copies and pickles of it have it too.
    Wrappers that hand generate on to the model inside them (PEFT, torch.compile) take prm_guidance as well.

    Args:
        model: a transformers causal LM, wrapped or not.
        tokenizer: its tokenizer.

    Raises:
        TypeError: the model has no generate, or tokenizer is no tokenizer.
        ValueError: it is an encoder-decoder model.
    """
    inner = _generating(model)
    check_model(inner)
    check_tokenizer("tokenizer", tokenizer)
    disable(inner)
    inner.generate = partial(_generate, inner, prm_enabled=_Enabled(tokenizer, inner.__dict__.get("generate")))


def disable(model: Any) -> None:
    """Undo `enable`; nothing happens where it was not called."""
    inner = _generating(model)
    ours = inner.__dict__.get("generate")
    if isinstance(ours, partial) and ours.func is _generate:
        before = ours.keywords["prm_enabled"].before
        if before is None:
            del inner.generate
        else:
            inner.generate = before


class _Enabled:
    """The state of an enabled model.

    Attributes:
        tokenizer: the model's.
        before: its own generate attribute before, such as that of a model with a `custom_generate` folder.
        lm: keeps the model's admission and pools from one call to the next. Copies and pickles make their own.
    """

    def __init__(self, tokenizer: Any, before: Callable[..., Any] | None) -> None:
        self.tokenizer = tokenizer
        self.before = before
        self.lm: LanguageModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lm": None}


def _generate(
    model: Any, *args: Any, prm_enabled: _Enabled, prm_guidance: PRMGuidance | None = None, **kwargs: Any
) -> Any:
    """An enabled model's generate."""
    plain = type(model).generate
    if prm_guidance is None:
        return plain(model, *args, **kwargs) if prm_enabled.before is None else prm_enabled.before(*args, **kwargs)
    _checked(prm_guidance)
    bound = inspect.signature(plain).bind(model, *args, **kwargs)
    extra = bound.arguments.pop("kwargs", {})
    named = {name: value for name, value in bound.arguments.items() if name != "self"} | extra
    for name in ("assistant_model", "synced_gpus", "inputs_embeds"):
        if named.get(name) is not None and named[name] is not False:
            raise ValueError(f"{name} cannot be used with prm_guidance")
    if named.pop("custom_generate", None) not in (None, generate):
        raise ValueError("custom_generate cannot be used with prm_guidance: both replace the decoding loop")
    tokenizer = named.pop("tokenizer", None)
    tokenizer = prm_enabled.tokenizer if tokenizer is None else tokenizer
    prm_enabled.lm = language_model(model)
    _sample_unless_told(model, named)
    _take_stop_strings(model, named, tokenizer)
    streamer = named.get("streamer")
    return plain(
        model,
        **named,
        custom_generate=generate,
        prm_guidance=prm_guidance,
        prm_tokenizer=tokenizer,
        prm_streamer=streamer,
    )


def _sample_unless_told(model: Any, named: dict[str, Any]) -> None:
    """Make do_sample True where neither the call nor a config says what it shall be: generate itself means False."""
    config = named.get("generation_config")
    choices = [named.get("do_sample"), getattr(config, "do_sample", None), model.generation_config.do_sample]
    if all(value is None for value in choices):
        if config is None:
            named["do_sample"] = True
        else:  # generate warns of arguments beside a config
            named["generation_config"] = config = copy.deepcopy(config)
            config.do_sample = True


def _take_stop_strings(model: Any, named: dict[str, Any], tokenizer: Any) -> None:
    """Turn stop_strings into a criterion: generate drops the tokenizer that it needs for that itself."""
    config = named.get("generation_config")
    standing = model.generation_config.stop_strings
    sources = (named.get("stop_strings"), getattr(config, "stop_strings", None), standing)
    strings = next((source for source in sources if source is not None), None)
    if strings is None:
        return
    if config is not None and standing is None and named.get("stop_strings") is None:
        named["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    else:
        named["stop_strings"] = None
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    named["stopping_criteria"] = StoppingCriteriaList([*(named.get("stopping_criteria") or []), criterion])


def _checked(guidance: Any) -> PRMGuidance:
    if not isinstance(guidance, PRMGuidance):
        raise TypeError(f"prm_guidance must be a PRMGuidance, got {type(guidance).__name__}")
    return guidance


def _generating(model: Any) -> Any:
    inner = unwrap(model) if isinstance(model, torch.nn.Module) else model
    if not isinstance(inner, torch.nn.Module) or not callable(getattr(type(inner), "generate", None)):
        raise TypeError(f"a transformers model with generate is needed, got {type(model).__name__}")
    return inner


def _tokenizer(prm_tokenizer: Any, guidance: PRMGuidance, lm: LanguageModel) -> Any:
    tokenizer = prm_tokenizer if prm_tokenizer is not None else getattr(guidance.pair, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "the model's tokenizer is not known, and the pair has none: use ps.enable(model, tokenizer), or pass "
            "prm_tokenizer= beside custom_generate="
        )
    return tokenizer


def _prompts(call: Call, guidance: PRMGuidance) -> list[Prompt]:
    if guidance.prompts is None:
        return [Prompt(token_ids=tuple(ids)) for ids in call.prompts]
    if len(guidance.prompts) != len(call.prompts):
        raise ValueError(f"prompts: {len(guidance.prompts)} were given for the {len(call.prompts)} rows of input_ids")
    return [Prompt.of(prompt).with_ids(ids) for prompt, ids in zip(guidance.prompts, call.prompts, strict=True)]
