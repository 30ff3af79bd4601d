"""VLLMImplicitPRM: an implicit PRM whose two models are vLLM engines."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Generator, Sequence
from typing import Any

from prm_search.integrations.vllm.logprob_requests import Ask, LogprobAnswer
from prm_search.integrations.vllm.scoring_engine import Pending, ScoredEngine
from prm_search.integrations.vllm.scoring_job import Job
from prm_search.scorers.implicit.implicit_prm import ConstantReference
from prm_search.scorers.pair import BETA, Pair
from prm_search.scorers.retokenise import PathReader
from prm_search.tree import Node, SearchTree

Round = list[tuple[ScoredEngine, list[Ask]]]


class VLLMImplicitPRM(Pair):
    """A pair of vLLM engines as a Scorer: the rewards of ImplicitPRM, from engines that may be anywhere.

    Each step is sent to either engine once, as the whole path so far; the engine's prefix cache has all of it but the
    step itself and the tail of a block before (asking.py has the rules that make this exact), as long as prefix caching
    is on. A model that is the policy's engine too is not asked about what the policy sampled: the nodes carry it.

    Scoring is token by token: the pair needs the policy's vocabulary. Where it has another chat template it renders the
    prompt itself.

    Args:
        model: the trained model: a vllm.LLM, an AsyncLLM, a policy over one of these, or a VLLMServer. Over an AsyncLLM
            it scores on the event loop (`asearch`, `ascore_nodes`).
        reference: the model that the PRM was initialised from, in the same forms; "policy" for the policy of the
            search, on whatever engine; or a ConstantReference for none.
        tokenizer: of both models; None for the engine's, or else a policy's.
        beta: > 0, rewards a nat.
        name: key of the rewards in Node.rewards.

    Attributes:
        beta, name, tokenizer: as given.
        prm: the trained model's engine.

    Raises:
        TypeError: model or reference is none of these.
        ValueError: beta is not a finite number > 0, name is empty, or model and reference are one engine.
    """

    def __init__(
        self,
        model: Any,
        reference: Any,
        *,
        tokenizer: Any = None,
        beta: float = BETA,
        name: str = "prm",
    ) -> None:
        self.prm: ScoredEngine = _engine("model", model)
        super().__init__(beta=beta, name=name, tokenizer=self.prm.tokenizer if tokenizer is None else tokenizer)
        self._given = (model, reference)  # engines are not kept alive by what is known of them
        self._reference: ScoredEngine | None = None
        if isinstance(reference, ConstantReference):
            self._constant = float(reference.logprob)
        elif not (isinstance(reference, str) and reference == "policy"):
            self._reference = _engine("reference", reference)
            if self._reference is self.prm:
                raise ValueError("model and reference are one engine, so every reward would be 0")
        self._reader: PathReader | None = None
        self._prompts: weakref.WeakKeyDictionary[SearchTree, tuple[int, ...]] = weakref.WeakKeyDictionary()

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def forward_calls(self) -> int:
        """Requests sent so far to its engines, whoever scored by them."""
        return sum(engine.forward_calls for engine in self._engines())

    @property
    def context(self) -> int | None:
        """Tokens that prompt and response may have together, or None where the engines do not say."""
        return min((e.context for e in self._engines() if e.context is not None), default=None)

    @property
    def policy_context(self) -> int | None:
        """The same, for a search."""
        return self.context

    @property
    def vocab(self) -> int:
        """Tokens that its models know."""
        known = [engine.vocab for engine in self._engines() if engine.vocab is not None]
        return min(known) if known else len(self.need_tokenizer())

    def _engines(self) -> list[ScoredEngine]:
        return [engine for engine in (self.prm, self._reference) if engine is not None]

    def bind(self, policy: Any) -> None:
        """Meet the policy whose nodes are to be scored; `search` does it. One policy at a time.

        Raises:
            ValueError: the policy has another vocabulary.
        """
        fit = self.match(policy)
        if not fit.tokens:
            raise ValueError(
                "the policy has another vocabulary than the pair: VLLMImplicitPRM scores the very tokens that were "
                "sampled (ImplicitPRM reads another policy's text)"
            )
        self._reader = None if fit.prompts else PathReader(self.tokenizer, self.eos_token_id, policy, fit, self.name)
        self._policy = policy

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Score nodes and their unscored ancestors; see Scorer.score_nodes. Both engines work at the same time.

        Raises:
            TypeError: an engine is an AsyncLLM.
            ValueError: with reference="policy", a node carries no log-probabilities of the policy's.
            RuntimeError: an engine gave no log-probabilities.
        """
        flow = self._flow(nodes)
        answers = None
        while True:
            try:
                batches = flow.send(answers)
            except StopIteration:
                return
            waiting: list[Pending] = []
            try:
                for engine, asks in batches:
                    waiting.append(engine.begin(asks))
                answers = [pending.result() for pending in waiting]
            except BaseException:
                for pending in waiting:
                    pending.cancel()
                raise

    async def ascore_nodes(self, nodes: Sequence[Node]) -> None:
        """score_nodes on the running event loop."""
        flow = self._flow(nodes)
        answers = None
        while True:
            try:
                batches = flow.send(answers)
            except StopIteration:
                return
            answers = list(await asyncio.gather(*(engine.ask_async(asks) for engine, asks in batches)))

    def release(self, tree: SearchTree) -> None:
        """Forget a tree."""
        self._prompts.pop(tree, None)
        for engine in self._engines():
            engine.release(tree)

    def _flow(self, nodes: Sequence[Node]) -> Generator[Round, list[list[LogprobAnswer]] | None, None]:
        """Yields rounds of asks, an engine each; is sent their answers; sets the rewards."""
        todo = self.unscored(nodes)
        if not todo:
            return
        theirs = self._known(todo) if self._reference is None else {}
        jobs = [Job(engine, todo, self._prompt) for engine in self._engines()]
        jobs = [job for job in jobs if job.spans]
        if jobs:
            engine_answers = yield [(job.engine, list(job.spans)) for job in jobs]
            assert engine_answers is not None
            for job, answers in zip(jobs, engine_answers, strict=True):
                job.take(answers)
        while any(job.again for job in jobs):
            short = [job for job in jobs if job.again]
            engine_answers = yield [(job.engine, [ask for ask, _ in job.again]) for job in short]
            assert engine_answers is not None
            for job, answers in zip(short, engine_answers, strict=True):
                job.retake(answers)
        for job in jobs:
            job.remember()
        for node in todo:
            before = self._prompt(node.tree)
            mine = self.prm.memo(node.tree, before).logprobs(node)
            other = theirs[node] if self._reference is None else self._reference.memo(node.tree, before).logprobs(node)
            self.reward(node, mine, other)

    def _known(self, nodes: Sequence[Node]) -> dict[Node, Any]:
        """The reference's half where no engine of this pair gives it."""
        if self._constant is not None:
            return dict.fromkeys(nodes, self._constant)
        return dict(zip(nodes, self.policy_logprobs(nodes), strict=True))

    def _prompt(self, tree: SearchTree) -> tuple[int, ...]:
        """The pair's token ids of a tree's prompt."""
        if tree not in self._prompts:
            own = None if self._reader is None else self._reader.prompt(tree)
            if own is not None:
                self.refuse_prompt()
            if own is None and tree.prompt.token_ids is None:
                tree.prompt = tree.prompt.with_ids(self.encode_prompt(tree.prompt))
            self._prompts[tree] = tree.prompt_ids if own is None else own
        return self._prompts[tree]


def _engine(name: str, source: Any) -> ScoredEngine:
    engine = ScoredEngine.of(source)
    if engine is None:
        raise TypeError(
            f"{name} must be a vllm.LLM, an AsyncLLM, a policy over one, or a VLLMServer, got {type(source).__name__}"
        )
    return engine
