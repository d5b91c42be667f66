"""A fleet in simulation: what latency a number of replicas gives under a load.

    python benchmarks/serve_sim.py [--gpu a100] [--replicas 1,10,100,1000] [--load 0.6] [--save]

Replicas run the very rules of the engine in flight (`sdrt.runtime.batching.scheduler`) on a curve
of costs: the seconds of a call by its rows. The curves are drawn through published figures of other
runtimes, named next to each; none was measured here. `benchmarks/serve_load.py` compares the
simulation, on measured costs, with the real engine of one replica.
A request goes to the less laden of two replicas drawn at random (Mitzenmacher 2001).
"""

import argparse
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from results import save

from sdrt.runtime.batching.scheduler import CostEstimates, ScheduledRequest, select_batch

MIX = ((4, 1), (8, 2), (20, 2), (20, 1), (30, 2), (50, 2))  # evaluations and rows, alike likely


def gpu_rates(two: float, gain: float, decode: float) -> CostEstimates:
    """A curve through one published figure.

    two: seconds of a call of two rows. gain: how much more of an image a second large calls make
    decode: of one image. A single row is taken to cost 0.6 of two, as nothing is published
    """

    def call(_: object, rows: int) -> float:
        return 0.6 * two if rows == 1 else two + (rows - 2) * two / 2.0 / gain

    return CostEstimates(call, lambda _: 16, lambda _: two / 2.0, lambda _: decode)


# Stable Diffusion 1.5, 512x512, fp16. Decoding is taken to cost two guided evaluations.
GPUS: dict[str, tuple[str, CostEstimates]] = {
    "edge": (
        "assumed: the A100 slowed down by the ratio of memory rates, 1,935 to 205 GB/s (Orin)",
        gpu_rates(0.0166 * 9.4, 1.05, 2 * 0.0166 * 9.4),
    ),
    "a100": (
        "published: 50 guided steps in 861 ms (TensorRT 8.6), large batches 1.45 times as fast",
        gpu_rates(0.0166, 1.45, 2 * 0.0166),
    ),
    "h100": (
        "published: 104.6 guided steps a second (stable-fast); batches as an A100",
        gpu_rates(1.0 / 104.6, 1.45, 2 / 104.6),
    ),
}


@dataclass(slots=True, eq=False)
class Request:
    """What comes in: at a second, an image of evaluations of rows; `group` is its size."""

    at: float
    evaluations: int
    rows: int
    group: tuple[Any, ...] = (1,)
    done: float = math.nan
    begun: float = math.nan


@dataclass(slots=True)
class Replica:
    """One engine in flight. shared: whether decoding takes its time from the same processor."""

    rates: CostEstimates
    slots: int
    shared: bool = False
    clock: float = 0.0
    decoder: float = 0.0
    waiting: list[tuple[ScheduledRequest, Request]] = field(default_factory=list)
    inside: list[tuple[ScheduledRequest, Request]] = field(default_factory=list)

    @property
    def laden(self) -> int:
        return sum(turn.evaluations_left for turn, _ in (*self.waiting, *self.inside))

    def add(self, request: Request) -> None:
        turn = ScheduledRequest(request.group, request.rows, request.evaluations, request.at, 0.0)
        turn.deadline = self.rates.default_deadline(turn)
        if not self.inside and not self.waiting:
            self.clock = max(self.clock, request.at) + self.rates.prepare_seconds(request.group)
        self.waiting.append((turn, request))

    def evaluate(self) -> None:
        """One call of the model."""
        self.waiting.sort(key=lambda item: item[0].sort_key(self.clock))
        while self.waiting and len(self.inside) < self.slots:
            self.inside.append(self.waiting.pop(0))
        self.inside.sort(key=lambda item: item[0].sort_key(self.clock))
        chosen = {
            id(t) for t in select_batch([turn for turn, _ in self.inside], self.rates.max_rows)
        }
        going = [item for item in self.inside if id(item[0]) in chosen]
        group = going[0][0].batch_key
        self.clock += self.rates.call_seconds(group, sum(turn.num_rows for turn, _ in going))
        for item in going:
            turn, request = item
            turn.evaluations_left -= 1
            if math.isnan(request.begun):
                request.begun = self.clock
            if turn.evaluations_left == 0:
                self.inside.remove(item)
                self.decoder = max(self.decoder, self.clock) + self.rates.decode_seconds(group)
                request.done = self.decoder
                if self.shared:
                    self.clock += self.rates.decode_seconds(group)


