"""ControlNet: a shape that fills an outline, and the same seed without it.

python examples/controlnet.py ["prompt"]
"""

import sys

from PIL import Image, ImageDraw

import sdrt

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle on a blue background"
edges = Image.new("L", (64, 64))
ImageDraw.Draw(edges).ellipse((6, 6, 38, 38), outline=255)

with sdrt.load("shapes", controlnet="outline") as pipe:
    options = {"num_inference_steps": 20, "seed": 1}
    steered = pipe(prompt, control_image=edges, **options).images[0]
    free = pipe(prompt, **options).images[0]

edges.save("control_edges.png")
steered.save("control_steered.png")
free.save("control_free.png")
print("control_edges.png control_steered.png control_free.png")
