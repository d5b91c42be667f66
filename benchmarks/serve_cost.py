"""What the server costs next to the engine: a request's time at the client less its image's own.

    python benchmarks/serve_cost.py [--save]

One client on one connection, one request after the other, to `sdrt serve` in a process of its own.
The engine's time, from submission to the decoded image, is what /metrics says. What is left is
HTTP, checks, the image's file, base64 and the client itself. Also the time to write the file of a
larger image, which is done in threads next to the event loop.
"""

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time

from PIL import Image, ImageFilter
from results import save

from sdrt.runtime.images import image_to_bytes

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


def own_milliseconds(connection: http.client.HTTPConnection) -> tuple[list[float], list[float]]:
    """Own cost and time at the client of every request."""
    body, own, full = json.dumps(BODY), [], []
    for i in range(ROUNDS + 20):
        before, began = engine_seconds(connection), time.perf_counter()
        asked(connection, "POST", PATH, body)
        took = time.perf_counter() - began
        if i >= 20:  # the first ones warm
            own.append(1e3 * (took - (engine_seconds(connection) - before)))
            full.append(1e3 * took)
    return own, full


def encoding_milliseconds(kind: str) -> float:
    """Processor time of a file of 512x512, smooth with the grain of a photograph."""
    rough = [Image.effect_noise((512, 512), 60) for _ in range(3)]
    smooth = Image.merge("RGB", [item.filter(ImageFilter.GaussianBlur(3)) for item in rough])
    grain = Image.merge("RGB", [Image.effect_noise((512, 512), 8)] * 3)
    image = Image.blend(smooth, grain, 0.2)
    times = []
    for _ in range(9):
        began = time.process_time()
        image_to_bytes(image, "", kind, 90)
        times.append(time.process_time() - began)
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
        own, full = own_milliseconds(connection)
    finally:
        connection.close()
        server.terminate()
        server.wait()
    low, middle, high = statistics.quantiles(own, n=4)
    median = statistics.median(full)
    print(f"own cost of a request: {middle:.2f} ms ({low:.2f} to {high:.2f}) of {median:.2f} ms")
    files = {kind: round(encoding_milliseconds(kind), 1) for kind in ("PNG", "JPEG", "WEBP")}
    print("a file of 512x512:", ", ".join(f"{kind} {value} ms" for kind, value in files.items()))
    if args.save:
        claim = {"server overhead per request for a 64x64 PNG": f"{middle:.1f} ms"}
        figures = {"own_quartiles_ms": [low, middle, high], "whole_ms": median}
        figures |= {"file_512_ms": files}
        save("serve_cost", claim, figures)


if __name__ == "__main__":
    main()
