"""Metrics for Prometheus by engine, where there are several; the pool bounds the number of names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapterhub.serve.engines.engine_pool import EnginePool


class EngineMetrics(Collector):
    """The metrics of the engines of a pool."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """Yield the requests that each engine was asked, those that it is answering, and whether it is in use."""
        requests = CounterMetricFamily("adapterhub_engine_requests", "Requests that an engine was asked.", labels=["engine"])
        for name, count in self._pool.requests.items():
            requests.add_metric([name], count)
        running = GaugeMetricFamily("adapterhub_engine_requests_running", "Requests that an engine answers.", labels=["engine"])
        up = GaugeMetricFamily("adapterhub_engine_up", "1 if an engine is in use.", labels=["engine"])
        for member in self._pool.members:
            running.add_metric([member.address.name], member.running)
            up.add_metric([member.address.name], member.is_up)
        yield from (requests, running, up)
