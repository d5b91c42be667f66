"""A server under load for a long time: does it lose anything, does it grow?

    python benchmarks/serve_soak.py [--seconds 3600] [--rate 8] [--idle 2000] [--save]

Starts `sdrt serve` on the embedded model and sends it Poisson arrivals of mixed requests: some
streamed, some cut off in mid-run, some wrong, some with deadlines that cannot be met. Every answer
is counted here, at the client; idle connections are held all the while. The server's resident
memory is read every few seconds, and a line is fitted through it after a crowd of requests at once
and the first tenth.
"""

import argparse
import asyncio
import base64
import collections
import io
import random
import resource
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from results import save

from sdrt.process_stats import resident_bytes

SAMPLERS = ("Euler", "DPM++ 2M Karras", "UniPC", "Euler a")
KINDS = ("plain", "stream", "cut", "wrong", "hopeless")
FRACTIONS = (0.7, 0.15, 0.07, 0.05, 0.03)
CROWD = 400  # requests at once before the measuring begins


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def body(rng: random.Random) -> dict[str, Any]:
    return {
        "prompt": rng.choice(("a red circle", "a white cross on a green background", "x" * 200)),
        "num_inference_steps": rng.choice((1, 2, 4, 8, 12)),
        "guidance_scale": rng.choice((1.0, 7.5)),
        "scheduler": rng.choice(SAMPLERS),
        "seed": rng.randrange(2**32),
        "n": rng.choice((1, 1, 1, 2)),
    }


async def asked(client: httpx.AsyncClient, rng: random.Random, counts: collections.Counter) -> None:
    """One request of some kind; counts how it ended."""
    kind = rng.choices(KINDS, FRACTIONS)[0]
    sent = body(rng)
    if kind == "wrong":
        sent["num_inference_steps"] = rng.choice((0, -1, 2**63, "7", True))
    if kind == "hopeless":
        sent |= {"num_inference_steps": 500, "deadline_seconds": 0.05}
    try:
        if kind == "stream":
            ended = await streamed(client, sent)
        elif kind == "cut":
            ended = await cut(client, sent, rng.uniform(0.0, 0.1))
        else:
            answer = await client.post("/v1/images/generations", json=sent)
            ended = outcome(answer, sent["n"])
    except httpx.HTTPError as error:
        ended = f"lost: {type(error).__name__}"
    counts[f"{kind}: {ended}"] += 1


def outcome(answer: httpx.Response, n: int) -> str:
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.json()['error']['code']}"
    data = answer.json()["data"]
    for item in data:
        Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).load()
    return "image" if len(data) == n else f"lost: {len(data)} of {n} images"


async def streamed(client: httpx.AsyncClient, sent: dict[str, Any]) -> str:
    sent = {**sent, "stream": True, "partial_images": 2, "n": 1}
    completed = 0
    async with client.stream("POST", "/v1/images/generations", json=sent) as answer:
        async for line in answer.aiter_lines():
            completed += line.startswith("event: image_generation.completed")
            if line.startswith("event: error"):
                return "typed error"
        if answer.status_code != 200:
            return str(answer.status_code)
    return "image" if completed == 1 else "lost: no last event"


async def cut(client: httpx.AsyncClient, sent: dict[str, Any], after: float) -> str:
    try:
        answer = await client.post(
            "/v1/images/generations", json=sent, timeout=httpx.Timeout(30.0, read=after + 0.001)
        )
    except httpx.ReadTimeout:
        return "cut off"
    return outcome(answer, sent["n"])


async def loaded(url: str, seconds: float, rate: float, pid: int) -> dict[str, Any]:
    rng, counts, sizes = random.Random(0), collections.Counter(), []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:
        # What it holds at its busiest stays with the allocator: let it be that busy first.
        await asyncio.gather(*(asked(client, rng, collections.Counter()) for _ in range(CROWD)))
        began, going, last, sent = time.monotonic(), set(), 0.0, 0
        while (now := time.monotonic() - began) < seconds:
            task = asyncio.create_task(asked(client, rng, counts))
            going.add(task)
            task.add_done_callback(going.discard)
            sent += 1
            if now - last > max(1.0, seconds / 600):
                sizes.append((sum(counts.values()), resident_bytes(pid)))
                last = now
            await asyncio.sleep(rng.expovariate(rate))
        await asyncio.gather(*going)
    return {"sent": sent, "ended": dict(sorted(counts.items())), "sizes": sizes}


def values(client: httpx.Client, name: str) -> list[float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [s.value for family in families for s in family.samples if s.name == name]


def slope(sizes: list[tuple[int, int]]) -> float:
    """Bytes by which the server grows with a request, after the first tenth."""
    cached = np.array(sizes[len(sizes) // 10 :], float)
    return float(np.polyfit(cached[:, 0], cached[:, 1], 1)[0])


def held(port: int, count: int) -> list[socket.socket]:
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))
    return [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(count)]


def run(args: argparse.Namespace, port: int, pid: int) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url) as client:
        while client.get("/health/ready").status_code != 200:
            time.sleep(0.1)
    idle = held(port, args.idle)
    actual = asyncio.run(loaded(url, args.seconds, args.rate, pid))
    for item in idle:
        item.close()
    with httpx.Client(base_url=url) as client:
        left = sum(values(client, "sdrt_running") + values(client, "sdrt_waiting"))
    sizes = actual.pop("sizes")
    return {
        "seconds": args.seconds,
        **actual,
        "lost": sum(n for how, n in actual["ended"].items() if "lost" in how),
        "errors_5xx": sum(n for how, n in actual["ended"].items() if ": 500" in how),
        "left_in_the_server": left,
        "idle_connections": args.idle,
        "megabytes": [round(size / 1e6, 1) for _, size in sizes[:: max(1, len(sizes) // 20)]],
        "megabytes_per_1000_requests": round(slope(sizes) * 1000 / 1e6, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--idle", type=int, default=2000, help="connections held")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    port = free_port()
    command = [str(Path(sysconfig.get_path("scripts")) / "sdrt"), "serve", "--bundle", "shapes"]
    server = subprocess.Popen([*command, "--port", str(port), "--quiet"])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        actual = run(args, port, server.pid)
    finally:
        server.terminate()
        found_exit = server.wait(60)
    actual["exit_code_after_sigterm"] = found_exit
    for name, value in actual.items():
        print(f"{name:28} {value}")
    if args.save:
        claims = {
            f"`sdrt serve` under load for {args.seconds / 60:.0f} minutes": (
                f"{actual['sent']} requests, {actual['lost']} lost, grows by "
                f"{actual['megabytes_per_1000_requests']:.2f} MB per 1,000"
            ),
        }
        save("serve_soak", claims, actual)
    sys.exit(actual["lost"] != 0)


if __name__ == "__main__":
    main()
