"""Counters of /metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from ..usage import Usage
from .backend import Backend

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counters of one server.

    Args:
        registry: where they are registered; None for one of their own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.requests = Counter(
            "prm_search_requests", "Requests by route and outcome.", ["route", "outcome"], registry=self.registry
        )
        self.tokens = Counter(
            "prm_search_tokens",
            "Tokens of ended searches: sampled, encoded, cached (found encoded) or reencoded (after eviction), by "
            "the model's part.",
            ["kind", "model"],
            registry=self.registry,
        )
        self.in_flight = Gauge("prm_search_searches_in_flight", "Prompts being searched.", registry=self.registry)
        self.seconds = Histogram(
            "prm_search_request_seconds", "Requests that were answered.", ["route"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def watch(self, engine: Backend) -> None:
        """Tell an engine's seconds and forwards too."""
        self.registry.register(_Costs(engine))

    def add(self, usage: Usage) -> None:
        """Count a search's tokens."""
        for kind in ("sampled", "encoded", "cached", "reencoded"):
            for model, tokens in getattr(usage, f"{kind}_tokens").items():
                self.tokens.labels(kind, model).inc(tokens)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class _Costs(Collector):
    def __init__(self, engine: Backend) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        for name, documentation, values in zip(
            ("prm_search_phase_seconds", "prm_search_forward_calls"),
            ("Seconds spent, by phase.", "Forwards run, by phase."),
            self._engine.costs(),
            strict=True,
        ):
            family = CounterMetricFamily(name, documentation, labels=["phase"])
            for phase in ("policy", "scorer"):
                family.add_metric([phase], values.get(phase, 0))
            yield family
