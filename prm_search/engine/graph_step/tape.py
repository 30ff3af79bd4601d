"""A module's forward as a straight line of torch calls: recorded once, replayed without the modules' own Python."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..attention.hook import Packed
from ..attention.layout import ScoreModifiers

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, ScoreModifiers], torch.Tensor]
Tape = Callable[[torch.Tensor, torch.Tensor, Attend], torch.Tensor]

# Calls that look at numbers, so that the Python behind them may go another way in the next step.
_READS = frozenset(("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "nonzero", "argwhere", "unique"))
_READS |= {f"__{name}__" for name in ("array", "bool", "int", "float", "index", "contains")}
_SAME = frozenset(("to", "float", "half", "bfloat16", "double", "type", "contiguous", "dropout"))  # or a new tensor
_PLAIN = (int, bool, str, type(None))  # what Python writes as it reads it


class Unrecordable(Exception):
    """A forward is no straight line of torch calls; says why."""


class Recorder(TorchFunctionMode):
    """Writes down the torch calls that are made inside it, as lines of Python.

    Args:
        ids, positions: what each step has of its own.
        known: tensors that the lines may hold on to: the module's.
    """

    def __init__(self, ids: torch.Tensor, positions: torch.Tensor, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._inputs = [ids, positions, *known]
        self._known = set(map(id, self._inputs))
        self._names = {id(ids): "ids", id(positions): "positions"}  # of objects that live: an id may come again
        self._made: dict[int, weakref.ref[torch.Tensor]] = {}
        self._numbers = itertools.count()
        self._held: dict[str, Any] = {}
        self._lines: list[tuple[list[str], set[str], str]] = []  # what a line makes, what it reads, how
        self._within = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call, and write it down where tensors come of it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._within:
            return out
        name = getattr(func, "__name__", "")
        if name in _READS or (name == "where" and len(args) + len(kwargs) == 1):  # which is nonzero by another name
            raise Unrecordable(f"it looks at numbers that it has computed, by {name}")
        if isinstance(out, torch.Tensor):
            if not (name in _SAME and args and out is args[0]):
                self._write([out], func, args, kwargs)
        elif isinstance(out, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in out):
            self._write(out, func, args, kwargs)
        elif name == "__setitem__":
            self._write([], func, args, kwargs)
        return out

    def watch(self, forward: Packed) -> Packed:
        """Have each attention of a forward be one line."""
        attend = forward.attend

        def line(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, modifiers: ScoreModifiers
        ) -> torch.Tensor:
            if modifiers.sinks is not None and id(modifiers.sinks) not in self._known:
                raise Unrecordable("its attention sinks are computed")
            self._within = True
            try:
                out = attend(layer, query, key, value, modifiers)
            finally:
                self._within = False
            self._write([out], "attend", (layer, query, key, value, modifiers), {})
            return out

        forward.attend = line  # type: ignore[method-assign]
        return forward

    def tape(self, result: torch.Tensor) -> Tape:
        """Return the lines as a function of ids, positions and the attention. It returns what `result` is here."""
        needed, body = {self._read(result, set())}, []
        for made, read, text in reversed(self._lines):
            gone = sorted((read | set(made)) - needed - self._held.keys() - {"ids", "positions", "_"})
            body += [f"del {', '.join(gone)}"] if gone else []
            body.append(f"{', '.join(made)}{',' * (len(made) > 1)} = {text}" if made else text)
            needed |= read
        source = ["def tape(ids, positions, attend):", *reversed(body), f"return {self._read(result, set())}"]
        space = dict(self._held)
        exec(compile("\n ".join(source), "<recorded forward>", "exec"), space)
        made_tape: Tape = space["tape"]
        return made_tape

    def _write(self, outs: Sequence[Any], func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        read: set[str] = set()
        parts = [self._text(arg, read) for arg in args]
        parts += [f"{key}={self._text(value, read)}" for key, value in kwargs.items()]
        text = f"{func if isinstance(func, str) else self._hold(func)}({', '.join(parts)})"
        self._lines.append(([self._name(out) for out in outs], read, text))

    def _name(self, out: Any) -> str:
        """A new name for what a line has made."""
        if not isinstance(out, torch.Tensor):
            return "_"
        key = id(out)
        self._made[key] = weakref.ref(out, lambda _: self._names.pop(key, None))
        name = self._names[key] = f"t{next(self._numbers)}"
        return name

    def _text(self, value: Any, read: set[str]) -> str:
        """An argument as Python; `read` takes the names in it."""
        if isinstance(value, torch.Tensor):
            return self._read(value, read)
        if type(value) is tuple:
            return f"({''.join(self._text(part, read) + ', ' for part in value)})"
        if type(value) is list:
            return f"[{', '.join(self._text(part, read) for part in value)}]"
        if type(value) is slice:
            return f"slice({', '.join(self._text(part, read) for part in (value.start, value.stop, value.step))})"
        if isinstance(value, (tuple, list, dict)) and not isinstance(value, torch.Size):
            raise Unrecordable(f"one of its calls takes a {type(value).__name__}")
        return repr(value) if type(value) in _PLAIN else self._hold(value)

    def _read(self, tensor: torch.Tensor, read: set[str]) -> str:
        name = self._names.get(id(tensor))
        if name is None:
            if id(tensor) not in self._known:
                raise Unrecordable("it computes with a tensor that is neither a parameter, nor a buffer, nor computed")
            name = self._names[id(tensor)] = self._hold(tensor)
        read.add(name)
        return name

    def _hold(self, thing: Any) -> str:
        """The name of an object that the lines hold on to."""
        name = f"h{id(thing)}"
        self._held[name] = thing
        return name
