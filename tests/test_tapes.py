"""Token steps replayed from tapes: the bits of the eager step, without the module's Python, or not at all."""

from __future__ import annotations

import itertools
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny
from pairs import byte_tokenizer

import prm_search as ps
from prm_search.engine.graph_step.tape import Recorder
from prm_search.engine.graph_step.tapes import USES
from prm_search.engine.language_model import LanguageModel
from prm_search.sampling import Request, Sampling
from prm_search.tree import Prompt, SearchTree

TOKENIZER = byte_tokenizer()
PROMPT = tuple(range(40, 80))
RULE = ps.StepRule(delimiter=[chr(i) for i in range(33, 127, 5)], max_tokens=9)


def policy_of(module: Any, mode: Any = "auto", stop_ids: tuple[int, ...] = (90,)) -> ps.HFPolicy:
    lm = LanguageModel(module, None, capacity=4096)
    lm.token_steps.set_mode(mode)
    return ps.HFPolicy(lm, TOKENIZER, stop_ids=stop_ids)


def rounds(policy: ps.HFPolicy, rows: int, tokens: int = 40, rule: ps.StepRule = RULE) -> Iterator[SearchTree]:
    """Decode rows until their ends; gives the tree after each round."""
    tree = SearchTree(Prompt(token_ids=PROMPT))
    policy.submit([Request.draw(tree.root, rows, Sampling(rule, max_new_tokens=tokens), until="end", merge=False)])
    done = False
    while not done:
        done = bool(policy.advance())
        yield tree
    policy.release(tree)


def drawn(policy: ps.HFPolicy, rows: int = 6) -> list[tuple[tuple[int, ...], np.ndarray]]:
    trees = list(rounds(policy, rows))
    leaves = [node for node in trees[-1].nodes if not node.children]
    return [(tuple(leaf.path_ids()), np.concatenate([n.logprobs for n in leaf.path()])) for leaf in leaves]


# One each of: grouped heads and rotary; capped scores; learnt positions and biases; latent attention; parallel layers.
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3", "mistral-window"])
def test_a_tape_gives_what_the_module_gives(name: str) -> None:
    """Not nearly: its bits, whatever rows come and go."""
    plain = policy_of(tiny(name), "packed")
    ours = policy_of(tiny(name))
    theirs = drawn(plain)
    for _ in range(2):
        for (ids, logprobs), (other_ids, other) in zip(drawn(ours), theirs, strict=True):
            assert ids == other_ids
            np.testing.assert_array_equal(logprobs, other)
    tapes = ours.lm.token_steps.tapes
    assert tapes.refused is None
    assert tapes.replays > 0
    assert plain.lm.token_steps.tapes.replays == 0


def test_a_replay_runs_no_python_of_the_module() -> None:
    policy = policy_of(tiny(), stop_ids=())
    ran: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            ran[".".join(frame.f_globals.get("__name__", "").split(".")[:2])] += 1

    for turn, _ in enumerate(rounds(policy, 5, rule=ps.StepRule(None, max_tokens=40))):
        if turn in (16, 24):
            before = policy.lm.token_steps.tapes.replays
            sys.setprofile(profile)
        elif turn in (17, 25):
            sys.setprofile(None)
            assert policy.lm.token_steps.tapes.replays == before + 1
    assert ran["prm_search.engine"] > 0
    assert ran["transformers.models"] == 0


def test_a_tape_is_compared_with_the_module_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two of a module; a module that does something else each time has none."""
    policy = policy_of(tiny(), stop_ids=())
    tapes = policy.lm.token_steps.tapes
    ran: list[int] = []
    hidden = type(policy.lm.runner.run).hidden
    monkeypatch.setattr(
        type(policy.lm.runner.run), "hidden", lambda run, *given: (ran.append(len(given[0])), hidden(run, *given))[1]
    )
    for rows in (3, 4, 5):
        ran.clear()
        for _ in rounds(policy, rows, tokens=USES + 8, rule=ps.StepRule(None, max_tokens=None)):
            pass
        assert ran.count(rows) == USES + (rows < 5)
    assert tapes.replays == 6 + 6 + 7


def looks(forward: Any) -> Any:
    return lambda x: forward(x) if x.sum().item() != 0.5 else x


def branches(forward: Any) -> Any:
    return lambda x: forward(x) if x.sum() != 0.5 else x


def loops(forward: Any) -> Any:
    return lambda x: sum((forward(x) for _ in torch.where(x[0, 0] > 1e9)[0]), start=forward(x))


def brings_a_tensor(forward: Any) -> Any:
    one = torch.ones(1)
    return lambda x: forward(x) * one


def differs(forward: Any) -> Any:
    numbers = itertools.count(1)
    return lambda x: forward(x) * (1 + 1e-3 * next(numbers))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (looks, "looks at numbers.*item"), (branches, "looks at numbers.*bool"),
        (loops, "looks at numbers.*where"), (brings_a_tensor, "neither a param"),
        (differs, "other numbers"),
    ],
)  # fmt: skip
def test_what_is_no_straight_line_runs_eagerly(change: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {}
    for mode in ("auto", "packed"):
        module = tiny()
        mlp = module.model.layers[1].mlp
        monkeypatch.setattr(mlp, "forward", change(mlp.forward))
        policy = policy_of(module, mode)
        results[mode] = drawn(policy)
        tapes = policy.lm.token_steps.tapes
        assert tapes.replays == 0
        assert mode == "packed" or re.search(reason, tapes.refused or "")
    for (ids, logprobs), (other_ids, other) in zip(*results.values(), strict=True):
        if change is not differs:  # whose numbers are those of its calls, and recording makes one more
            assert ids == other_ids
            np.testing.assert_array_equal(logprobs, other)


def test_a_search_sees_what_has_changed_since_the_last_one() -> None:
    module = tiny()
    policy = policy_of(module)
    tapes = policy.lm.token_steps.tapes
    drawn(policy)
    replays = tapes.replays
    assert replays > 0
    other = tiny()
    for one in (module, other):
        linear = one.model.layers[0].mlp.up_proj
        linear.weight = torch.nn.Parameter(1.5 * linear.weight.detach())
    for (ids, logprobs), (other_ids, theirs) in zip(drawn(policy), drawn(policy_of(other, "packed")), strict=True):
        assert ids == other_ids
        np.testing.assert_array_equal(logprobs, theirs)
    assert tapes.replays > replays
    replays, forwards, ran = tapes.replays, policy.lm.forwards, []
    handle = module.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    drawn(policy)
    assert len(ran) == policy.lm.forwards - forwards
    assert tapes.replays == replays
    assert "hooks" in (tapes.refused or "")
    handle.remove()
    drawn(policy)
    assert tapes.replays > replays


def test_a_tape_holds_the_modules_tensors_alone() -> None:
    class Doubling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3,), 2.0))

    module = Doubling()
    ids, positions = torch.arange(3), torch.ones(3)
    recorder = Recorder(ids, positions, module.parameters())
    with torch.no_grad(), recorder:
        middle = ids * module.weight
        gone = weakref.ref(middle)
        low, high = torch.stack([middle, positions.to(torch.float32)]).unbind(0)
        low[1:] = 7.0
        result = torch.cat((low, high))[:-1]
        del middle
    assert gone() is None
    tape = recorder.tape(result)
    with torch.no_grad():
        module.weight.fill_(3.0)
        again = tape(torch.tensor([5, 6, 8]), torch.tensor([1.0, 2.0, 4.0]), lambda *_: ids)
    assert again.tolist() == [15.0, 7.0, 7.0, 1.0, 2.0]
    assert positions.tolist() == [1.0, 1.0, 1.0]
