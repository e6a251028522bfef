"""What the reward server counts, in Prometheus text format at `/metrics`."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class ServerMetrics:
    """Counters of one server, in their own registry, without those of the process or of vLLM."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.videos = Counter("descore_videos", "Videos by outcome.", ["outcome"], registry=self.registry)
        self.refused = Counter("descore_refused", "Requests refused, by reason.", ["reason"], registry=self.registry)
        self.request_seconds = Histogram(
            "descore_request_seconds", "From headers to answer.", ["route"], buckets=SECONDS, registry=self.registry
        )
        for outcome in ("scored", "failed", "dropped"):
            self.videos.labels(outcome)

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """A gauge whose value `read` gives."""
        Gauge(name, description, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """All of it as text."""
        return generate_latest(self.registry)
