"""Export a checkpoint to the folder of OpenVINO models that OpenVINO GenAI loads.

Knows diffusers' modules, OpenVINO's converter and the names that GenAI wants; what
optimum-intel's export does, which needs older versions of the libraries. Run in a process of its
own, as it takes much more memory than drawing: `python -m sdrt.bench.peers.ir_export CHECKPOINT
FOLDER`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from diffusers import StableDiffusionPipeline
from openvino_tokenizers import convert_tokenizer

Examples = Mapping[str, torch.Tensor]


class Text(torch.nn.Module):
    """The last layer's states of a text encoder."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.encoder(input_ids, return_dict=False)[0]


class Unet(torch.nn.Module):
    """A UNet without its options."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class Decoder(torch.nn.Module):
    """An autoencoder's decoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Any) -> Any:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def export(checkpoint: Path, folder: Path) -> None:
    """Models of fp16 weights, all axes but the timestep's dynamic, and their configurations."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.to(dtype=torch.float32)
    config, tokens = pipe.unet.config, pipe.tokenizer.model_max_length
    latents = torch.zeros(2, config.in_channels, 8, 8)
    context = torch.zeros(2, tokens, config.cross_attention_dim)
    ids = {"input_ids": torch.ones(2, tokens, dtype=torch.int64)}
    _write(Text(pipe.text_encoder), ids, folder / "text_encoder")
    step = torch.ones(1, dtype=torch.int64)
    feeds = {"sample": latents, "timestep": step, "encoder_hidden_states": context}
    _write(Unet(pipe.unet), feeds, folder / "unet")
    _write(Decoder(pipe.vae), {"latent_sample": latents[:1]}, folder / "vae_decoder")
    pipe.text_encoder.config.save_pretrained(folder / "text_encoder")
    pipe.unet.save_config(folder / "unet")
    pipe.vae.save_config(folder / "vae_decoder")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    words = convert_tokenizer(pipe.tokenizer, with_detokenizer=False)
    ov.save_model(words, folder / "tokenizer" / "openvino_tokenizer.xml")
    pipe.save_config(folder)


def _write(module: torch.nn.Module, feeds: Examples, folder: Path) -> None:
    with torch.no_grad():
        model = ov.convert_model(module, example_input=dict(feeds))
    for port, name in zip(model.inputs, feeds, strict=True):
        port.get_tensor().set_names({name})
    free = {name: [-1] * example.dim() for name, example in feeds.items()}
    model.reshape(free | ({"timestep": [1]} if "timestep" in feeds else {}))
    ov.save_model(model, folder / "openvino_model.xml")


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
