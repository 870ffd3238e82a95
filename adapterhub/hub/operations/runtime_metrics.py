"""Metrics of what a hub waits for: its threads, its connections to the database, the bucket, and what is queued.

They are read when Prometheus asks, so that nothing else pays for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapterhub.hub import replication
from adapterhub_converters.errors import AdapterhubError

if TYPE_CHECKING:
    from adapterhub.hub.hub import Hub


class RuntimeCollector(Collector):
    """The metrics of a running hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def describe(self) -> list[Metric]:
        """Return nothing: what there is depends on where the hub keeps its data."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; those of a database that does not answer are left out."""
        waiting = GaugeMetricFamily("hub_work_waiting", "Work that waits for a thread.", labels=["threads"])
        for name, count in self._hub.workers.waiting().items():
            waiting.add_metric([name], count)
        yield waiting
        if pool := self._hub.database.connections():
            connections = GaugeMetricFamily("hub_database_connections", "Connections to the database.", labels=["state"])
            connections.add_metric(["used"], pool.open - pool.idle)
            connections.add_metric(["idle"], pool.idle)
            yield connections
            yield GaugeMetricFamily("hub_database_waiting", "Threads that wait for a connection.", value=pool.waiting)
        if bucket := self._hub.storage.bucket:
            yield CounterMetricFamily("hub_bucket_requests", "Requests to the bucket.", value=bucket.counts.requests)
            failures = bucket.counts.failures
            yield CounterMetricFamily("hub_bucket_failures", "Those that failed, after all retries.", value=failures)
        if upstream := self._hub.upstream:
            reads = CounterMetricFamily("hub_upstream_reads", "Reads of the upstream's files.", labels=["source"])
            for source, count in upstream.reads.items():
                reads.add_metric([source], count)
            yield reads
            received = upstream.received_bytes
            yield CounterMetricFamily("hub_upstream_received_bytes", "Bytes of files from the upstream.", value=received)
        try:
            yield from self._queues()
        except AdapterhubError:
            return

    def _replication(self) -> Iterator[Metric]:
        lag = GaugeMetricFamily(
            "hub_replication_lag_seconds", "Age of the oldest move that a target may lack.", labels=["target"]
        )
        names = GaugeMetricFamily("hub_replication_names", "Names with moves that a target lacks.", labels=["target", "state"])
        for state in replication.states(self._hub.database) if self._hub.settings.replications else ():
            lag.add_metric([state.target], max(time.time() - state.complete, 0.0))
            names.add_metric([state.target, "waiting"], state.waiting)
            names.add_metric([state.target, "failing"], state.failing)
        if lag.samples:
            yield lag
            yield names

    def _queues(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily("hub_queued", "What is still to be done by some process of the hub.", labels=["queue"])
        for name, count in self._hub.storage.queue_lengths().items():
            queued.add_metric([name], count)
        yield queued
        yield from self._replication()
        if self._hub.upstream:
            kept_bytes = self._hub.upstream.kept_bytes()
            yield GaugeMetricFamily(
                "hub_upstream_kept_bytes", "Bytes of the upstream's models that are kept.", value=kept_bytes
            )
