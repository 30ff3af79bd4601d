"""Calibration: from a scorer's values to probabilities of success. No torch; only fitting needs scikit-learn."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .checks import shown
from .files import parse_json
from .tree import Node
from .values import VALUES, resolve_value

Method = Literal["platt", "isotonic"]
EDGE = 1e-6  # log-odds are of probabilities within [EDGE, 1 - EDGE]


@dataclass(frozen=True)
class Calibration:
    """A map from values to probabilities that a response is right, that never falls where values rise.

    "platt": p(x) = 1 / (1 + exp(-(slope x + offset))), fitted with Platt's smoothed targets (1999), so that few or
    perfectly separated responses give no certainty. "isotonic": the least-squares step map (PAV), read with straight
    lines between its corners; needs hundreds of responses.

    Attributes:
        method: see above.
        value: the name of `values.VALUES` that was fitted; "reward" for a scorer's own number for a response.
        slope, offset: of "platt".
        x, y: of "isotonic": corners, rising.
        responses, right: that it was fitted on.

    Raises:
        ValueError: the method or value is unknown, or the map falls or is not finite.
    """

    method: Method
    value: str = "reward"
    slope: float = 0.0
    offset: float = 0.0
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    responses: int = 0
    right: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r}: it is 'platt' or 'isotonic'")
        if self.value != "reward" and self.value not in VALUES:
            raise ValueError(f"value={self.value!r} is unknown; it is 'reward' or one of {sorted(VALUES)}")
        object.__setattr__(self, "x", tuple(map(float, self.x)))
        object.__setattr__(self, "y", tuple(map(float, self.y)))
        numbers = [self.slope, self.offset, *self.x, *self.y]
        if not all(map(math.isfinite, numbers)) or self.slope < 0:
            raise ValueError(f"slope={self.slope!r}, offset={self.offset!r}: a rising, finite map is needed")
        if self.method == "isotonic":
            rising = list(self.x) == sorted(set(self.x)) and list(self.y) == sorted(self.y)
            if not self.x or len(self.x) != len(self.y) or not rising or not 0 <= self.y[0] <= self.y[-1] <= 1:
                raise ValueError("x, y: corners of a rising map to [0, 1] are needed, as many x as y")

    @classmethod
    def fit(
        cls, values: Sequence[float], labels: Sequence[bool], *, method: Method = "platt", value: str = "reward"
    ) -> Calibration:
        """Fit a map by scikit-learn (the extra `calibrate`).

        Args:
            values: a scorer's values of responses.
            labels: whether each is right.
            method, value: see Calibration.

        Raises:
            ValueError: there are not both right and wrong responses, a value is not finite, or right responses do not
                have the higher values.
            ImportError: scikit-learn is missing.
        """
        scores, right = np.asarray(values, np.float64), np.asarray(labels, bool)
        if scores.ndim != 1 or scores.shape != right.shape:
            raise ValueError(f"values and labels: one label a value is needed, got {scores.shape} and {right.shape}")
        if not np.isfinite(scores).all():
            raise ValueError(f"values[{int((~np.isfinite(scores)).argmax())}] is not finite")
        if right.all() or not right.any():
            raise ValueError(
                f"labels: right and wrong responses are needed, {int(right.sum())} of {len(right)} are right"
            )
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}: it is 'platt' or 'isotonic'")
        counts: dict[str, Any] = {"responses": len(right), "right": int(right.sum())}
        if method == "platt":
            slope, offset = _platt(scores, right)
            if slope <= 0:
                raise ValueError("values: wrong responses have the higher ones, which no rising map mends")
            return cls("platt", value, slope=slope, offset=offset, **counts)
        x, y = _isotonic(scores, right)
        return cls("isotonic", value, x=x, y=y, **counts)

    def __call__(self, value: float) -> float:
        """Return the probability that a response of this value is right."""
        if self.method == "isotonic":
            return float(np.interp(value, self.x, self.y))
        log_odds = self.slope * value + self.offset
        return 1 / (1 + math.exp(-log_odds)) if log_odds >= 0 else math.exp(log_odds) / (1 + math.exp(log_odds))

    def log_odds(self, value: float) -> float:
        """Return log(p / (1 - p)) of the probability, within EDGE of 0 and 1."""
        p = min(max(self(value), EDGE), 1 - EDGE)
        return math.log(p / (1 - p))

    def threshold(self, probability: float) -> float:
        """Return the least value whose probability is at least this one: for `eval-steps --threshold` and the like.

        Raises:
            ValueError: it is not in (0, 1), or no value reaches it.
        """
        if not 0 < probability < 1:
            raise ValueError(f"probability={probability!r}: a number in (0, 1) is needed")
        if self.method == "platt":
            if not self.slope:
                raise ValueError("the map is flat, so no value reaches a probability")
            return (math.log(probability / (1 - probability)) - self.offset) / self.slope
        if probability > self.y[-1]:
            raise ValueError(f"probability={probability!r}: the highest that a value has is {self.y[-1]:g}")
        at = int(np.searchsorted(self.y, probability, "left"))
        if at == 0:
            return self.x[0]
        low, high = self.y[at - 1], self.y[at]
        return self.x[at - 1] + (self.x[at] - self.x[at - 1]) * (probability - low) / (high - low)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        part = Path(f"{os.fspath(path)}.part")
        part.write_text(json.dumps({"format": 1, **asdict(self)}, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Read one.

        Raises:
            OSError: it cannot be read.
            ValueError: it is none; the field is named.
        """
        record = parse_json(Path(path).read_text(encoding="utf-8"), os.fspath(path))
        known = {field.name for field in fields(cls)}
        if not isinstance(record, dict) or record.get("format") != 1 or set(record) - known - {"format"}:
            raise ValueError(
                f"{os.fspath(path)}: no calibration: an object with format 1 and {sorted(known)} is needed"
            )
        try:
            return cls(**{name: record[name] for name in known & set(record)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: no calibration: {error}") from error


@dataclass(frozen=True)
class Calibrated:
    """A value for searches and votes: the log-odds that a path is right, by a calibration of another value.

    It ranks as that value does, and compares across scorers. In a vote `weight="sigmoid"` weighs each answer by its
    probability itself.

    Args:
        calibration: the map.
        value: the value that it is of: a name or a function; None for the one that it was fitted on ("reward" is q).

    Raises:
        TypeError, ValueError: calibration is none, or value not one.
    """

    calibration: Calibration
    value: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.calibration, Calibration):
            raise TypeError(f"calibration={shown(self.calibration)}: a Calibration is needed")
        resolve_value(self._name())

    def _name(self) -> Any:
        if self.value is not None:
            return self.value
        return "q" if self.calibration.value == "reward" else self.calibration.value

    def __call__(self, node: Node) -> float:
        """Return the log-odds of a node; 0 for the root."""
        return 0.0 if node.parent is None else self.calibration.log_odds(resolve_value(self._name())(node))


def _platt(values: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Slope and offset by maximum likelihood on Platt's targets: (n+ + 1) / (n+ + 2) for right, 1 / (n- + 2) for wrong.

    A response of target t is two: a right one of weight t and a wrong one of weight 1 - t. Values are standardised
    first, for the solver's sake.
    """
    LogisticRegression = _sklearn("linear_model").LogisticRegression
    positive, negative = int(right.sum()), int((~right).sum())
    target = np.where(right, (positive + 1) / (positive + 2), 1 / (negative + 2))
    scale = float(values.std()) or 1.0
    middle = float(values.mean())
    x = np.concatenate([values, values])[:, None]
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(
        (x - middle) / scale,
        np.repeat([True, False], len(values)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    slope = float(model.coef_[0, 0]) / scale
    return slope, float(model.intercept_[0]) - slope * middle


def _isotonic(values: np.ndarray, right: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    model = _sklearn("isotonic").IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
    model.fit(values, right.astype(np.float64))
    return tuple(model.X_thresholds_.tolist()), tuple(np.clip(model.y_thresholds_, 0, 1).tolist())


def _sklearn(module: str) -> Any:
    try:
        from importlib import import_module

        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError("fitting a calibration needs scikit-learn: pip install 'prm-search[calibrate]'") from error
