"""IP-Adapter: an image as a prompt, and the same seed without it.

python examples/ip_adapter.py ["prompt"]
"""

import sys

from PIL import Image, ImageDraw

import sdrt

prompt = sys.argv[1] if len(sys.argv) > 1 else ""
example = Image.new("RGB", (64, 64), "yellow")
ImageDraw.Draw(example).ellipse((16, 16, 48, 48), fill="purple")

with sdrt.load("shapes", ip_adapter="likeness") as pipe:
    options = {"num_inference_steps": 20, "seed": 1}
    alike = pipe(prompt, ip_adapter_image=example, **options).images[0]
    free = pipe(prompt, **options).images[0]

example.save("ip_adapter_example.png")
alike.save("ip_adapter_alike.png")
free.save("ip_adapter_free.png")
print("ip_adapter_example.png ip_adapter_alike.png ip_adapter_free.png")
