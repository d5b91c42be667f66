"""Merges the responses of all replicas for the endpoints that describe the whole deployment."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from .replica import ReplicaResponse

STATES = ("ready", "loading", "unloaded", "draining", "broken", "lost", "closed")  # best first


def _with_body(response: ReplicaResponse, body: Any) -> ReplicaResponse:
    """The response with another body."""
    status, headers, _ = response
    data = json.dumps(body, separators=(",", ":")).encode("ascii")
    other = [(name, value) for name, value in headers if name != b"content-length"]
    return status, [*other, (b"content-length", str(len(data)).encode())], data


def _best_response(responses: Mapping[str, ReplicaResponse]) -> ReplicaResponse:
    return min(responses.values(), key=lambda response: response[0])


def _merge_ready(responses: Mapping[str, ReplicaResponse]) -> ReplicaResponse:
    """Ready if one replica is; the best state of each model."""
    bodies = [json.loads(body) for _, _, body in responses.values()]
    best = _best_response(responses)
    models = {
        name: min((body["models"][name] for body in bodies), key=STATES.index)
        for name in bodies[0]["models"]
    }
    return _with_body(
        best, {"status": "ready" if best[0] == 200 else "not ready", "models": models}
    )


def _merge_models(responses: Mapping[str, ReplicaResponse]) -> ReplicaResponse:
    """Every model as reported by the replica that has it in the best state."""
    best = _best_response(responses)
    if best[0] != 200:
        return best
    lists = [json.loads(body)["data"] for status, _, body in responses.values() if status == 200]
    models = zip(*lists, strict=True)  # every replica has the same models in the same order
    data = [min(reports, key=lambda model: STATES.index(model["state"])) for reports in models]
    return _with_body(best, {"object": "list", "data": data})


def _merge_progress(responses: Mapping[str, ReplicaResponse]) -> ReplicaResponse:
    """The progress of the replica with the most images."""
    best = _best_response(responses)
    if best[0] != 200:
        return best
    successful = [response for response in responses.values() if response[0] == 200]
    return max(successful, key=lambda response: json.loads(response[2])["state"]["job_count"])


def _merge_metrics(responses: Mapping[str, ReplicaResponse]) -> ReplicaResponse:
    """All metrics, labelled by replica."""
    best = _best_response(responses)
    if best[0] != 200:
        return best
    registry = CollectorRegistry()
    registry.register(
        _LabelledMetrics({name: body.decode() for name, (_, _, body) in responses.items()})
    )
    status, headers, _ = best
    text = generate_latest(registry)
    other = [(name, value) for name, value in headers if name != b"content-length"]
    return status, [*other, (b"content-length", str(len(text)).encode())], text


class _LabelledMetrics(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                metric = Metric(family.name, family.documentation, family.type)
                metric = merged.setdefault(family.name, metric)
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    metric.add_sample(sample.name, labels, sample.value)
        return merged.values()


def _merge_model(responses: Mapping[str, ReplicaResponse]) -> ReplicaResponse:
    """The model as reported by the replica that has it in the best state."""
    best = _best_response(responses)
    if best[0] != 200:
        return best
    successful = [response for response in responses.values() if response[0] == 200]
    return min(successful, key=lambda response: STATES.index(json.loads(response[2])["state"]))


Merger = Callable[[Mapping[str, ReplicaResponse]], ReplicaResponse]
MERGERS: Mapping[str, Merger] = {
    "/health/ready": _merge_ready,
    "/v1/models": _merge_models,
    "/sdapi/v1/progress": _merge_progress,
    "/sdapi/v1/interrupt": _best_response,
    "/sdapi/v1/skip": _best_response,
    "/metrics": _merge_metrics,
}


def get_merger(path: str) -> Merger | None:
    """The function that merges the responses for a path; None if one replica handles it."""
    return _merge_model if path.startswith("/v1/models/") else MERGERS.get(path)
