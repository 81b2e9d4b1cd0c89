"""What Prometheus reads: https://prometheus.io/docs/instrumenting/exposition_formats"""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .engine import Engine

PREFIX = "deepseek_r1"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class EngineCollector:
    """Reads the engines' numbers when they are asked for."""

    COUNTERS = {
        "prompt_tokens": "prompt tokens read",
        "generated_tokens": "tokens generated",
        "steps": "forwards of one token per row",
        "row_steps": "rows in these forwards, all together",
    }
    GAUGES = {"active_rows": "texts that grow right now", "waiting": "prompts that wait for rows"}

    def __init__(self, engines: Mapping[str, Engine]):
        self.engines = engines

    def collect(self) -> Iterator[Metric]:
        for family, texts in ((CounterMetricFamily, self.COUNTERS), (GaugeMetricFamily, self.GAUGES)):
            for name, text in texts.items():
                metric = family(f"{PREFIX}_{name}", text, labels=["model"])
                for model, engine in self.engines.items():
                    metric.add_metric([model], getattr(engine, name))
                yield metric


class Metrics:
    """Numbers of one application, in a registry of its own, by the model that has answered (none where a request is refused
    before one is chosen).

    Attributes:
        requests: by path, status and model; 499 where the client has gone.
        seconds: of whole requests, by path and model.
        first_token_seconds: from the request to its first token, by model.
    """

    def __init__(self, engines: Mapping[str, Engine]):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engines))
        options = {"registry": self.registry}
        self.requests = Counter(f"{PREFIX}_requests", "requests", ["path", "status", "model"], **options)
        options["buckets"] = SECONDS
        self.seconds = Histogram(f"{PREFIX}_request_seconds", "time of a request", ["path", "model"], **options)
        self.first_token_seconds = Histogram(f"{PREFIX}_first_token_seconds", "time to first token", ["model"], **options)

    def text(self) -> bytes:
        return generate_latest(self.registry)
