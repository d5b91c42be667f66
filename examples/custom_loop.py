"""A denoising loop in plain numpy: a sampler is a table of numbers, and the model is yours.

    python examples/custom_loop.py

The "model" here knows the answer: it predicts the noise that hides a given image, so the loop
must end at that image. Put any function of (latents, timestep) in its place.
"""

import numpy as np
from PIL import Image

from sdrt.runtime import sampler_table

target = np.linspace(-1, 1, 64)[None, :] * np.ones((64, 1))  # a gradient, as [64, 64] in [-1, 1]
table = sampler_table({"_class_name": "DPMSolverMultistepScheduler"}, 20)


def model(x, alpha, sigma):
    """The noise in `x = alpha * denoised + sigma * noise`."""
    return (x - alpha * target) / sigma


rng = np.random.default_rng(0)
known = np.zeros((table.matrix.shape[1], *target.shape))  # initial noise, outputs, added noises
known[0] = rng.standard_normal(target.shape)
known[1 + table.evaluations :] = rng.standard_normal((table.num_noises, *target.shape))
for k, timestep in enumerate(table.timesteps):
    x = np.tensordot(table.matrix[k], known, 1)  # row k mixes what is known into the next input
    known[1 + k] = model(x, *table.alphas_sigmas[k])
    print(f"step {k + 1}/{table.evaluations}, timestep {timestep:.0f}, std {x.std():.2f}")
result = np.tensordot(table.matrix[-1], known, 1)

print("largest error:", np.abs(result - target).max())
Image.fromarray(np.uint8(np.clip(result * 127.5 + 127.5, 0, 255))).save("custom_loop.png")
