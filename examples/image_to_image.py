"""Image to image: start from a sketch; `strength` says how much of it may change.

python examples/image_to_image.py [sketch.png]
"""

import sys

from PIL import Image, ImageDraw

import sdrt

if len(sys.argv) > 1:
    sketch = Image.open(sys.argv[1])
else:
    sketch = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(sketch).ellipse((12, 12, 52, 52), fill="orange")

with sdrt.load("shapes") as pipe:
    for strength in (0.3, 0.6, 0.9):
        output = pipe(
            "a red circle on a blue background",
            image=sketch,
            strength=strength,
            num_inference_steps=20,
            seed=0,
        )
        output.images[0].save(f"image_to_image_{strength}.png")
        print(f"image_to_image_{strength}.png")
