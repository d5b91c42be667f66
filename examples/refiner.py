"""SDXL's refiner: the base alone, both in one call, and the refiner over a finished image.

python examples/refiner.py [BASE REFINER ["prompt"]]

BASE and REFINER are bundles, built with `sdrt build --model stable-diffusion-xl-base-1.0` and
`sdrt build --model stable-diffusion-xl-refiner-1.0`.
"""

import sys

import sdrt

names = ["stable-diffusion-xl-base-1.0", "stable-diffusion-xl-refiner-1.0", "a lighthouse at dusk"]
base, refiner, prompt = [*sys.argv[1:], *names[len(sys.argv) - 1 :]]
options = {"num_inference_steps": 30, "seed": 7}

with sdrt.load(base, refiner=refiner) as pipe:
    alone = pipe(prompt, **options).images[0]
    alone.save("refiner_base.png")
    pipe(prompt, **options, refiner_switch_at=0.8).images[0].save("refiner_both.png")

with sdrt.load(refiner) as pipe:
    refined = pipe(prompt, **options, image=alone, strength=0.3, aesthetic_score=6.5)
    refined.images[0].save("refiner_after.png")
