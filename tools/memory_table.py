"""What fits which GPU, by the arithmetic of `engine/memory_budget.py`.

    python tools/memory_table.py             # writes the tables into the pages of `docs/`
    python tools/memory_table.py --measure   # first the activations, from graphs that it exports

No memory of a GPU is measured: the tables say what `sdrt` computes before it loads. Weights are
counted in full-size networks without data, in half precision. Activations are those of networks of
a fraction of the width, times the fraction: they grow with the width alone. They are stored in
`tools/memory_figures.json`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.bundle.manifest import Component, FileRecord, Manifest
from sdrt.engine.memory_budget import USABLE_FRACTION, compute_budget, max_batch_images

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "tools" / "memory_figures.json"
BEGIN, END = "<!-- memory-table: begin -->", "<!-- memory-table: end -->"
Figures = Mapping[str, Mapping[str, int]]
SIDE = 512  # of the images whose activations are stored
SIDES = (512, 768, 1024)
CARDS = (4, 6, 8, 12)  # GB
FREE_FRACTION = 0.9  # what the driver, the context and a display leave of a GPU
GPUS = {  # GB, by page
    "jetson": {"Orin Nano": 8, "Orin NX": 16, "AGX Orin": 64, "Thor": 128},
    "t4-l4": {"T4": 16, "L4": 24},
    "rtx": {"RTX 4060": 8, "RTX 3060": 12, "RTX 4080": 16, "RTX 4090": 24, "RTX 5090": 32},
}
LARGEST = (("1.5", 512), ("2.1", 768), ("XL", 1024))  # model and side of the batches
DIVISOR = 8  # of the widths of the networks that are exported
MODES: Mapping[str, Mapping[str, bool]] = {
    "all loaded": {},
    "`--low-memory`": {"sequential": True},
    "`--low-memory`, UNet's weights streamed": {"sequential": True, "streamed": True},
}


@dataclass(frozen=True, slots=True)
class TextModel:
    """A CLIP text encoder's shape. projection: whether it has a pooled output"""

    width: int
    layers: int
    projection: bool = False
    final_norm: bool = True

    @property
    def weights(self) -> int:
        """49,408 tokens, 77 places, and the layers of four times the width."""
        width = self.width
        layer = 12 * width**2 + 13 * width
        last = 2 * width * self.final_norm + width**2 * self.projection
        return (49408 + 77) * width + self.layers * layer + last


@dataclass(frozen=True, slots=True)
class Model:
    """A published model. decoder_bytes: of each of the decoder's values"""

    title: str
    unet: Mapping[str, Any]
    texts: tuple[TextModel, ...]
    decoder_bytes: int = 2


