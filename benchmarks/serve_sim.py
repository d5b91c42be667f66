"""A fleet in simulation: how many replicas serve a load.

    python benchmarks/serve_sim.py [--gpu a100] [--rates 1,5,20,100] [--within SECONDS] [--save]
    python benchmarks/serve_sim.py --bundle NAME|FOLDER [--steps 20,30] [--rates 0.1,0.5]

Replicas run the very rules of the engine in flight (`sdrt.runtime.batching.scheduler`) on a curve
of costs: the seconds of a call by its rows. With --bundle they are measured on this machine, as the
server measures them when it starts. Else they are drawn through published figures of other
runtimes, named next to each; none was measured here. `benchmarks/serve_load.py` compares the
simulation with the real engine of one replica. Preparing, evaluating and decoding share a replica's
processor. A request goes to the less laden of two replicas drawn at random (Mitzenmacher 2001).
"""

import argparse
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from results import save

import sdrt
from sdrt.runtime.batching.cost_model import load_cost_model
from sdrt.runtime.batching.scheduler import CostEstimates, ScheduledRequest, select_batch

MIX = ((4, 1), (8, 2), (20, 2), (20, 1), (30, 2), (50, 2))  # evaluations and rows, alike likely
FLEETS, LOADS = (1, 2, 4, 16), (0.3, 0.5, 0.7, 0.8, 0.9)


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


def as_scheduled(request: Request) -> ScheduledRequest:
    return ScheduledRequest(request.group, request.rows, request.evaluations, request.at, 0.0)


Item = tuple[ScheduledRequest, Request]


@dataclass(slots=True)
class Replica:
    """One engine in flight, whose three threads prepare, evaluate and decode, one thing each.

    shared: whether the threads share one processor, so that those at work slow each other down
    expected: the costs that deadlines are set by
    left: seconds of work before each thread at work is done with what it does
    """

    rates: CostEstimates
    slots: int
    shared: bool
    expected: CostEstimates
    clock: float = 0.0
    waiting: list[Item] = field(default_factory=list)
    running: list[Item] = field(default_factory=list)
    denoised: list[Item] = field(default_factory=list)
    preparing: list[Item] = field(default_factory=list)
    batch: list[Item] = field(default_factory=list)
    decoding: list[Item] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)

    @property
    def load(self) -> int:
        places = (self.waiting, self.preparing, self.running)
        return sum(turn.evaluations_left for items in places for turn, _ in items)

    @property
    def speed(self) -> float:
        return 1.0 / len(self.left) if self.shared and self.left else 1.0

    def next_event(self) -> float:
        """When a thread is done next; infinity if all are idle."""
        return self.clock + min(self.left.values(), default=math.inf) / self.speed

    def advance(self, second: float) -> None:
        """Let time pass; not beyond the next event."""
        work = (second - self.clock) * self.speed
        self.left = {thread: left - work for thread, left in self.left.items()}
        self.clock = second

    def add(self, request: Request) -> None:
        self.advance(request.at)
        turn = as_scheduled(request)
        turn.deadline = self.expected.default_deadline(turn)
        self.waiting.append((turn, request))
        self.start_threads()

    def finish(self) -> None:
        """The next event: a thread is done with what it did."""
        self.advance(self.next_event())
        thread = min(self.left, key=self.left.__getitem__)
        del self.left[thread]
        if thread == "prepare":
            self.running.append(self.preparing.pop())
        elif thread == "decode":
            self.decoding.pop()[1].done = self.clock
        else:
            for item in self.batch:
                self.evaluated(item)
        self.start_threads()

    def evaluated(self, item: Item) -> None:
        turn, request = item
        turn.evaluations_left -= 1
        if math.isnan(request.begun):
            request.begun = self.clock
        if turn.evaluations_left == 0:
            self.running.remove(item)
            self.denoised.append(item)

    def start_threads(self) -> None:
        """Let every idle thread take what is next, as the engine's do."""
        begun = len(self.running) + len(self.denoised) + len(self.preparing) + len(self.decoding)
        if self.waiting and not self.preparing and begun < self.slots:
            self.preparing = [self.take(self.waiting)]
            self.left["prepare"] = self.rates.prepare_seconds(self.preparing[0][0].batch_key)
        if self.running and "evaluate" not in self.left:
            ordered = sorted(self.running, key=self.order)
            running = len(self.running) + len(self.preparing)
            limit = self.rates.row_limit(running, self.slots)
            chosen = select_batch([turn for turn, _ in ordered], limit)
            turns = set(map(id, chosen))
            self.batch = [item for item in ordered if id(item[0]) in turns]
            self.left["evaluate"] = self.rates.evaluation_seconds(chosen)
        if self.denoised and not self.decoding:
            self.decoding = [self.take(self.denoised)]
            self.left["decode"] = self.rates.decode_seconds(self.decoding[0][0].batch_key)

    def order(self, item: Item) -> tuple[float, float, float]:
        return item[0].sort_key(self.clock)

    def take(self, place: list[Item]) -> Item:
        item = min(place, key=self.order)
        place.remove(item)
        return item


