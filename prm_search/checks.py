"""Checks of what users pass, where it comes in, so that a wrong argument is named and not what it led to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from operator import index
from typing import Any, NoReturn, Self

import numpy as np


def number(name: str, value: object, needed: str, fits: Callable[[float], bool]) -> None:
    """Check a number.

    Args:
        name: of the argument.
        value: the argument's value.
        needed: what is allowed, in words.
        fits: returns True for an allowed number; NaN is never passed to it.

    Raises:
        TypeError: the value is not a number.
        ValueError: the value does not fit, or is NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={shown(value)}: {needed} is needed, not {type(value).__name__}")
    try:
        real = float(value)
    except OverflowError:  # an integer beyond all floats
        real = -math.inf if value < 0 else math.inf
    if math.isnan(real) or not fits(real):
        raise ValueError(f"{name}={shown(value)}: {needed} is needed")


def strength(name: str, value: object) -> None:
    """Check a strength of steering, whose product with any log-ratio has to be finite in fp32. Raises as `number`."""
    number(name, value, "a number from -1e6 to 1e6", lambda x: abs(x) <= 1e6)


def integer(name: str, value: object, least: int, needed: str, most: float = math.inf) -> None:
    """Check an integer (numpy's too); a float is refused, whole or not. Raises as `number`."""
    whole = isinstance(value, Real) and hasattr(value, "__index__")
    number(name, value, needed, lambda x: whole and least <= x <= most)


ROUNDING = 1e-5  # nats: by so much a log-softmax in fp32 may lie above 0
MANY = 1 << 20  # children, steps and the like: more is a slip of the keyboard, and never ends


def count(name: str, value: object, least: int = 1, most: int = MANY) -> None:
    """Check a number of things that are made or gone through one by one. Raises ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={shown(value)}: an integer >= {least} is needed")
    if value > most:
        raise ValueError(f"{name}={shown(value)}: at most {most:,} is allowed")


def characters(name: str, text: str) -> str:
    """The text, if UTF-8 can hold it. Raises ValueError for half a character (a lone surrogate), with its place."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f"{name} has half a character ({half!a} at {error.start}), which UTF-8 does not have"
        ) from error
    return text


def flag(name: str, value: object) -> None:
    """Check a truth value. Raises TypeError for anything else: "false" would count as true."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(f"{name}={shown(value)}: True or False is needed, not {type(value).__name__}")


def is_one_of(value: object, names: Iterable[str]) -> bool:
    """Return True if a value is a string and one of these names."""
    return isinstance(value, str) and value in names


def function(name: str, value: object, needed: str) -> None:
    """Check a function. Raises TypeError saying what is needed."""
    if not callable(value):
        raise TypeError(f"{name}={shown(value)}: {needed} is needed, not {type(value).__name__}")


def token_set(name: str, value: object, vocab: int) -> frozenset[int]:
    """Check tokens of a vocabulary, and return them.

    Raises:
        TypeError: they are not a collection of integers.
        ValueError: one lies outside the vocabulary.
    """
    needed = f"{name}={shown(value)}: token ids from 0 to {vocab - 1} are needed"
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{needed}, not {type(value).__name__}")
    ids = list(value)
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"{needed}, not {type(token).__name__}")
        if not 0 <= index(token) < vocab:
            raise ValueError(needed)
    return frozenset(map(index, ids))


def tokenizer(name: str, value: object) -> None:
    """Check a tokenizer by what is called of it. Raises TypeError."""
    if not (callable(value) and hasattr(value, "convert_ids_to_tokens")):
        raise TypeError(f"{name} must be a transformers tokenizer, got {type(value).__name__}")


class HoldsModels:
    """Base of objects that hold models: they are not pickled and not deep-copied, and say so by their name.

    A shallow copy (`copy.copy`) shares the models.
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} holds models: it cannot be pickled or deep-copied. Make one in each process, "
            "from the names of its models; results of searches can be sent"
        )

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin


def require(name: str, value: object, protocol: type) -> None:
    """Raises TypeError naming the argument and what it lacks of a runtime-checkable protocol."""
    wanted = [member for member in sorted(protocol_members(protocol)) if not hasattr(value, member)]
    if wanted:
        raise TypeError(f"{name} must be a {protocol.__name__}, but {type(value).__name__} has no {', '.join(wanted)}")


def protocol_members(protocol: type) -> set[str]:
    """Names of what a protocol asks for."""
    return {name for name in vars(protocol) if not name.startswith("_")}


def beta(name: str, value: object) -> None:
    """Check the scale of a pair's rewards, whose product with a log-ratio must neither vanish nor overflow in fp32.
    Raises as `number`."""
    needed = "a finite number > 0 that rewards in fp32 can carry, from 1e-30 to 1e30,"
    number(name, value, needed, lambda x: 1e-30 <= x <= 1e30)


def non_empty(name: str, value: object) -> None:
    """Check a string that has to say something. Raises TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)}: a non-empty string is needed, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}={value!r}: a non-empty string is needed")


def shown(value: object) -> str:
    """A value for a message, at most 80 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"an integer of about {int(value.bit_length() * 0.30103) + 1} digits" if isinstance(value, int) else "?"
    return text if len(text) <= 80 else text[:77] + "..."
