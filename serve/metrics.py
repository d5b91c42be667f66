"""Prometheus metrics of the engines, labelled by model, and of HTTP responses."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .rate_limits import KeyUsage

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
RUNNING_STATES = ("preparing", "running", "decoding")


class Metrics:
    """One registry for one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.phase_seconds = Histogram(
            "sdrt_phase_seconds",
            "Seconds an image spends in a phase: queue, denoise, decode",
            ["model", "phase"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.wait_for_images = Histogram(
            "sdrt_picture_seconds",
            "Seconds from submission to the finished image",
            ["model"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.finished_images = self._counter(
            "sdrt_pictures", "Finished images by final state", "model", "state"
        )
        self.refused = self._counter("sdrt_refused", "Rejected requests", "model", "cause")
        self.rows_per_call = Histogram(
            "sdrt_rows_per_call",
            "Batch rows of a UNet call",
            ["model"],
            buckets=ROWS_BUCKETS,
            registry=self.registry,
        )
        self.call_seconds = Histogram(
            "sdrt_call_seconds",
            "Seconds of a UNet call",
            ["model"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.responses = self._counter("sdrt_http_responses", "HTTP responses", "path", "status")

    def _counter(self, name: str, render: str, *labels: str) -> Counter:
        return Counter(name, render, labels, registry=self.registry)

    def record_response(self, path: str, status: int) -> None:
        self.responses.labels(path, str(status)).inc()

    def track_engines(self, engines: Mapping[str, Any]) -> None:
        """Count the running and waiting images of these engines at every scrape."""
        self.registry.register(_RequestGauges(engines))

    def track_models(self, models: "ModelCounts") -> None:
        """Report which models are loaded at every scrape."""
        self.registry.register(_ModelCollector(models))

    def track_keys(self, usages: Sequence[KeyUsage]) -> None:
        """Report what each API key has used at every scrape."""
        if usages:
            self.registry.register(_KeyCollector(usages))

    def observer(self, model: str) -> "Observer":
        return Observer(self, model)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type, in the format of the Accept header."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _RequestGauges(Collector):
    def __init__(self, engines: Mapping[str, Any]) -> None:
        self.engines = engines

    def collect(self) -> Iterable[GaugeMetricFamily]:
        running = GaugeMetricFamily("sdrt_running", "Images in progress", labels=["model"])
        waiting = GaugeMetricFamily("sdrt_waiting", "Queued images", labels=["model"])
        for name, engine in dict(self.engines).items():
            states = [handle.state for handle in engine.unfinished()]
            running.add_metric([name], sum(state in RUNNING_STATES for state in states))
            waiting.add_metric([name], states.count("waiting"))
        yield running
        yield waiting


class ModelCounts(Protocol):
    """Which models are in memory; `ModelManager` is one."""

    @property
    def sources(self) -> Mapping[str, Any]:
        """All models by name."""

    @property
    def loads(self) -> Mapping[str, int]:
        """How often each was loaded."""

    @property
    def evictions(self) -> Mapping[str, int]:
        """How often each was unloaded."""

    def find(self, name: str) -> object | None:
        """A model that is loaded, else None."""

    def size_bytes(self, name: str) -> int:
        """The memory that a model needs."""


class _ModelCollector(Collector):
    def __init__(self, models: ModelCounts) -> None:
        self.models = models

    def collect(self) -> Iterable[Metric]:
        loaded = GaugeMetricFamily("sdrt_model_loaded", "1 if in memory, else 0", labels=["model"])
        size = GaugeMetricFamily("sdrt_model_bytes", "Memory that it needs", labels=["model"])
        loads = CounterMetricFamily("sdrt_model_loads", "Times it was loaded", labels=["model"])
        evictions = CounterMetricFamily(
            "sdrt_model_evictions", "Times it was unloaded", labels=["model"]
        )
        for name in self.models.sources:
            loaded.add_metric([name], self.models.find(name) is not None)
            size.add_metric([name], self.models.size_bytes(name))
            loads.add_metric([name], self.models.loads[name])
            evictions.add_metric([name], self.models.evictions[name])
        yield from (loaded, size, loads, evictions)


class _KeyCollector(Collector):
    def __init__(self, usages: Sequence[KeyUsage]) -> None:
        self.usages = usages

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("sdrt_key_requests", "Requests for images", labels=["key"])
        images = CounterMetricFamily("sdrt_key_images", "Images accepted", labels=["key"])
        work = CounterMetricFamily("sdrt_key_pixel_steps", "Work accepted", labels=["key"])
        refused = CounterMetricFamily(
            "sdrt_key_refused", "Requests refused by a limit", labels=["key", "limit"]
        )
        for usage in self.usages:
            name = usage.key.name
            requests.add_metric([name], usage.requests)
            images.add_metric([name], usage.images)
            work.add_metric([name], usage.total_pixel_steps)
            for limit, count in usage.refused.items():
                refused.add_metric([name, limit], count)
        yield from (requests, images, work, refused)


class Observer:
    """The engine's observer; called from its threads."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.metrics, self.model = metrics, model

    def batch_evaluated(self, rows: int, seconds: float) -> None:
        self.metrics.rows_per_call.labels(self.model).observe(rows)
        self.metrics.call_seconds.labels(self.model).observe(seconds)

    def request_finished(self, handle: Any) -> None:
        self.metrics.finished_images.labels(self.model, handle.state).inc()
        times = handle.times
        marks = (times.submitted, times.started, times.denoised, times.decoded)
        for phase, begin, end in zip(
            ("queue", "denoise", "decode"), marks, marks[1:], strict=False
        ):
            if begin is not None and end is not None:
                self.metrics.phase_seconds.labels(self.model, phase).observe(end - begin)
        if times.decoded is not None:
            self.metrics.wait_for_images.labels(self.model).observe(times.decoded - times.submitted)

    def request_rejected(self, cause: str) -> None:
        self.metrics.refused.labels(self.model, cause).inc()
