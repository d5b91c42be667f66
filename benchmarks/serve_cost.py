"""What the server costs beside the engine: a request's time at the client less its picture's own.

    python benchmarks/serve_cost.py [--save]

One client on one connection, one request after the other, to `sdrt serve` in a process of its own.
The engine's time, from submission to the decoded picture, is what /metrics says. What is left is
HTTP, checks, the picture's file, base64 and the client itself. Also the time to write the file of a
larger picture, which is done in threads beside the event loop.
"""

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time

from PIL import Image
from results import save

from sdrt.runtime.pictures import encoded

ROUNDS = 200
PATH = "/v1/images/generations"
BODY = {"prompt": "a red circle on a blue background", "num_inference_steps": 4}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def asked(connection: http.client.HTTPConnection, method: str, path: str, body: str = "") -> bytes:
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {text[:200]!r}")
    return text


def until_ready(connection: http.client.HTTPConnection) -> None:
    for _ in range(600):
        try:
            asked(connection, "GET", "/health/ready")
            return
        except (OSError, RuntimeError):
            connection.close()
            time.sleep(0.1)
    raise RuntimeError("the server did not become ready in 60 s")


def engine_seconds(connection: http.client.HTTPConnection) -> float:
    lines = asked(connection, "GET", "/metrics").decode().splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("sdrt_picture_seconds_sum"))


def own_milliseconds(connection: http.client.HTTPConnection) -> tuple[float, float]:
    """Mean own cost and mean time at the client of a request."""
    body = json.dumps(BODY)
    for _ in range(20):
        asked(connection, "POST", PATH, body)
    before, began = engine_seconds(connection), time.perf_counter()
    for _ in range(ROUNDS):
        asked(connection, "POST", PATH, body)
    whole = time.perf_counter() - began
    engine = engine_seconds(connection) - before
    return 1e3 * (whole - engine) / ROUNDS, 1e3 * whole / ROUNDS


def encoding_milliseconds(kind: str) -> float:
    """Writing a file of 512x512 with as much in it as a photograph."""
    noise = Image.effect_noise((512, 512), 30).resize((512, 512))
    picture = Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)])
    times = []
    for _ in range(9):
        began = time.perf_counter()
        encoded(picture, "", kind, 90)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "sdrt", "serve", "--quiet", "--bundle", "shapes"]
    server = subprocess.Popen([*command, "--backend", "onnxruntime", "--port", str(port)])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        until_ready(connection)
        runs = [own_milliseconds(connection) for _ in range(3)]
    finally:
        connection.close()
        server.terminate()
        server.wait()
    own, whole = (statistics.median(side) for side in zip(*runs, strict=True))
    print(f"own cost of a request: {own:.2f} ms of {whole:.2f} ms")
    files = {kind: round(encoding_milliseconds(kind), 1) for kind in ("PNG", "JPEG", "WEBP")}
    print("a file of 512x512:", ", ".join(f"{kind} {value} ms" for kind, value in files.items()))
    if args.save:
        claim = {"the server beside the engine, a request for a 64x64 PNG": f"{own:.1f} ms"}
        figures = {"own_ms": own, "whole_ms": whole, "runs": runs, "file_512_ms": files}
        save("serve_cost", claim, figures)


if __name__ == "__main__":
    main()
