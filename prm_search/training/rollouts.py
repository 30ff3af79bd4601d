"""Rollouts: n whole responses a problem, each labelled by its outcome. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ..checks import require
from ..problems import Problem
from ..protocols import Policy, PolicyBase, Request, RequestFailed, Sampling
from ..search import encode_all
from ..tree import Node, Prompt, SearchTree

__all__ = ["Label", "Problem", "Rollout", "RolloutJob", "draw_rollouts", "sample_rollouts"]

Label = Callable[[str, str], tuple[str | None, bool]]


@dataclass(frozen=True)
class Rollout:
    """One response, token-exact.

    Attributes:
        problem: its problem's place in the list.
        sample: which of the problem's n responses.
        prompt_ids, response_ids: tokens of the policy; the response's end of sequence is one of them.
        text: the response, without special tokens.
        finish: "stop", or "length" where max_new_tokens or the context cut it.
        answer: the final answer that was found, or None.
        label: whether it is right. A response that was cut gave no answer: False.
        logprobs: nats, log p of the response's tokens under the policy before temperature and filters; None where the
            policy does not say.
    """

    problem: int
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    text: str
    finish: str
    answer: str | None
    label: bool
    logprobs: tuple[float, ...] | None = None

    def record(self) -> dict[str, Any]:
        """As a line of rollouts.jsonl has it."""
        return {
            "problem": self.problem,
            "sample": self.sample,
            "prompt_ids": list(self.prompt_ids),
            "response_ids": list(self.response_ids),
            "response": self.text,
            "finish": self.finish,
            "answer": self.answer,
            "label": int(self.label),
            **({} if self.logprobs is None else {"logprobs": [round(logprob, 6) for logprob in self.logprobs]}),
        }


def sample_rollouts(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    n: int,
    sampling: Sampling,
    label: Label,
    done: Collection[tuple[int, int]] = (),
    batch: int = 32,
    on_failure: Callable[[int, int, RequestFailed], object] | None = None,
) -> Iterator[Rollout]:
    """Sample and label n responses a problem; each is given out as soon as it is finished.

    Response k of a problem is what `search` with BestOfN(n) draws as its k-th: a function of seed, prompt and k alone.
    So a run that goes on after another (`done`) gives what that one would have given. The prompt's KV is shared.

    Args:
        problems: equal prompts draw differently from each other.
        policy: samples; not to be used for anything else meanwhile.
        n: responses a problem.
        sampling: how; the policy's context may leave fewer tokens.
        label: see problems.Judge: of a complete response's text and the reference answer, the answer found and the
            label.
        done: (problem, sample) of responses that are not wanted.
        batch: problems sampled together; changes no response.
        on_failure: called with problem, sample and error where the policy gave up on a response, which is left out;
            None to raise the error.

    Raises:
        ValueError: n or batch is below 1, or a prompt is empty or too long (the message names the prompt). Raised
            before anything is sampled.
        TypeError: policy is not a Policy.
    """
    for name, count in (("n", n), ("batch", batch)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}={count!r}: an integer >= 1 is needed")
    require("policy", policy, Policy)
    if sampling.stop and not PolicyBase.of(policy).takes_stop:
        raise ValueError(f"stop={sampling.stop!r}: this policy takes no stop strings")
    prompts = [problem.prompt for problem in problems]
    encoded = encode_all(prompts, lambda prompt: prompt.with_ids(policy.encode(prompt)), "problems[{}]".format)
    finished = frozenset(done)
    wanted = ([k for k in range(n) if (i, k) not in finished] for i in range(len(problems)))
    jobs = (
        RolloutJob(i, prompt, occurrence, problems[i].answer, samples)
        for i, ((prompt, occurrence), samples) in enumerate(zip(encoded, wanted, strict=True))
        if samples
    )
    return draw_rollouts(
        lambda room: list(islice(jobs, room)), policy=policy, sampling=sampling, label=label, batch=batch,
        on_failure=on_failure,
    )  # fmt: skip


@dataclass(frozen=True)
class RolloutJob:
    """The responses that are wanted of one problem.

    Attributes:
        problem: its place in the whole list.
        prompt: with its token ids.
        occurrence: how many equal prompts stand before it in the whole list.
        answer: the reference answer.
        samples: which of its responses; at least one.
    """

    problem: int
    prompt: Prompt
    occurrence: int
    answer: str
    samples: Sequence[int]


def draw_rollouts(
    take: Callable[[int], Sequence[RolloutJob]],
    *,
    policy: Policy,
    sampling: Sampling,
    label: Label,
    batch: int,
    on_failure: Callable[[int, int, RequestFailed], object] | None = None,
) -> Iterator[Rollout]:
    """Sample and label what jobs want, at most `batch` problems at a time; other arguments as of sample_rollouts.

    Args:
        take: called with the number of problems there is room for, `batch` where none is under way. Returns at most so
            many further jobs, none where there is none now; where none is under way, that is the end.
    """
    places: dict[Request, tuple[RolloutJob, int]] = {}
    left: dict[SearchTree, int] = {}
    try:
        while True:
            for job in take(batch - len(left)):
                tree = SearchTree(job.prompt, occurrence=job.occurrence)
                how = _within(sampling, PolicyBase.of(policy).context, len(tree.prompt_ids))
                requests = []
                for k in job.samples:
                    tree.root.drawn = k
                    requests.append(Request.draw(tree.root, 1, how, until="end", merge=False))
                places.update(zip(requests, ((job, k) for k in job.samples), strict=True))
                left[tree] = len(requests)
                policy.submit(requests)
            if not left:
                return
            for request, (node, *_) in policy.advance():
                job, k = places.pop(request)
                tree = request.node.tree
                text, cut = node.path_text(), node.finish != "stop"
                answer, right = (None, False) if cut else label(text, job.answer)
                ids = tuple(node.path_ids())
                _answered(tree, left, policy)
                logprobs = _logprobs(node)
                yield Rollout(job.problem, k, tree.prompt_ids, ids, text, str(node.finish), answer, right, logprobs)
            for request, error in PolicyBase.of(policy).failures():
                job, k = places.pop(request)
                _answered(request.node.tree, left, policy)
                if on_failure is None:
                    raise error
                on_failure(job.problem, k, error)
    finally:
        for tree in left:
            policy.release(tree)


def _answered(tree: SearchTree, left: dict[SearchTree, int], policy: Policy) -> None:
    """Count a request of a tree, and forget the tree with its last one."""
    left[tree] -= 1
    if not left[tree]:
        del left[tree]
        policy.release(tree)


def _logprobs(end: Node) -> tuple[float, ...] | None:
    """Log-probabilities of a path's tokens, where each node has its own."""
    parts = [node.logprobs for node in end.path()]
    if any(part is None for part in parts):
        return None
    return tuple(logprob for part in parts if part is not None for logprob in part.tolist())


def _within(sampling: Sampling, context: int | None, prompt: int) -> Sampling:
    room = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - prompt)
    return replace(sampling, max_new_tokens=room)
