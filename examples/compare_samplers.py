"""Compare samplers: the same noise, one column for each sampler.

python examples/compare_samplers.py
"""

from PIL import Image

import sdrt

SAMPLERS = ("Euler", "Euler a", "DPM++ 2M Karras", "DPM++ SDE", "UniPC", "DDIM")
PROMPT = "an orange triangle above a black square on a white background"

with sdrt.load("shapes") as pipe:
    images = [
        pipe.with_scheduler(name)(PROMPT, num_inference_steps=8, seed=0).images[0]
        for name in SAMPLERS
    ]

width, height = images[0].size
sheet = Image.new("RGB", (width * len(images), height))
for i, image in enumerate(images):
    sheet.paste(image, (i * width, 0))
sheet.save("compare_samplers.png")
print("compare_samplers.png:", ", ".join(SAMPLERS))
