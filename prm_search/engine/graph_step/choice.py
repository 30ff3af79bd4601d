"""The choice of how token steps run: packed like any other work, or as a static step, replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ...triton_kernels import launch
from ..module_run import ModuleRun
from ..waves import Piece
from .cuda_graphs import Graphs, obstacle, signature
from .static_step import LONGEST_PATH, ROWS, Shape, StaticForward, StaticStep
from .tapes import Tapes

if TYPE_CHECKING:
    from collections.abc import Hashable

Mode = Literal["auto", "packed", "static", "graph"]


@dataclass(frozen=True)
class TokenStepChoice:
    """The choice for a token step; as `triton_kernels.choice` for an op.

    Fields: `way` is "packed" (planned and launched like any other forward), "static" (launched from static tensors) or
    "graph" (replayed); `reason` says why in a sentence; `detail` names the shape and whether it has been captured.
    """

    way: Literal["packed", "static", "graph"]
    reason: str
    detail: str = ""


class TokenSteps:
    """The static step of one LanguageModel, its graphs, and the rule by which they are used.

    Args:
        run: of the module.

    Attributes:
        mode: "auto" takes graphs on a CUDA device where nothing speaks against them, else "packed"; "graph" never falls
            back; "static" runs the static step without a graph, on any device; "packed" does without either.
        graphs: those captured so far.
        tapes: the same for steps that are not static; used in "auto".
    """

    def __init__(self, run: ModuleRun) -> None:
        self.mode: Mode = "auto"
        self.graphs = Graphs()
        self.tapes = Tapes(run)
        self._run = run
        self._step = StaticStep(run)
        self._why_not: str | None = None
        self._known: Hashable = None

    def set_mode(self, mode: Mode) -> None:
        """See `mode`. Raises ValueError for another word, or where "graph" is impossible."""
        if mode not in get_args(Mode):
            raise ValueError(f"stepping={mode!r}; allowed are {', '.join(map(repr, get_args(Mode)))}")
        if mode == "graph" and (why_not := self._obstacle()):
            raise ValueError(f"stepping='graph' is impossible: {why_not}; use 'auto'")
        self.mode = mode

    def choice(self, rows: int, longest: int) -> TokenStepChoice:
        """Return what one new token for each of `rows` branches runs, of paths of at most `longest` tokens."""
        if self.mode == "packed":
            return TokenStepChoice("packed", "asked for")
        if rows > ROWS or longest > LONGEST_PATH:
            return TokenStepChoice(
                "packed", f"a step has at most {ROWS} rows and paths of at most {LONGEST_PATH} tokens"
            )
        shape = Shape.of(rows, longest, shares_prefixes=False)
        detail = f"{shape.rows} lines x {shape.path} slots"
        if self.mode == "static":
            return TokenStepChoice("static", "asked for", detail)
        if (why_not := self._obstacle()) is not None:
            return TokenStepChoice("packed", why_not)
        both = [Shape(shape.rows, shape.path, shares) for shares in (False, True)]
        captured = any(self.graphs.has(one) for one in both)
        return TokenStepChoice("graph", "a CUDA device", f"{detail}, {'captured' if captured else 'not captured yet'}")

    def static(self, gpu: bool) -> bool:
        """Return True if token steps may run from static tensors, on a GPU or elsewhere."""
        return self.mode != "packed" and (self.mode != "auto" or gpu)

    def plan(self, wave: Sequence[Piece], slots: Sequence[np.ndarray]) -> StaticForward | None:
        """The step that these pieces are, or None where they run packed. Arguments as Runner.plan."""
        if not self.static(self._run.on_gpu) or not self._step.serves(wave):
            return None
        longest = max(piece.branch.start + piece.end for piece in wave)
        if self.choice(len(wave), longest).way == "packed":
            return None
        width = Shape.of(len(wave), longest, shares_prefixes=False).path
        if not self._step.fits(width):
            self.graphs.clear()
            self._step.make(width)
        return StaticForward(self._step, self._launch, wave, slots)

    def refresh(self, layers: list[Any]) -> None:
        """Before a tree is begun: drop what was captured or recorded of weights, adapters or hooks that are others now.

        Args:
            layers: the module's adapter layers.
        """
        known = signature(self._run.module, layers)
        if known != self._known:
            self.forget()
            self._known = known

    def forget(self) -> None:
        """Drop everything: captured graphs, tapes, static tensors, and why there were none."""
        self.graphs.clear()
        self.tapes.forget()
        self.graphs.refused = None
        self._step.reset()
        self._why_not = None
        self._known = None

    def _obstacle(self) -> str | None:
        if self.graphs.refused is not None:
            return self.graphs.refused
        if self._why_not is None:
            weight = self._run.module.get_input_embeddings().weight
            kernels = "backend='torch'" if self._run.backend == "torch" else launch.obstacle(weight)
            self._why_not = obstacle(self._run.module) or kernels or ""
        return self._why_not or None

    def _launch(self, shape: Shape) -> None:
        step = self._step
        if self.mode == "static":
            step.compute(shape)
            return
        self.graphs.run(shape, lambda: step.compute(shape), lambda: step.result(shape))
        if self.mode == "graph" and self.graphs.refused is not None:
            raise ValueError(f"stepping='graph' is impossible: {self.graphs.refused}; use 'auto'")
