"""What Prometheus scrapes: what engines tell, each under its model's name, and HTTP's answers."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
RUNNING = ("preparing", "running", "decoding")


class Metrics:
    """One registry for one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.phases = Histogram(
            "sdrt_phase_seconds",
            "Time of a picture in one phase: queue, denoise, decode",
            ["model", "phase"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.pictures = Histogram(
            "sdrt_picture_seconds",
            "From submission to the picture",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.ended = self._counter("sdrt_pictures", "Pictures by how they ended", "model", "state")
        self.refused = self._counter("sdrt_refused", "Requests refused", "model", "cause")
        self.rows = Histogram(
            "sdrt_rows_per_call",
            "Rows of one UNet call",
            ["model"],
            buckets=ROWS,
            registry=self.registry,
        )
        self.calls = Histogram(
            "sdrt_call_seconds",
            "Time of one UNet call",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.answers = self._counter("sdrt_http_responses", "HTTP answers", "path", "status")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def answered(self, path: str, status: int) -> None:
        self.answers.labels(path, str(status)).inc()

    def watch(self, engines: Mapping[str, Any]) -> None:
        """Count the tickets of these engines at every scrape."""
        self.registry.register(_Tickets(engines))

    def observer(self, model: str) -> "Observer":
        return Observer(self, model)

    def text(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type, in the format that the scraper asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _Tickets(Collector):
    def __init__(self, engines: Mapping[str, Any]) -> None:
        self.engines = engines

    def collect(self) -> Iterable[GaugeMetricFamily]:
        running = GaugeMetricFamily("sdrt_running", "Pictures being made", labels=["model"])
        waiting = GaugeMetricFamily("sdrt_waiting", "Pictures that wait", labels=["model"])
        for name, engine in dict(self.engines).items():
            states = [ticket.state for ticket in engine.tickets()]
            running.add_metric([name], sum(state in RUNNING for state in states))
            waiting.add_metric([name], states.count("waiting"))
        yield running
        yield waiting


class Observer:
    """What one engine tells; called from its threads."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.metrics, self.model = metrics, model

    def called(self, rows: int, seconds: float) -> None:
        self.metrics.rows.labels(self.model).observe(rows)
        self.metrics.calls.labels(self.model).observe(seconds)

    def finished(self, ticket: Any) -> None:
        self.metrics.ended.labels(self.model, ticket.state).inc()
        times = ticket.times
        marks = (times.submitted, times.began, times.denoised, times.decoded)
        for phase, begin, end in zip(
            ("queue", "denoise", "decode"), marks, marks[1:], strict=False
        ):
            if begin is not None and end is not None:
                self.metrics.phases.labels(self.model, phase).observe(end - begin)
        if times.decoded is not None:
            self.metrics.pictures.labels(self.model).observe(times.decoded - times.submitted)

    def refused(self, cause: str) -> None:
        self.metrics.refused.labels(self.model, cause).inc()