def simulated(
    requests: Sequence[Request],
    rates: CostEstimates,
    replicas: int,
    slots: int,
    shared: bool = False,
    seed: int = 0,
) -> None:
    """Fill in when each request was begun and done; they are in the order of their arrival."""
    rng = np.random.default_rng(seed)
    fleet = [Replica(rates, slots, shared) for _ in range(replicas)]
    busy: list[tuple[float, int]] = []

    def run_until(second: float) -> None:
        while busy and busy[0][0] <= second:
            _, i = heapq.heappop(busy)
            fleet[i].evaluate()
            if fleet[i].inside or fleet[i].waiting:
                heapq.heappush(busy, (fleet[i].clock, i))

    for request in requests:
        run_until(request.at)
        pair = rng.integers(0, replicas, 2)
        i = int(min(pair, key=lambda k: fleet[k].laden))
        idle = not fleet[i].inside and not fleet[i].waiting
        fleet[i].add(request)
        if idle:
            heapq.heappush(busy, (fleet[i].clock, i))
    run_until(math.inf)


def poisson(count: int, rate: float, of: Callable[[np.random.Generator], Request], seed: int):
    """Requests at a mean rate a second."""
    rng = np.random.default_rng(seed)
    result, clock = [], 0.0
    for _ in range(count):
        clock += float(rng.exponential(1.0 / rate))
        request = of(rng)
        request.at = clock
        result.append(request)
    return result


def mixed(rng: np.random.Generator) -> Request:
    evaluations, rows = MIX[int(rng.integers(len(MIX)))]
    return Request(0.0, evaluations, rows)


def capacity(rates: CostEstimates, slots: int, shared: bool = False) -> float:
    """Images a second of one replica that is never idle."""
    requests = poisson(400, 1e9, mixed, 1)
    simulated(requests, rates, 1, slots, shared)
    return len(requests) / max(request.done for request in requests)


def percentiles(requests: Sequence[Request]) -> dict[str, float]:
    """Seconds from arrival to image, and of the short requests."""
    every = [r.done - r.at for r in requests]
    short = [r.done - r.at for r in requests if r.evaluations <= 8]
    values = {f"p{q}": float(np.percentile(every, q)) for q in (50, 95, 99)}
    return values | {"short_p95": float(np.percentile(short, 95))} if short else values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), action="append")
    parser.add_argument("--replicas", default="1,10,100,1000")
    parser.add_argument("--load", type=float, default=0.6, help="share of the capacity")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    figures: dict[str, Any] = {"load": args.load, "slots": args.slots}
    claims = {}
    for gpu in args.gpu or GPUS:
        source, rates = GPUS[gpu]
        max_rate = capacity(rates, args.slots)
        rows = {}
        for replicas in (int(part) for part in args.replicas.split(",")):
            requests = poisson(
                200 * min(replicas, 100) + 1000, args.load * max_rate * replicas, mixed, 2
            )
            simulated(requests, rates, replicas, args.slots)
            rows[str(replicas)] = percentiles(requests)
            print(
                f"{gpu:6} {replicas:5} replicas {args.load * max_rate * replicas:9.1f} images/s  ",
                "  ".join(f"{k} {v:.3f} s" for k, v in rows[str(replicas)].items()),
            )
        figures[gpu] = {"source": source, "images_per_second": max_rate, "latency": rows}
        first, last = next(iter(rows)), list(rows)[-1]
        claims[f"simulated fleet, {gpu}: {max_rate:.2f} images/s per replica at saturation"] = (
            f"p95 {rows[first]['p95']:.2f} s with {first} of them, {rows[last]['p95']:.2f} s with "
            f"{last}, at {args.load:.0%} load"
        )
    if args.save:
        save("serve_sim", claims, figures)


if __name__ == "__main__":
    main()
