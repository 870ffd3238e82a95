"""Metrics for Prometheus by version, and the gauge that tells Kubernetes gateways which server has which adapter.

The number of labels is bounded: the name in a request creates none, only a version that the engine has held, and of those only
the first thousand; with keys, routes and their arms, only the first thousand combinations.
"""

from __future__ import annotations

import time
from collections import Counter as Bag
from collections.abc import Callable, Iterator
from typing import Any, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapterhub.serve.usage.token_counts import TokenCounts

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_MAX_LABELS = 1000
_OTHER_VERSIONS = "other"


class Metrics:
    """The metrics of one gateway.

    Attributes:
        slots: The number of versions with which the engine answers at the same time.
        is_up: Whether names can be looked up.
        waiting: The number of waiting requests, by the name of a version that the engine does not hold yet.
        running: The number of requests being answered, by the name of their version.
    """

    def __init__(self, slots: int, is_up: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("adapterhub_requests", "Requests.", ("version", "path", "status"), **options)
        self._seconds = Histogram(
            "adapterhub_request_seconds", "Time until the end of the answer.", ("version",), buckets=_SECONDS, **options
        )
        self._first = Histogram(
            "adapterhub_first_byte_seconds", "Time until the answer begins.", ("version",), buckets=_SECONDS, **options
        )
        self._tokens = Counter(
            "adapterhub_tokens",
            "Tokens of prompts (those from the engine's cache included, and also by themselves) and of answers.",
            ("version", "key", "route", "arm", "kind"),
            **options,
        )
        self._feedback = Counter(
            "adapterhub_feedback", "Answers that people found good or bad.", ("version", "route", "arm", "verdict"), **options
        )
        self.running_requests = Gauge("adapterhub_requests_running", "Requests that are being read or answered.", **options)
        self.moves = Counter("adapterhub_moved_tags", "Tags that were seen to move while they were in use.", **options)
        up = Gauge("adapterhub_names_up", "1 if the registry or the remote answered when a name was looked up last.", **options)
        up.set_function(is_up)
        self.slots = slots
        self.waiting: Bag[str] = Bag()
        self.running: Bag[str] = Bag()
        self._labels: set[str] = set()
        self._token_labels: set[tuple[str, ...]] = set()
        self._token_counters: dict[tuple[str, ...], tuple[Counter, ...]] = {}  # by labels: of prompts, cached ones, answers
        self.registry.register(_LoraInfo(self))

    def count(self, version: str, path: str, status: int, first: float | None, seconds: float) -> None:
        """Count a finished request; `version` is empty if none was found."""
        # Each label stays in memory and in Prometheus for good.
        if version not in self._labels and len(self._labels) >= _MAX_LABELS:
            version = _OTHER_VERSIONS
        self._labels.add(version)
        self._requests.labels(version, path, status).inc()
        if version:
            self._seconds.labels(version).observe(seconds)
            if first is not None:
                self._first.labels(version).observe(first)

    def count_tokens(self, version: str, key: str, route: str, arm: str, tokens: TokenCounts) -> None:
        """Count the tokens of a finished request; all but the version may be empty."""
        if not tokens.total:
            return
        labels = self._bounded((version, key, route, arm))
        counters = self._token_counters.get(labels)
        if counters is None:
            counters = tuple(self._tokens.labels(*labels, kind) for kind in ("prompt", "cached", "answer"))
            self._token_counters[labels] = counters
        for counter, count in zip(counters, (tokens.prompt, tokens.cached, tokens.answer), strict=True):
            if count:
                counter.inc(count)

    def count_feedback(self, version: str, route: str, arm: str, *, is_bad: bool) -> None:
        """Count feedback on an answer."""
        # With an empty key, like tokens: both share one bound on label sets.
        bounded_version, _, *place = self._bounded((version, "", route, arm))
        self._feedback.labels(bounded_version, *place, "bad" if is_bad else "good").inc()

    def _bounded(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Return a set of labels, or that of all others once there are too many: each stays in memory for good."""
        if labels not in self._token_labels and len(self._token_labels) >= _MAX_LABELS:
            labels = (_OTHER_VERSIONS,) * len(labels)
        self._token_labels.add(labels)
        return labels

    def page(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self.registry)


class AdapterRequest:
    """A request in the gauge of adapters, by the name that it asked for: as waiting, and then as running.

    Args:
        name: The name; empty for a request of the base. One with a comma, which separates names, is not counted.
    """

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._bag, self._running, self._name = metrics.waiting, metrics.running, "" if "," in name else name

    def __enter__(self) -> Self:
        """Count it as waiting."""
        self._bag[self._name] += 1
        return self

    def begin_answer(self) -> None:
        """Count it as running."""
        self._drop()
        self._bag = self._running
        self._bag[self._name] += 1

    def __exit__(self, *_error: object) -> None:
        """Count it no longer."""
        self._drop()

    def _drop(self) -> None:
        self._bag[self._name] -= 1
        if not self._bag[self._name]:
            del self._bag[self._name]


class _LoraInfo(Collector):
    """The gauge `vllm:lora_requests_info`, as vLLM exports it: its value is the time, names are separated by commas.

    The inference extension of the Gateway API reads it (docs/proposals/003-model-server-protocol): a request goes to a server
    that has its adapter, so the names are those that requests give as `model`.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the gauge with one sample."""
        names = ("running_lora_adapters", "waiting_lora_adapters", "max_lora")
        gauge = GaugeMetricFamily("vllm:lora_requests_info", "Running stats on lora requests.", labels=names)
        running, waiting = (",".join(sorted(filter(None, bag))) for bag in (self._metrics.running, self._metrics.waiting))
        gauge.add_metric([running, waiting, str(self._metrics.slots)], time.time())
        yield gauge
