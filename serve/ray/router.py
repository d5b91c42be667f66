"""Ray's request router of the replicas: by model, and by LoRA files where they change the weights.

Knows Ray Serve; which replicas are preferred is decided in `lora_affinity`.
"""

import random
from typing import Any

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from .lora_affinity import LoraAffinity


class LoraRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # untyped
    """Ray's choice of the less busy of two random replicas that have the model; first of those that
    `LoraAffinity` prefers.
    """

    def initialize_state(self, slots: int) -> None:
        """slots: Concurrent images of a replica's engine."""
        self.affinity = LoraAffinity(slots)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """At most two replicas, and two more for when those are full."""
        if pending_request and pending_request.metadata.multiplexed_model_id:
            ids = self.apply_multiplex_routing(pending_request)
        else:
            ids = self.apply_locality_routing(pending_request)
        preferred = self._find_preferred(ids, pending_request)
        return [self._choose_two(chosen) for chosen in (preferred, list(ids)) if chosen]

    def _find_preferred(
        self, ids: set[ReplicaID], pending_request: PendingRequest | None
    ) -> list[ReplicaID]:
        model, tags = _read_target(pending_request)
        if tags is None:
            return []
        ongoing = {replica: self.replica_queue_len_cache.get(replica) or 0 for replica in ids}
        return self.affinity.find_preferred(ongoing, model, tags)

    def _choose_two(self, ids: list[ReplicaID]) -> list[RunningReplica]:
        return [self.curr_replicas[chosen] for chosen in random.sample(ids, min(2, len(ids)))]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray with all replicas whenever they change."""
        super().update_replicas(replicas)
        self.affinity.forget_others(self.curr_replicas)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called by Ray when a replica has accepted a request."""
        model, tags = _read_target(pending_request)
        if tags is not None:
            self.affinity.record(replica_id, model, tags)


def _read_target(pending_request: PendingRequest | None) -> tuple[str, str | None]:
    """The model and the LoRA files that the ingress passed with a request."""
    if pending_request is None:
        return "", None
    tags: str | None = pending_request.kwargs.get("lora_tags")
    return pending_request.metadata.multiplexed_model_id, tags
