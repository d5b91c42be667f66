"""LoRA: apply a file at two weights and remove it again, without reloading the model.

    python examples/lora.py [style.safetensors]

Without a file it writes a tiny random LoRA of one layer, just to have something to apply.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import sdrt

path = Path(sys.argv[1] if len(sys.argv) > 1 else "tiny_lora.safetensors")
if not path.is_file():
    rng = np.random.default_rng(0)
    save_file(
        {
            "lora_unet_conv_in.lora_down.weight": rng.normal(size=(4, 4, 3, 3)).astype("float32"),
            "lora_unet_conv_in.lora_up.weight": rng.normal(size=(80, 4, 1, 1)).astype("float32"),
            "lora_unet_conv_in.alpha": np.array(0.05, "float32"),
        },
        path,
    )

with sdrt.load("shapes") as pipe:
    for weight in (0.0, 0.5, 1.0):
        pipe.set_lora({path: weight} if weight else {})
        output = pipe("a red circle on a blue background", num_inference_steps=20, seed=0)
        output.images[0].save(f"lora_{weight}.png")
        print(f"lora_{weight}.png")
