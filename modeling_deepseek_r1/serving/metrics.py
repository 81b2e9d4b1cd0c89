"""What Prometheus reads: https://prometheus.io/docs/instrumenting/exposition_formats"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .engine import Engine

PREFIX = "deepseek_r1"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class EngineCollector:
    """Reads the engine's numbers when they are asked for."""

    COUNTERS = {
        "prompt_tokens": "prompt tokens read",
        "generated_tokens": "tokens generated",
        "steps": "forwards of one token per row",
        "row_steps": "rows in these forwards, all together",
    }
    GAUGES = {"active_rows": "texts that grow right now", "waiting": "prompts that wait for rows"}

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, text in self.COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, getattr(self.engine, name))
        for name, text in self.GAUGES.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, getattr(self.engine, name))


class Metrics:
    """Numbers of one application, in a registry of its own.

    Attributes:
        requests: by path and status; 499 where the client has gone.
        seconds: of whole requests, by path.
        first_token_seconds: from the request to its first token.
    """

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        options = {"registry": self.registry}
        self.requests = Counter(f"{PREFIX}_requests", "requests", ["path", "status"], **options)
        self.seconds = Histogram(f"{PREFIX}_request_seconds", "time of a request", ["path"], buckets=SECONDS, **options)
        self.first_token_seconds = Histogram(f"{PREFIX}_first_token_seconds", "time to first token", buckets=SECONDS, **options)

    def text(self) -> bytes:
        return generate_latest(self.registry)