def simulated(
    requests: Sequence[Request],
    rates: CostEstimates,
    replicas: int,
    slots: int,
    shared: bool = False,
    expected: CostEstimates | None = None,
) -> None:
    """Fill in when each request was begun and done; they are in the order of their arrival.

    expected: the costs that deadlines are set by, where the engine's estimates are not its costs
    """
    rng = np.random.default_rng(0)
    fleet = [Replica(rates, slots, shared, expected or rates) for _ in range(replicas)]
    events: list[tuple[float, int]] = []

    def run_until(second: float) -> None:
        while events and events[0][0] <= second:
            at, i = heapq.heappop(events)
            if at == fleet[i].next_event():  # else a request that came in between has moved it
                fleet[i].finish()
                plan(i)

    def plan(i: int) -> None:
        if (at := fleet[i].next_event()) < math.inf:
            heapq.heappush(events, (at, i))

    for request in requests:
        run_until(request.at)
        i = int(min(rng.integers(0, replicas, 2), key=lambda k: fleet[k].load))
        fleet[i].add(request)
        plan(i)
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


def mixed(
    rng: np.random.Generator,
    kinds: Sequence[tuple[int, int]] = MIX,
    group: tuple[Any, ...] = (1,),
) -> Request:
    evaluations, rows = kinds[int(rng.integers(len(kinds)))]
    return Request(0.0, evaluations, rows, group)


