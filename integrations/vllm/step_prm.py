"""VLLMStepPRM: a step PRM whose model is a vLLM engine."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch

from prm_search.integrations.vllm.load import load_llm
from prm_search.integrations.vllm.logprob_requests import LogprobAnswer, NextTokenRequest
from prm_search.integrations.vllm.pooling import PoolRequest
from prm_search.integrations.vllm.scoring_engine import ScoredEngine
from prm_search.models.checkpoint import Checkpoint
from prm_search.scorers.explicit.formats import FORMATS, PRMFormat
from prm_search.scorers.explicit.formatted_prm import FormattedPRM, resolve_format
from prm_search.scorers.explicit.loading import architectures, looked_at
from prm_search.scorers.explicit.paths import Paths, PlainPaths, ReadPath, Write
from prm_search.scorers.explicit.readings import TensorHead, Words
from prm_search.tree import Node, SearchTree

# Heads that vLLM has a class for: its own of Qwen2.5-Math-PRM, and those that it makes of any causal LM.
TWO_LAYERS, ONE_LAYER = ("score.0", "score.2"), ("score",)


class VLLMStepPRM(FormattedPRM[ReadPath]):
    """A step PRM on a vLLM engine as a Scorer: the scores of StepPRM, from an engine that may be anywhere.

    A format that reads verdict words draws one token behind each path, whose two log-probabilities are asked for by id:
    that reads the engine's prefix cache, so a step costs itself and the tail of a block. A format with a head of its
    own asks a pooling engine: one that pools the last token, or all tokens in this process, reads the cache too; other
    engines (step pooling, the default of Qwen2.5-Math-PRM, and any over HTTP that pools tokens) encode each path
    whole, which `Usage.reencoded_tokens` counts.

    Args:
        model: a vllm.LLM, an AsyncLLM, a policy over one of these, or a VLLMServer. Over an AsyncLLM it scores on the
            event loop (`asearch`, `ascore_nodes`).
        tokenizer: the PRM's; None for the engine's.
        format: a name of `FORMATS`, or a PRMFormat that reads words or a head that vLLM has.
        name: key of the scores in Node.rewards.
        too_long: see StepPRM.

    Attributes:
        prm: the engine.

    Raises:
        TypeError: model is none of these.
        ValueError: the format is unknown, vLLM cannot run its head, or the engine is of the other kind.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        format: str | PRMFormat,
        name: str = "prm",
        too_long: Literal["error", "keep"] = "error",
    ) -> None:
        engine = ScoredEngine.of(model)
        if engine is None:
            raise TypeError(
                f"model must be a vllm.LLM, an AsyncLLM, a policy over one, or a VLLMServer, got {type(model).__name__}"
            )
        self.prm: ScoredEngine = engine
        self._given = model  # engines are not kept alive by what is known of them
        super().__init__(
            engine.tokenizer if tokenizer is None else tokenizer, format=format, name=name, too_long=too_long
        )
        self._words: tuple[int, ...] = ()
        reading = self.format.reading
        with self._of_format():
            if isinstance(reading, Words):
                self._words = tuple(reading.ids(self.tokenizer))
            elif not isinstance(reading, TensorHead) or reading.layers not in (TWO_LAYERS, ONE_LAYER):
                raise ValueError(f"vLLM has no model that gives what {reading!r} reads: StepPRM runs it")
            if engine.pools is not None and engine.pools == bool(self._words):
                needed = "generates (runner='generate')" if self._words else "pools (runner='pooling')"
                raise ValueError(f"an engine that {needed} is needed; VLLMStepPRM.from_pretrained starts one")

    @classmethod
    def from_pretrained(
        cls,
        model: str | PathLike[str],
        *,
        format: str | PRMFormat = "auto",
        name: str = "prm",
        too_long: Literal["error", "keep"] = "error",
        **options: Any,
    ) -> VLLMStepPRM:
        """Start an offline engine that runs a step PRM, set up so that it reads its prefix cache.

        Args:
            model: hub id or folder.
            format: see StepPRM.from_pretrained.
            name, too_long: see VLLMStepPRM.
            options: of vllm.LLM, which go before what is chosen here.

        Raises:
            ImportError: vLLM is not installed.
            OSError: there is no such model.
            ValueError: the format is ambiguous or unknown, or vLLM refuses the model or the options.
        """
        source = Checkpoint.of(model)
        chosen = FORMATS[looked_at(source, {}).only()] if format == "auto" else resolve_format(format)
        chosen_options = engine_options(chosen, architectures(source, {})) | options
        return cls(load_llm(source.path, **chosen_options), format=chosen, name=name, too_long=too_long)

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def models(self) -> Mapping[str, Hashable]:
        """See Scorer."""
        return {"prm": self.prm.id}

    @property
    def forward_calls(self) -> int:
        """Requests sent so far to its engine, whoever scored by it."""
        return self.prm.forward_calls

    @property
    def context(self) -> int | None:
        """Tokens of the longest path, in its own tokens."""
        limits = (self.format.longest, self.prm.context)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def vocab(self) -> int | None:
        """See ScorerBase."""
        return self.prm.vocab

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Score nodes and their unscored ancestors; see Scorer.score_nodes. One request a distinct path.

        Raises:
            TypeError: the engine is an AsyncLLM.
            ValueError: a prompt is given only as token ids, a path exceeds the PRM's length, or the engine gives other
                numbers than the format reads.
        """
        with self._scoring(nodes) as fresh:
            if fresh:
                pending = self.prm.begin(self._asks(fresh))
                self._take(fresh, pending.result())

    async def ascore_nodes(self, nodes: Sequence[Node]) -> None:
        """score_nodes on the running event loop."""
        with self._scoring(nodes) as fresh:
            if fresh:
                self._take(fresh, await self.prm.ask_async(self._asks(fresh)))

    def _asks(self, fresh: Mapping[ReadPath, Node]) -> list[NextTokenRequest | PoolRequest]:
        if self._words:
            return [NextTokenRequest(path.ids, self._words) for path in fresh]
        reading = self.format.reading
        assert isinstance(reading, TensorHead)  # as __init__ checked
        return [PoolRequest(path.ids, reading.outputs) for path in fresh]

    def _take(self, fresh: dict[ReadPath, Node], answers: Sequence[LogprobAnswer]) -> None:
        """Count what answers cost, and give paths their scores."""
        for (path, node), answer in zip(fresh.items(), answers, strict=True):
            self.prm.ledger.asked(node.tree, path.ids, answer.cached)
        reading, numbers = self.format.reading, np.stack([answer.logprobs for answer in answers])
        if isinstance(reading, Words):
            self._settle(fresh, [reading.score(row) for row in numbers.astype(np.float64).tolist()])
        elif isinstance(reading, TensorHead):
            self._settle(fresh, reading.squashed(torch.from_numpy(numbers).double()).numpy())

    def _make_paths(self, tree: SearchTree, write: Write) -> Paths[ReadPath]:
        return PlainPaths(tree, write)

    def release(self, tree: SearchTree) -> None:
        """Forget a tree."""
        super().release(tree)
        self.prm.release(tree)


def engine_options(format: PRMFormat, classes: Sequence[str]) -> dict[str, Any]:
    """Options of vllm.LLM under which it runs a format's model and reads its prefix cache.

    Args:
        format: of the PRM.
        classes: the checkpoint's architectures.
    """
    reading = format.reading
    if not isinstance(reading, TensorHead):
        return {}
    if reading.layers == TWO_LAYERS:  # step pooling, which vLLM would choose, has no prefix cache
        return {"runner": "pooling", "pooler_config": {"tok_pooling_type": "ALL"}, "enable_prefix_caching": True}
    names = [name.replace("ForTokenClassification", "ForSequenceClassification") for name in classes]
    overrides = {"architectures": names, "num_labels": reading.outputs}
    return {"runner": "pooling", "hf_overrides": overrides, "enable_prefix_caching": True}
