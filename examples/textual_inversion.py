"""Textual inversion: prompts with a word that the model does not know, from an embedding file.

    python examples/textual_inversion.py [embedding.safetensors]

Without a file it writes one of three vectors: `<sun>`, those of the words `large yellow circle`.
"""

import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

import sdrt
from sdrt.bundle import open_bundle

path = Path(sys.argv[1] if len(sys.argv) > 1 else "sun.safetensors")
with sdrt.load("shapes") as pipe:
    if not path.is_file():
        weights = load_file(open_bundle("shapes").folder / "text_encoder" / "model.safetensors")
        table = weights["model.embeddings.token_embedding.weight"]  # [tokens, width]
        save_file({"<sun>": table[pipe.tokenizer.ids("large yellow circle")]}, path)

    pipe.load_textual_inversion(path, token="<sun>")
    for place in ("blue", "black"):
        output = pipe(f"a <sun> on a {place} background", num_inference_steps=20, seed=0)
        output.images[0].save(f"sun_{place}.png")
        print(f"sun_{place}.png: {output.parameters[0]}")
