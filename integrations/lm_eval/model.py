"""PRMSearchLM: a model of lm-evaluation-harness whose generations are searched for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from prm_search.driver.result import Result
from prm_search.policies.hf import HFPolicy
from prm_search.protocols import Scorer
from prm_search.scorers.load import load_scorer
from prm_search.search import search
from prm_search.steps import StepRule
from prm_search.strategies import STRATEGIES, Strategy
from prm_search.tree import Prompt
from prm_search.usage import Usage

log = logging.getLogger(__name__)

SAMPLING = ("top_p", "top_k", "min_p")  # of a task's generation_kwargs, as search has them
SEARCH = ("select", "answer", "budget", "value", "seed")  # of model_args
PROMPTS = 16  # searched at once where --batch_size is 1 or auto, the harness's defaults


@register_model("prm_search")
class PRMSearchLM(HFLM):
    """The harness's own HFLM, but for generate_until: each request is a search.

    Requests with equal generation arguments are searched together; equal prompts among them (`repeats`) draw
    differently. log-likelihoods are those of the plain policy.

    Args:
        pretrained: the policy, as of HFLM.
        scorer: hub id or folder of a reward model of any kind (see load_scorer), or a Scorer; None for strategies that
            need none.
        prm_format: of the scorer; see load_scorer.
        reference, beta: of a pair without a card.
        strategy: name of a strategy, or a Strategy; its own options are arguments too: width=4, expansions=4.
        delimiter, step_tokens: end of a step; the defaults are StepRule's.
        temperature: of the draws where a task asks for greedy answers and the strategy draws several. None refuses.
        select, answer, budget, value, seed: as of search.
        options: the strategy's; the others are HFLM's.

    Attributes:
        usage: tokens of all searches so far.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
    """

    def __init__(
        self,
        pretrained: Any,
        scorer: str | Scorer | None = None,
        prm_format: str = "auto",
        reference: str | None = None,
        beta: float | None = None,
        strategy: str | Strategy = "beam",
        delimiter: str | None = None,
        step_tokens: int | None = None,
        temperature: float | None = 0.8,
        **options: Any,
    ) -> None:
        own, options = _split(strategy, options)
        self.strategy = STRATEGIES[strategy](**own) if isinstance(strategy, str) else strategy
        self.arguments = {name: options.pop(name) for name in SEARCH if name in options}
        self.greedy_temperature = temperature
        rule: dict[str, Any] = {"delimiter": _characters(delimiter), "max_tokens": step_tokens}
        self.steps = StepRule(**{name: value for name, value in rule.items() if value is not None})
        super().__init__(pretrained, **options)
        self.scorer: Scorer | None = None if isinstance(scorer, str) else scorer
        if isinstance(scorer, str):
            given: dict[str, Any] = {"reference": reference, "beta": beta, "device_map": str(self.device)}
            self.scorer = load_scorer(scorer, prm_format, **{k: v for k, v in given.items() if v is not None})
        self.policy = HFPolicy(self.model, self.tokenizer)
        self.usage = Usage()
        self._conversations: dict[str, tuple[Mapping[str, Any], ...]] = {}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation. A scorer with a chat template of its own is told the messages."""
        text = str(super().apply_chat_template(chat_history, add_generation_prompt))
        if add_generation_prompt:
            self._conversations[text] = tuple(chat_history)
        return text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Search for an answer to each request; see HFLM.generate_until.

        Raises:
            ValueError: a task asks for what a search cannot do; the message names it.
        """
        from tqdm import tqdm

        texts: dict[int, str] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Searching")
        for places, gen_kwargs in self._batches(requests):
            contexts = [requests[place].args[0] for place in places]
            for place, context, text in zip(places, contexts, self._searched(contexts, gen_kwargs), strict=True):
                texts[place] = text
                self.cache_hook.add_partial("generate_until", (context, requests[place].args[1]), text)
                bar.update()
        bar.close()
        log.info("prm_search: tokens sampled %s, encoded %s", self.usage.sampled_tokens, self.usage.encoded_tokens)
        return [texts[place] for place in range(len(requests))]

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's information, with the search's."""
        scorer = None if self.scorer is None else type(self.scorer).__name__
        own = {"strategy": repr(self.strategy), "scorer": scorer, "steps": repr(self.steps), **self.arguments}
        return {**super().get_model_info(), "prm_search": own}

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Places of requests with equal generation arguments. Equal prompts stay together, so that they draw
        differently."""
        groups: dict[str, dict[str, list[int]]] = {}
        for place, request in enumerate(requests):
            context, gen_kwargs = request.args
            groups.setdefault(repr(sorted(gen_kwargs.items())), {}).setdefault(context, []).append(place)
        size = self.batch_size if isinstance(self.batch_size, int) and self.batch_size > 1 else PROMPTS
        for by_context in groups.values():
            batch: list[int] = []
            for places in by_context.values():
                if batch and len(batch) + len(places) > size:
                    yield batch, requests[batch[0]].args[1]
                    batch = []
                batch += places
            yield batch, requests[batch[0]].args[1]

    def _searched(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        """Texts of a batch."""
        asked = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        until, limit = [text for text in asked.pop("until") if text], asked.pop("max_gen_toks")
        temperature = self._temperature(asked.pop("do_sample", False), asked.pop("temperature", 0.0))
        sampling = {name: asked.pop(name) for name in SAMPLING if asked.get(name) is not None}
        if asked:
            raise ValueError(f"generation_kwargs: a search has no {', '.join(sorted(asked))}")
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        stop = [text for text in until if text != eos]  # ends a response by itself
        results = search(
            [self._prompt(context, self.max_length - limit) for context in contexts],
            policy=self.policy, scorer=self.scorer, strategy=self.strategy, steps=self.steps, max_new_tokens=limit,
            temperature=temperature, stop=stop or None, **sampling, **self.arguments,
        )  # fmt: skip
        self.usage = sum((result.usage for result in results), self.usage)
        return [self._text(result, until) for result in results]

    def _temperature(self, do_sample: bool, temperature: float) -> float:
        if do_sample or temperature > 0:
            return temperature
        if getattr(self.strategy, "n", None) == 1:
            return 0.0
        if self.greedy_temperature is None:
            raise ValueError(
                f"generation_kwargs: a greedy answer is asked for, and {self.strategy!r} draws several; give "
                "temperature= in model_args, or --gen_kwargs do_sample=true,temperature=0.8"
            )
        return self.greedy_temperature

    def _prompt(self, context: str, room: int) -> Prompt:
        """A request's context in the policy's tokens, the last that leave room for an answer."""
        if room < 1:
            raise ValueError(f"max_gen_toks leaves no room for a prompt in {self.max_length} tokens")
        encoded, _ = self.tok_batch_encode([context], left_truncate_len=room, truncation=self.truncation)
        ids = tuple(encoded[0].tolist())
        messages = self._conversations.get(context)
        prompt = Prompt(text=context) if messages is None else Prompt(messages=messages)
        return prompt.with_ids(ids)

    def _text(self, result: Result, until: list[str]) -> str:
        think = self.think_end_token
        if isinstance(think, int):
            ids = list(result.token_ids)
            last = max((place for place, token in enumerate(ids) if token == think), default=-1)
            text = str(self.tok_decode(ids[last + 1 :]))
            return str(postprocess_generated_text(text.lstrip() if last >= 0 else text, until, None))
        return str(postprocess_generated_text(result.text, until, think))


def _split(strategy: str | Strategy, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The strategy's options, and the others."""
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; it is one of {', '.join(sorted(STRATEGIES))}")
    made = STRATEGIES[strategy] if isinstance(strategy, str) else None
    names = set() if made is None else {field.name for field in dataclasses.fields(made)} - set(SEARCH)  # type: ignore[arg-type]
    return {k: v for k, v in options.items() if k in names}, {k: v for k, v in options.items() if k not in names}


def _characters(delimiter: str | None) -> str | None:
    """A delimiter of a command line, where \\n and \\t are two characters each."""
    return delimiter if delimiter is None else delimiter.replace("\\n", "\n").replace("\\t", "\t")
