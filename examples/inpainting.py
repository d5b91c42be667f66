"""Inpainting: generate the white part of a mask again and keep the rest.

python examples/inpainting.py
"""

from PIL import Image

import sdrt

with sdrt.load("shapes") as pipe:
    prompt = "a red circle on a blue background"
    original = pipe(prompt, num_inference_steps=20, seed=0).images[0]

    mask = Image.new("L", original.size, 0)
    mask.paste(255, (original.width // 2, 0, original.width, original.height))
    output = pipe(
        "a white cross on a green background",
        image=original,
        mask_image=mask,
        num_inference_steps=20,
        seed=1,
    )

original.save("inpainting_original.png")
output.images[0].save("inpainting.png")
print("inpainting_original.png, inpainting.png: the right half is new")
