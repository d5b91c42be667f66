"""OpenAI's client against `sdrt serve`.

    python examples/openai_client.py [http://localhost:7860]

Without an address it starts a server on a free port and stops it at the end.
"""

import base64
import socket
import subprocess
import sys
import time
from pathlib import Path

from openai import APIConnectionError, InternalServerError, OpenAI

server = None
if len(sys.argv) > 1:
    url = sys.argv[1]
else:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, "-m", "sdrt", "serve", "--bundle", "shapes", "--port", str(port))
    server = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"

client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
try:
    while True:  # until the model is loaded
        try:
            response = client.images.generate(
                prompt="a red circle on a blue background",
                extra_body={"seed": 0, "num_inference_steps": 8, "scheduler": "DPM++ 2M Karras"},
            )
            break
        except (APIConnectionError, InternalServerError):
            if server and server.poll() is not None:
                sys.exit("the server failed to start")
            time.sleep(0.2)
finally:
    if server:
        server.terminate()
        server.wait()

Path("openai_client.png").write_bytes(base64.b64decode(response.data[0].b64_json))
print("openai_client.png")
