"""The models behind a server, as search loops: over a blocking policy in a thread, or over an asynchronous one."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakValueDictionary

from ..driver.async_loop import AsyncSearchLoop
from ..driver.result import Event
from ..protocols import AsyncPolicy, AsyncPolicyBase, Policy, PolicyBase, Scorer
from ..strategies import Steer
from ..tokens import TokenText
from ..tree import SearchTree
from .errors import RequestError
from .model_thread import ModelThread, ThreadPolicy, ThreadScorer
from .prompts import PromptLength
from .upstream import Upstream

if TYPE_CHECKING:
    from ..policies.hf import HFPolicy

Follower = Callable[[Event], object]
ENCODERS = 4  # prompts tokenised at a time


class Backend(ABC):
    """The engine that a Service searches with.

    Args:
        policy: what samples; its context and tokenizer are read, where it has them.
        token_text: bytes of the policy's tokens.

    Attributes:
        token_text: as given.
        tokenizer: the policy's; None where it has none.
        context: tokens that prompt and response may have together, where the policy says so.
        prompt_length: refuses prompts that cannot fit.
        encoders: threads in which prompts are tokenised.
        upstream: takes requests that ask for no search; None where the engine samples for those too, or another server
            answers them before they come here.
    """

    upstream: Upstream | None = None

    def __init__(self, policy: PolicyBase | AsyncPolicyBase, token_text: TokenText) -> None:
        self.token_text = token_text
        self.tokenizer = policy.tokenizer
        self.context = policy.context
        self.prompt_length = PromptLength(policy.tokenizer, token_text, self.context)
        self.encoders = ThreadPoolExecutor(ENCODERS, "prm-search prompts")
        self._followers: WeakKeyDictionary[SearchTree, Follower] = WeakKeyDictionary()

    @abstractmethod
    def loop(self, *, guided: bool, alpha: float | None) -> AsyncSearchLoop:
        """The loop that searches with the scorer or without, steered or not.

        Raises:
            RequestError: this engine has no such loop.
        """

    @abstractmethod
    def costs(self) -> tuple[Mapping[str, float], Mapping[str, int]]:
        """Seconds and forwards so far by phase ("policy", "scorer"), of all searches together."""

    @property
    def alive(self) -> bool:
        """Return True if it can search."""
        return True

    def close(self) -> None:
        """Let go of what the engine itself started."""
        self.encoders.shutdown(wait=False, cancel_futures=True)

    def follow(self, tree: SearchTree, tell: Follower) -> None:
        """Have tell called with every Event of a tree, on the event loop."""
        self._followers[tree] = tell

    def _tell(self, event: Event) -> None:
        follower = self._followers.get(event.tree)
        if follower is not None:
            follower(event)


class ThreadEngine(Backend):
    """A blocking policy, such as HFPolicy, and a scorer, both run by one thread. Make it on the server's event loop.

    Args:
        policy: samples steps.
        scorer: rewards them.
        token_text: bytes of the policy's tokens.
        clock: seconds, rising; for budgets.
    """

    def __init__(
        self, policy: Policy, scorer: Scorer, token_text: TokenText, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(PolicyBase.of(policy), token_text)
        self._thread = ModelThread()
        self._policy = ThreadPolicy(self._thread, policy)
        self._scorer = ThreadScorer(self._thread, scorer, policy)
        self._clock = clock
        self._guided = AsyncSearchLoop(self._policy, self._scorer, on_event=self._tell, clock=clock)
        self._plain = AsyncSearchLoop(self._policy, on_event=self._tell, clock=clock)
        self._steered: WeakValueDictionary[tuple[bool, float], AsyncSearchLoop] = WeakValueDictionary()

    @classmethod
    def of_hf(cls, policy: HFPolicy, scorer: Scorer) -> ThreadEngine:
        """Over an HFPolicy."""
        return cls(policy, scorer, policy.token_text)

    def loop(self, *, guided: bool, alpha: float | None) -> AsyncSearchLoop:
        """See Engine.loop. Steered searches of one strength are decoded together."""
        if alpha is None:
            return self._guided if guided else self._plain
        search_loop = self._steered.get((guided, alpha))  # lives as long as a search in it
        if search_loop is None:
            try:
                steered = Steer(alpha).wrap(self._policy.base, self._scorer.base)
            except (ValueError, TypeError) as error:
                raise RequestError(
                    400, f"prm_guidance.alpha: {error}", param="prm_guidance.alpha", code="unsupported_parameter"
                ) from error
            scorer = self._scorer if guided else None
            policy = ThreadPolicy(self._thread, steered)
            search_loop = AsyncSearchLoop(policy, scorer, on_event=self._tell, clock=self._clock)
            self._steered[guided, alpha] = search_loop
        return search_loop

    def costs(self) -> tuple[Mapping[str, float], Mapping[str, int]]:
        """See Engine.costs."""
        return self._thread.seconds, self._thread.forward_calls

    @property
    def alive(self) -> bool:
        """Return True if the thread runs."""
        return self._thread.alive

    def close(self) -> None:
        """End the thread."""
        super().close()
        self._thread.close()


class AsyncEngine(Backend):
    """A policy that is asynchronous itself, such as AsyncVLLMPolicy, and any scorer. It serves guided searches.

    Args:
        policy: samples steps.
        scorer: rewards them; in a thread, unless it has ascore_nodes.
        token_text: bytes of the policy's tokens.
        steered: makes the same policy steered with a strength; None where that cannot be.
        upstream: see Backend.
    """

    def __init__(
        self,
        policy: AsyncPolicy,
        scorer: Scorer,
        token_text: TokenText,
        steered: Callable[[float], AsyncPolicy] | None = None,
        upstream: Upstream | None = None,
    ) -> None:
        super().__init__(AsyncPolicyBase.of(policy), token_text)
        self.upstream = upstream
        self._loop = AsyncSearchLoop(policy, scorer, on_event=self._tell)
        self._steered = steered
        self._loops: WeakValueDictionary[float, AsyncSearchLoop] = WeakValueDictionary()

    def loop(self, *, guided: bool, alpha: float | None) -> AsyncSearchLoop:
        """See Engine.loop."""
        if not guided:
            raise RequestError(400, "prm_guidance is needed", param="prm_guidance", code="missing_required_parameter")
        if alpha is None:
            return self._loop
        if self._steered is None:
            param = "prm_guidance.alpha"
            why = "it runs without the logits processor" if self.upstream is None else "its policy is behind a server"
            message = f"{param}: this server cannot steer: {why}"
            raise RequestError(400, message, param=param, code="unsupported_parameter")
        search_loop = self._loops.get(alpha)  # lives as long as a search in it
        if search_loop is None:
            search_loop = self._loops[alpha] = self._loop.beside(self._steered(alpha))
        return search_loop

    def costs(self) -> tuple[Mapping[str, float], Mapping[str, int]]:
        """See Engine.costs."""
        return self._loop.models.seconds, self._loop.models.forward_calls
