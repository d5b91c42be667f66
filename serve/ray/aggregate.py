"""One answer from those of all replicas, for what is asked of a fleet as a whole."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from .replica import Answer

STATES = ("ready", "loading", "unloaded", "draining", "broken", "closed")  # the best first


def _told(answer: Answer, body: Any) -> Answer:
    """An answer with another body."""
    status, headers, _ = answer
    data = json.dumps(body, separators=(",", ":")).encode("ascii")
    kept = [(name, value) for name, value in headers if name != b"content-length"]
    return status, [*kept, (b"content-length", str(len(data)).encode())], data


def _first(answers: Mapping[str, Answer]) -> Answer:
    return min(answers.values(), key=lambda answer: answer[0])


def _ready(answers: Mapping[str, Answer]) -> Answer:
    """Ready as soon as one replica is; each model's best state."""
    found = [json.loads(body) for _, _, body in answers.values()]
    best = _first(answers)
    models = {
        name: min((one["models"][name] for one in found), key=STATES.index)
        for name in found[0]["models"]
    }
    return _told(best, {"status": "ready" if best[0] == 200 else "not ready", "models": models})


def _models(answers: Mapping[str, Answer]) -> Answer:
    """Every model as the replica tells it that has it in its best state."""
    best = _first(answers)
    if best[0] != 200:
        return best
    lists = [json.loads(body)["data"] for status, _, body in answers.values() if status == 200]
    alike = zip(*lists, strict=True)  # every replica has the same models in the same order
    data = [min(same, key=lambda one: STATES.index(one["state"])) for same in alike]
    return _told(best, {"object": "list", "data": data})


def _progress(answers: Mapping[str, Answer]) -> Answer:
    """That of the replica with the most to do."""
    best = _first(answers)
    if best[0] != 200:
        return best
    fit = [answer for answer in answers.values() if answer[0] == 200]
    return max(fit, key=lambda answer: json.loads(answer[2])["state"]["job_count"])


def _metrics(answers: Mapping[str, Answer]) -> Answer:
    """All figures, each with its replica's label."""
    best = _first(answers)
    if best[0] != 200:
        return best
    registry = CollectorRegistry()
    registry.register(_Labelled({name: answer[2].decode() for name, answer in answers.items()}))
    status, headers, _ = best
    text = generate_latest(registry)
    kept = [(name, value) for name, value in headers if name != b"content-length"]
    return status, [*kept, (b"content-length", str(len(text)).encode())], text


class _Labelled(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                into = Metric(family.name, family.documentation, family.type)
                into = merged.setdefault(family.name, into)
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    into.add_sample(sample.name, labels, sample.value)
        return merged.values()


def _model(answers: Mapping[str, Answer]) -> Answer:
    """As the replica tells it that has the model in its best state."""
    best = _first(answers)
    if best[0] != 200:
        return best
    fit = [answer for answer in answers.values() if answer[0] == 200]
    return min(fit, key=lambda answer: STATES.index(json.loads(answer[2])["state"]))


Merge = Callable[[Mapping[str, Answer]], Answer]
MERGED: Mapping[str, Merge] = {
    "/health/ready": _ready,
    "/v1/models": _models,
    "/sdapi/v1/progress": _progress,
    "/sdapi/v1/interrupt": _first,
    "/sdapi/v1/skip": _first,
    "/metrics": _metrics,
}


def merge_for(path: str) -> Merge | None:
    """How the answers of all replicas make one; None for what one replica answers."""
    return _model if path.startswith("/v1/models/") else MERGED.get(path)
