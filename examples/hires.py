"""Hires fix: a second pass at twice the size, with a low and a high strength.

python examples/hires.py ["prompt"]
"""

import sys

import sdrt

prompt = sys.argv[1] if len(sys.argv) > 1 else "a white cross on a black background"

with sdrt.load("shapes") as pipe:
    options = {"num_inference_steps": 20, "seed": 2, "hires_scale": 2.0}
    for strength, upscaler in ((0.35, "Lanczos"), (0.7, "Latent")):
        output = pipe(prompt, **options, hires_strength=strength, hires_upscaler=upscaler)
        output.images[0].save(f"hires_{strength}.png")
        print(f"hires_{strength}.png", output.images[0].size)
