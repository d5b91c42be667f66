"""Text to image: one prompt, one image, and the settings that generate it again.

python examples/text_to_image.py ["a prompt"]
"""

import sys

import sdrt

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle on a blue background"

with sdrt.load("shapes") as pipe:
    output = pipe(prompt, num_inference_steps=20, guidance_scale=7.5, seed=0)

output.images[0].save("text_to_image.png")
print("text_to_image.png")
print(output.parameters[0])