WIDTHS = (320, 640, 1280, 1280)
VERSION_2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}
VERSION_2 |= {"use_linear_projection": True, "upcast_attention": True}
XL = {
    "block_out_channels": WIDTHS[:3],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MODELS = {
    "1.5": Model("Stable Diffusion 1.5", {"cross_attention_dim": 768}, (TextModel(768, 12),)),
    "2.1": Model("Stable Diffusion 2.1", VERSION_2, (TextModel(1024, 23),)),
    # XL's text encoders are read before their last layer; its VAE overflows in half precision.
    "XL": Model(
        "Stable Diffusion XL",
        XL,
        (TextModel(768, 11, final_norm=False), TextModel(1280, 32, projection=True)),
        decoder_bytes=4,
    ),
}


def create_manifest(name: str, figures: Figures, sides: Sequence[int] = SIDES) -> Manifest:
    """A manifest as a build of the full-size model for these sides would write it."""
    model, decoder = MODELS[name], figures["decoder"]
    scale = (sides[0] / SIDE) ** 2
    parts = {
        "unet": (2 * figures[name]["weights"], figures[name]["activations"]),
        "vae_decoder": (
            decoder["weights"] * model.decoder_bytes,
            decoder["activations"] * model.decoder_bytes // 2,
        ),
    }
    for i, text in enumerate(model.texts):
        parts["text_encoder_2" if i else "text_encoder"] = 2 * text.weights, 0
    return Manifest(
        name=model.title,
        source="",
        sizes=tuple((side, side) for side in sides),
        batch=(1, 1, 1),
        latent_channels=4,
        downscale=8,
        max_tokens=77,
        opset=0,
        components={
            key: Component((), (), "", {}, (), int(scale * alive))
            for key, (_, alive) in parts.items()
        },
        parity={},
        preview=(),
        files={
            f"{key}/model.safetensors": FileRecord(size, "") for key, (size, _) in parts.items()
        },
    )


def low_memory_lines(figures: Figures) -> Iterator[str]:
    """What one guided image needs, and the smallest card that has as much free."""
    yield from header("model, one guided image", *(f"{side}x{side}" for side in SIDES))
    for name, model in MODELS.items():
        manifest = create_manifest(name, figures)
        for title, mode in MODES.items():
            totals = [compute_budget(manifest, (side, side), 2, **mode).total for side in SIDES]
            cells = [f"{total / 1e9:.1f} GB: {smallest_card(total)}" for total in totals]
            yield f"| {model.title}, {title} | {' | '.join(cells)} |"


def smallest_card(needed: int) -> str:
    """The first of the cards that fits, in words."""
    fitting = [card for card in CARDS if needed <= FREE_FRACTION * card * 1e9]
    return f"fits {fitting[0]} GB" if fitting else f"more than {CARDS[-1]} GB"


def gpu_lines(gpus: Mapping[str, int], figures: Figures) -> Iterator[str]:
    """The largest batch of guided images that `sdrt build --batch auto` tries on each GPU."""
    titles = [f"{MODELS[name].title}, {side}x{side}" for name, side in LARGEST]
    yield from header("GPU", "memory", *titles)
    for gpu, memory in gpus.items():
        usable = int(USABLE_FRACTION[True] * FREE_FRACTION * memory * 1e9)
        cells = [largest_batch(name, side, usable, figures) for name, side in LARGEST]
        yield f"| {gpu} | {memory} GB | {' | '.join(cells)} |"


def largest_batch(name: str, side: int, usable: int, figures: Figures) -> str:
    manifest = create_manifest(name, figures, (side,))
    needed = compute_budget(manifest, (side, side), 2)
    if needed.total > usable:
        low = compute_budget(manifest, (side, side), 2, sequential=True)
        return "1, with `--low-memory`" if low.total <= usable else "none"
    return str(max_batch_images(manifest, usable))


def header(*titles: str) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"


def pages(figures: Figures) -> Iterator[tuple[Path, str]]:
    """Every page with a table, and its content with the table as it has to be."""
    tables = {"guides/low-memory": low_memory_lines(figures)}
    tables |= {f"backends/{page}": gpu_lines(gpus, figures) for page, gpus in GPUS.items()}
    for name, lines in tables.items():
        path = ROOT / "docs" / f"{name}.md"
        before, _, rest = path.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        yield path, "\n".join([before + BEGIN, *lines, END]) + after


def measure() -> dict[str, dict[str, int]]:
    """Weights and activations of every network; exports for minutes."""
    figures = {}
    for name, model in MODELS.items():
        figures[name] = {"weights": count_unet(model), "activations": unet_activations(model)}
    figures["decoder"] = {"weights": count_decoder(), "activations": decoder_activations()}
    return figures


def unet_config(model: Model, divisor: int = 1) -> dict[str, Any]:
    widths = model.unet.get("block_out_channels", WIDTHS)
    changes = {"block_out_channels": [width // divisor for width in widths]}
    return {**model.unet, **changes, "norm_num_groups": 32 // divisor}


def count_unet(model: Model) -> int:
    import torch

    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig

    with torch.device("meta"):
        unet = Unet(UnetConfig.from_json(unet_config(model)))
    return sum(weight.numel() for weight in unet.parameters())


def count_decoder() -> int:
    import torch

    from sdrt.export.vae import AutoencoderKL, VaeConfig, VaeDecoder

    with torch.device("meta"):
        decoder = VaeDecoder(AutoencoderKL(VaeConfig()))
    return sum(weight.numel() for weight in decoder.parameters())


def unet_activations(model: Model) -> int:
    """Bytes alive in one row of an image of `SIDE`."""
    import torch

    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig

    # Layers that follow each other have no more alive together than one of them.
    raw = {**unet_config(model, DIVISOR), "transformer_layers_per_block": 1}
    config = UnetConfig.from_json(raw)
    inputs = {
        "sample": torch.zeros(2, 4, 16, 24),
        "timestep": torch.ones(2),
        "context": torch.zeros(2, 77, config.cross_attention_dim),
    }
    if config.pooled_width:
        inputs |= {"pooled": torch.zeros(2, config.pooled_width), "time_ids": torch.ones(2, 6)}
    return DIVISOR * exported_activations("unet", Unet(config), inputs)


def decoder_activations() -> int:
    import torch

    from sdrt.export.vae import AutoencoderKL, VaeConfig, VaeDecoder

    widths = tuple(width // DIVISOR for width in VaeConfig().block_out_channels)
    config = VaeConfig(block_out_channels=widths, norm_num_groups=32 // DIVISOR)
    latents = {"latents": torch.zeros(2, 4, 8, 12)}
    decoder = VaeDecoder(AutoencoderKL(config))
    return DIVISOR * exported_activations("vae_decoder", decoder, latents)


def exported_activations(name: str, module: Any, inputs: dict[str, Any]) -> int:
    import torch

    from sdrt.export.activation_memory import activations
    from sdrt.export.graph import export_graph
    from sdrt.export.recipes import RECIPES

    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    half = {key: value.half() if value.ndim > 1 else value for key, value in inputs.items()}
    module = module.eval().half().requires_grad_(False)
    latent = SIDE // 8
    lengths = {"rows": 1, "tokens": 77, "latent_height": latent, "latent_width": latent}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_graph(module, half, recipe.outputs, recipe.axes, Path(folder))
        return activations(Path(folder) / "model.onnx", lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", action="store_true", help="export the graphs (default: no)")
    if parser.parse_args().measure:
        FIGURES.write_text(json.dumps(measure(), indent=2) + "\n")
    for path, content in pages(json.loads(FIGURES.read_text())):
        path.write_text(content)


if __name__ == "__main__":
    sys.exit(main())
