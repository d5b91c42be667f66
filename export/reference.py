"""Reference outputs: what a checkpoint's torch modules compute, which engines are compared with.

Knows modules, prompts, seeds and the manifest; not graphs nor engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sdrt.bundle.manifest import CONTROL, FEATURE, Manifest
from sdrt.engine import Feeds
from sdrt.engine.axes import IMAGE_TOKENS
from sdrt.runtime import GenerationOptions, randn, sampler_table
from sdrt.runtime.embedded_guidance import GUIDANCE, guidance_embedding
from sdrt.runtime.images import images_from_decoded, pixels_from_latents
from sdrt.runtime.reference_outputs import (
    PROMPT,
    SCHEDULER,
    STEPS,
    ReferenceOutputs,
    latent_shape,
    reference_extra_channels,
    reference_inputs,
    round_samples,
)
from sdrt.runtime.safety_checker import clip_pixels
from sdrt.runtime.text.conditioning import Conditioning, build_time_ids

from .lora_reference import LoraCase
from .pixel_unet import PixelUnet
from .vae import preview_projection

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of a component and torch's outputs for them, by name."""

    inputs: Feeds
    outputs: Feeds


class TorchReference:
    """Runs each component's torch module once and collects the cases to compare engines on.

    The components are chained: the text encoders' context is an input of the UNet, whose latents
    are decoded, so that the images are the end-to-end reference as well. Call the methods in the
    order in which a pipeline runs the components.

    images: by size, [1, 3, H, W]; preview: colours from latents, as in the manifest
    shallow_cases: of the UNet's layers above the branch, where it has one
    control_cases: of the UNet with residuals
    lora_cases: of components with LoRA factors, by the plain one's name
    """

    def __init__(self, manifest: Manifest, folder: Path, branch: int | None = None) -> None:
        """Args:
        manifest: of the bundle that is being built.
        folder: of the bundle, which has its tokenizers already.
        branch: of the UNet, if its layers above that are exported as well.
        """
        self.manifest = manifest
        self.folder = folder
        self.branch = branch
        self.conditioning: Conditioning = {}
        self.latents: dict[Size, np.ndarray] = {}
        self.images: dict[Size, np.ndarray] = {}
        self.preview: tuple[tuple[float, ...], ...] = ()
        self.shallow_cases: list[Case] = []
        self.control_cases: list[Case] = []
        self.lora_cases: dict[str, LoraCase] = {}
        self.samples: dict[str, dict[str, list[float]]] = {}

    def text_encoder(self, module: nn.Module) -> list[Case]:
        ids = self._tokenize("tokenizer")
        contexts = module(torch.from_numpy(ids)).numpy()
        self.conditioning["context"] = contexts[1:, -1]
        return [Case({"input_ids": ids}, {"contexts": contexts})]

    def text_encoder_2(self, module: nn.Module) -> list[Case]:
        ids = self._tokenize("tokenizer_2")
        contexts, pooled = (output.numpy() for output in module(torch.from_numpy(ids)))
        first = [self.conditioning["context"]] if "context" in self.conditioning else []
        context = np.concatenate([*first, contexts[1:, -1]], axis=-1)
        self.conditioning = {"context": context, "pooled": pooled[1:]}
        return [Case({"input_ids": ids}, {"contexts": contexts, "pooled": pooled})]

    def _tokenize(self, folder: str) -> np.ndarray:
        """Ids of an empty prompt and of the reference prompt, [2, N]."""
        from sdrt.runtime import Tokenizer

        tokenizer = Tokenizer.from_folder(self.folder / folder, self.manifest.max_tokens)
        return tokenizer(["", PROMPT])

    def unet(self, module: Any) -> list[Case]:
        """A case for each step of a short sampling run in every size."""
        cases: list[Case] = []
        for size in self.manifest.sizes:
            cases += self._denoise(module, size)
        if isinstance(module, PixelUnet):  # its output is the image
            self.images = {
                size: pixels_from_latents(latents) for size, latents in self.latents.items()
            }
            channels = self.manifest.latent_channels
            colours = np.eye(3) if channels == 3 else np.ones((3, 1))
            self.preview = tuple((*row, 0.0) for row in colours.tolist())
        return cases

    def _denoise(self, module: Any, size: Size) -> list[Case]:
        table = sampler_table(SCHEDULER, STEPS)
        history = [randn(0, latent_shape(self.manifest, size))]
        extra_channels = reference_extra_channels(self.manifest, size, module.config.in_channels)
        cases: list[Case] = []
        for row, timestep in zip(table.matrix[:-1], table.timesteps, strict=True):
            sample = np.concatenate([_combine(row, history), extra_channels], axis=1)
            inputs = {"sample": sample, **self._unet_conditioning(module, size, timestep)}
            previous = cases[-1].outputs if cases else {}
            cases.append(Case(inputs, self._unet_outputs(module, inputs, previous)))
            history.append(cases[-1].outputs["output"])
        self.latents[size] = _combine(table.matrix[-1], history)
        return cases

    def _unet_conditioning(self, module: Any, size: Size, timestep: float) -> Feeds:
        inputs = {"timestep": np.full(1, timestep, np.float32), **self.conditioning}
        if getattr(module, "add_embedding", None) is not None:
            count = module.config.num_time_ids
            inputs["time_ids"] = build_time_ids(GenerationOptions(), size, count)[1:]
        if width := getattr(module.config, "time_cond_proj_dim", None):
            inputs[GUIDANCE] = guidance_embedding(1.0, width)[None]
        return inputs

    def _unet_outputs(self, module: Any, inputs: Feeds, previous: Feeds) -> Feeds:
        """The module's outputs. With a branch, also a case of the layers above it, with the feature
        of the previous step, as in a sampling run.
        """
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        if self.branch is None:
            return {"output": module(**tensors).numpy()}
        if FEATURE in previous:
            feature = previous[FEATURE]
            shallow = module.shallow(**tensors, feature=torch.from_numpy(feature)).numpy()
            self.shallow_cases.append(Case({**inputs, FEATURE: feature}, {"output": shallow}))
        output, feature = (value.numpy() for value in module(**tensors))
        return {"output": output, FEATURE: feature}

    def control(self, module: Any, outputs: Sequence[str], plain: Case) -> None:
        """A case of a UNet with further inputs that are zeros, which is the plain one's, and one
        where they are not.
        """
        sides = plain.inputs["sample"].shape[2:]
        shapes = module.config.residual_shapes(*sides) | module.ip_adapter_shapes(IMAGE_TOKENS)
        zeros = {name: np.zeros((1, *shape), np.float32) for name, shape in shapes.items()}
        off = Case({**plain.inputs, **zeros}, plain.outputs)
        on = self.synthetic(CONTROL, module.controlled, outputs, off.inputs)
        self.control_cases = [off, on]

    def vae_decoder(self, module: nn.Module) -> list[Case]:
        for size, latents in self.latents.items():
            self.images[size] = module(torch.from_numpy(latents)).numpy()
        return [
            Case({"latents": self.latents[size]}, {"image": image})
            for size, image in self.images.items()
        ]

    def vae_encoder(self, module: nn.Module) -> list[Case]:
        self.preview = preview_projection(module, self.manifest.downscale)
        cases = []
        for decoded in self.images.values():
            image = np.clip(decoded, -1, 1)
            mean, std = module(torch.from_numpy(image))
            cases.append(Case({"image": image}, {"mean": mean.numpy(), "std": std.numpy()}))
        return cases

    def safety_checker(self, module: Any) -> list[Case]:
        side = module.vision_model.config.image_size
        cases = []
        for decoded in self.images.values():
            pixels = clip_pixels(images_from_decoded(decoded)[0], side)
            special, concepts = (output.numpy() for output in module(torch.from_numpy(pixels)))
            cases.append(Case({"pixels": pixels}, {"special": special, "concepts": concepts}))
        return cases

    def synthetic(self, name: str, module: Any, outputs: Sequence[str], like: Feeds) -> Case:
        """Torch's outputs for seeded inputs, which any machine can generate; the bundle stores
        samples of them.

        like: inputs of the same names and shapes
        """
        shapes = {key: value.shape for key, value in like.items()}
        inputs = reference_inputs(shapes, like.get("input_ids"), self.manifest.sizes[0])
        output = module(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        tensors = output if isinstance(output, tuple) else (output,)
        arrays = {key: tensor.numpy() for key, tensor in zip(outputs, tensors, strict=True)}
        self.samples[name] = {key: round_samples(array) for key, array in arrays.items()}
        return Case(inputs, arrays)

    @property
    def outputs(self) -> ReferenceOutputs:
        """The samples that the bundle stores."""
        return ReferenceOutputs(self.samples, round_samples(self.images[self.manifest.sizes[0]]))


def _combine(row: np.ndarray, history: list[np.ndarray]) -> np.ndarray:
    """A row of the sampler's matrix times the history."""
    total = sum(np.float32(a) * b for a, b in zip(row, history, strict=False))
    return np.asarray(total, np.float32)
