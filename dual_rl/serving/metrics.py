"""What the reward server counts, in Prometheus text format at `/metrics`."""

import math
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class ServerMetrics:
    """Metrics of one server, in their own registry, without those of the process or of vLLM."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.videos = Counter("descore_videos", "Videos by outcome.", ["outcome"], registry=self.registry)
        self.refused = Counter("descore_refused", "Requests refused, by status.", ["status"], registry=self.registry)
        self.request_seconds = Histogram(
            "descore_request_seconds", "From headers to answer.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.queue_length = Gauge("descore_queue_length", "Videos that wait.", registry=self.registry)
        self.in_flight = Gauge("descore_in_flight", "Videos that are decoded or scored.", registry=self.registry)
        self.engines = Gauge("descore_engines", "Engines that run.", registry=self.registry)
        self.runs = Gauge("descore_run", "A run's last videos.", ["run", "figure"], registry=self.registry)

    def show_runs(self, runs: Mapping[str, Mapping[str, float | None]]) -> None:
        """Set the figures of these runs, see scoring/watch.py, and forget those of others."""
        self.runs.clear()
        for run, figures in runs.items():
            for name, value in figures.items():
                self.runs.labels(run, name).set(math.nan if value is None else value)
