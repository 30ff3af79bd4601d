"""Checks of what users pass, where it comes in, so that a wrong argument is named and not what it led to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from operator import index
from typing import Any, NoReturn, Self

import numpy as np


def number(name: str, given: object, needed: str, fits: Callable[[float], bool]) -> None:
    """Check a number.

    Args:
        name: of the argument.
        given: its value.
        needed: what is allowed, in words.
        fits: whether a number that is not NaN is allowed.

    Raises:
        TypeError: it is no number.
        ValueError: it does not fit, or is NaN.
    """
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{name}={shown(given)}: {needed} is needed, not {type(given).__name__}")
    try:
        value = float(given)
    except OverflowError:  # an integer beyond all floats
        value = -math.inf if given < 0 else math.inf
    if math.isnan(value) or not fits(value):
        raise ValueError(f"{name}={shown(given)}: {needed} is needed")


def strength(name: str, given: object) -> None:
    """Check a strength of steering, whose product with any log-ratio has to be finite in fp32. Raises as `number`."""
    number(name, given, "a number from -1e6 to 1e6", lambda value: abs(value) <= 1e6)


def integer(name: str, given: object, least: int, needed: str, most: float = math.inf) -> None:
    """Check an integer (numpy's too); a float is none, whole or not. Raises as `number`."""
    whole = isinstance(given, Real) and hasattr(given, "__index__")
    number(name, given, needed, lambda value: whole and least <= value <= most)


MANY = 1 << 20  # children, steps and the like: more is a slip of the keyboard, and never ends


def count(name: str, given: object, least: int = 1, most: int = MANY) -> None:
    """Check a number of things that are made or gone through one by one. Raises ValueError naming the argument."""
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise ValueError(f"{name}={shown(given)}: an integer >= {least} is needed")
    if given > most:
        raise ValueError(f"{name}={shown(given)}: at most {most:,} is allowed")


def characters(name: str, given: str) -> str:
    """The text, if UTF-8 can hold it. Raises ValueError for half a character (a lone surrogate), with its place."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        half = given[error.start]
        raise ValueError(
            f"{name} has half a character ({half!a} at {error.start}), which UTF-8 does not have"
        ) from error
    return given


def flag(name: str, given: object) -> None:
    """Check a truth value. Raises TypeError for anything else: "false" would count as true."""
    if not isinstance(given, bool | np.bool):
        raise TypeError(f"{name}={shown(given)}: True or False is needed, not {type(given).__name__}")


def is_one_of(given: object, names: Iterable[str]) -> bool:
    """Return True if a value is one of these names; no value of another kind is, whatever it compares equal to."""
    return isinstance(given, str) and given in names


def function(name: str, given: object, needed: str) -> None:
    """Check a function. Raises TypeError saying what is needed."""
    if not callable(given):
        raise TypeError(f"{name}={shown(given)}: {needed} is needed, not {type(given).__name__}")


def token_set(name: str, given: object, vocab: int) -> frozenset[int]:
    """Check tokens of a vocabulary, and return them.

    Raises:
        TypeError: they are not a collection of integers.
        ValueError: one lies outside the vocabulary.
    """
    needed = f"{name}={shown(given)}: token ids from 0 to {vocab - 1} are needed"
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"{needed}, not {type(given).__name__}")
    ids = list(given)
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"{needed}, not {type(token).__name__}")
        if not 0 <= index(token) < vocab:
            raise ValueError(needed)
    return frozenset(map(index, ids))


def tokenizer(name: str, given: object) -> None:
    """Check a tokenizer by what is called of it. Raises TypeError."""
    if not (callable(given) and hasattr(given, "convert_ids_to_tokens")):
        raise TypeError(f"{name} must be a transformers tokenizer, got {type(given).__name__}")


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


def require(name: str, given: object, protocol: type) -> None:
    """Raises TypeError naming the argument and what it lacks of a runtime-checkable protocol."""
    wanted = [member for member in sorted(protocol_members(protocol)) if not hasattr(given, member)]
    if wanted:
        raise TypeError(f"{name} must be a {protocol.__name__}, but {type(given).__name__} has no {', '.join(wanted)}")


def protocol_members(protocol: type) -> set[str]:
    """Names of what a protocol asks for."""
    return {name for name in vars(protocol) if not name.startswith("_")}


def beta(name: str, given: object) -> None:
    """Check the scale of a pair's rewards, whose product with a log-ratio must neither vanish nor overflow in fp32.
    Raises as `number`."""
    needed = "a finite number > 0 that rewards in fp32 can carry, from 1e-30 to 1e30,"
    number(name, given, needed, lambda value: 1e-30 <= value <= 1e30)


def non_empty(name: str, given: object) -> None:
    """Check a string that has to say something. Raises TypeError or ValueError."""
    if not isinstance(given, str):
        raise TypeError(f"{name}={shown(given)}: a non-empty string is needed, not {type(given).__name__}")
    if not given:
        raise ValueError(f"{name}={given!r}: a non-empty string is needed")


def shown(given: object) -> str:
    """A value for a message, at most 80 characters of it."""
    try:
        text = repr(given)
    except ValueError:  # an integer of more digits than Python writes
        text = f"an integer of about {int(given.bit_length() * 0.30103) + 1} digits" if isinstance(given, int) else "?"
    return text if len(text) <= 80 else text[:77] + "..."