@dataclass(frozen=True, slots=True)
class Fleet:
    """Replicas of one kind, and what they are asked for.

    create: a random request
    source: where the costs are from
    """

    rates: CostEstimates
    slots: int
    create: Callable[[np.random.Generator], Request]
    source: str

    def serve(self, replicas: int, rate: float) -> dict[str, float]:
        """Latencies at this many requests a second."""
        requests = poisson(2000 + 50 * replicas, rate, self.create, 2)
        simulated(requests, self.rates, replicas, self.slots, shared=True)
        return percentiles(requests[len(requests) // 5 :])  # they begin with idle replicas

    def capacity(self) -> float:
        """Images a second of one replica that is never idle."""
        requests = poisson(400, 1e9, self.create, 1)
        simulated(requests, self.rates, 1, self.slots, shared=True)
        return len(requests) / max(request.done for request in requests)

    def solo_p95(self) -> float:
        """Seconds within which 95 % of the requests are done alone."""
        rng = np.random.default_rng(3)
        turns = (self.create(rng) for _ in range(1000))
        alone = [self.rates.solo_seconds(as_scheduled(request)) for request in turns]
        return float(np.percentile(alone, 95))

    def find_replicas(self, rate: float, within: float) -> tuple[int, dict[str, float]]:
        """The fewest that serve 95 % of the requests within so many seconds, and latencies."""
        few, many = math.ceil(rate / self.capacity()) - 1, 0
        rows: dict[int, dict[str, float]] = {}
        while not many or many - few > 1:  # by halves
            replicas = (few + many) // 2 if many else few + max(1, few // 8)
            rows[replicas] = self.serve(replicas, rate)
            if rows[replicas]["p95"] <= within:
                many = replicas
            else:
                few = replicas
        return many, rows[many]


def percentiles(requests: Sequence[Request]) -> dict[str, float]:
    """Seconds from arrival to image, and of the short requests."""
    every = [r.done - r.at for r in requests]
    short = [r.done - r.at for r in requests if r.evaluations <= 8]
    values = {f"p{q}": float(np.percentile(every, q)) for q in (50, 95, 99)}
    return values | {"short_p95": float(np.percentile(short, 95))} if short else values


def measured_fleet(args: argparse.Namespace) -> Fleet:
    """A bundle's on this machine, at its first size."""
    with sdrt.load(args.bundle, backend=args.backend) as pipe, pipe.leases.call():
        group = (pipe.manifest.sizes[0],)
        rates = load_cost_model(pipe, 2 * args.slots).estimates()
        source = f"measured: {pipe.manifest.name} on {pipe.backend}"
    kinds = [(int(steps), 2) for steps in args.steps] or MIX
    return Fleet(rates, args.slots, partial(mixed, kinds=kinds, group=group), source)


def figures_of(fleet: Fleet, args: argparse.Namespace) -> dict[str, Any]:
    max_rate, within = fleet.capacity(), args.within or 2.0 * fleet.solo_p95()
    needed, latency = {}, {}
    for rate in args.rates:
        replicas, row = fleet.find_replicas(rate, within)
        needed[f"{rate:g}"] = {"replicas": replicas, **row}
        show(f"{rate:6g} images/s: {replicas:4} replicas", row)
    for replicas in FLEETS:
        latency[str(replicas)] = {
            f"{load:.0%}": fleet.serve(replicas, load * max_rate * replicas) for load in LOADS
        }
        show(f"{replicas:4} replicas at {LOADS[-1]:.0%} load", latency[str(replicas)]["90%"])
    return {
        "source": fleet.source,
        "images_per_second": max_rate,
        "within": within,
        "needed": needed,
        "latency": latency,
    }


def show(subject: str, row: dict[str, float]) -> None:
    print(f"{subject:28}", "  ".join(f"{k} {v:.3f} s" for k, v in row.items()), flush=True)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), action="append")
    parser.add_argument("--bundle", metavar="NAME|FOLDER", help="measure its costs here")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--steps", type=numbers, default=(), help="guided steps, alike likely")
    parser.add_argument("--rates", type=numbers, default="1,5,20,100", help="images a second")
    parser.add_argument(
        "--within",
        type=float,
        metavar="SECONDS",
        help="for 95 %% of the requests; by default twice what they take alone",
    )
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    fleets = {gpu: Fleet(GPUS[gpu][1], args.slots, mixed, GPUS[gpu][0]) for gpu in args.gpu or GPUS}
    if args.bundle:
        fleets = {args.bundle: measured_fleet(args)}
    figures: dict[str, Any] = {"slots": args.slots}
    claims = {}
    for name, fleet in fleets.items():
        print(f"{name}: {fleet.source}")
        row = figures[name] = figures_of(fleet, args)
        counts = ", ".join(f"{n['replicas']} for {rate}" for rate, n in row["needed"].items())
        claims[
            f"{name}: {row['images_per_second']:.2f} images/s per replica at saturation; replicas "
            f"for so many images/s, 95 % within {row['within']:.1f} s"
        ] = counts
    if args.save:
        save("serve_sim", claims, figures)


if __name__ == "__main__":
    main()
