"""The proof of a bundle: what its engines compute against what torch computes, as it is built.

Knows modules, graphs and engines; not where a checkpoint comes from nor how a bundle is published.
"""

import gc
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdrt.bundle import Bundle, Component, Manifest
from sdrt.engine import Candidate, candidates
from sdrt.runtime import Pipeline, load_pipeline, randn, sampler_table
from sdrt.runtime.loop import Guidance, denoised, histories_of, plan_of

from . import modules, parity
from .checkpoint import Checkpoint
from .graph import export_graph

log = logging.getLogger("sdrt.build")
PROOF_PROMPT = "a red circle on a blue background"
PROOF_SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False}
PROOF_STEPS = 2
GUIDED_STEPS = 4


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one component is exported."""

    name: str
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    picture: bool = False


LATENT_AXES = {0: "rows", 2: "latent_height", 3: "latent_width"}
RECIPES = (
    Recipe("text_encoder", ("contexts",), {"input_ids": {0: "rows"}}),
    Recipe(
        "unet",
        ("output",),
        {"sample": LATENT_AXES, "timestep": {0: "rows"}, "context": {0: "rows", 1: "tokens"}},
    ),
    Recipe("vae_decoder", ("image",), {"latents": LATENT_AXES}, picture=True),
    Recipe("vae_encoder", ("mean", "std"), {"image": {0: "rows", 2: "height", 3: "width"}}),
)


class Proof:
    """Exports components one after the other, keeping torch's answers to compare with.

    Torch's answers are chained: its context feeds its UNet, whose latents feed its decoder, so
    that they are also the end-to-end reference.
    """

    def __init__(self, manifest: Manifest, folder: Path, dtype: str, candidate: Candidate) -> None:
        self.manifest = manifest
        self.folder = folder
        self.dtype = dtype
        self.candidate = candidate
        self.contexts = np.zeros(0)
        self.latents: dict[tuple[int, int], np.ndarray] = {}
        self.images: dict[tuple[int, int], np.ndarray] = {}
        self.preview: tuple[tuple[float, ...], ...] = ()
        self.model_channels = manifest.latent_channels

    def component(self, checkpoint: Checkpoint, recipe: Recipe) -> Component:
        module: nn.Module = getattr(modules, recipe.name)(checkpoint)
        with torch.no_grad():
            cases = getattr(self, f"_{recipe.name}_cases")(module)
        dtype = getattr(torch, self.dtype)
        example = {k: self._cast(torch.from_numpy(v), dtype) for k, v in cases[0][0].items()}
        inputs, outputs = export_graph(
            module.to(dtype),
            _two_rows(example),
            recipe.outputs,
            recipe.axes,
            self.folder / recipe.name,
        )
        del module
        gc.collect()
        component = Component(inputs, outputs, self.dtype, {})
        values = self._compare(recipe, component, cases)
        log.info("      %s", "  ".join(f"{k} {v:.6g}" for k, v in values.items()))
        parity.check(recipe.name, values, self.dtype)
        return Component(inputs, outputs, self.dtype, values)

    @staticmethod
    def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(dtype) if tensor.ndim > 1 and tensor.is_floating_point() else tensor

    def _compare(self, recipe: Recipe, component: Component, cases: list[Any]) -> dict[str, float]:
        bundle = Bundle(self.folder, replace(self.manifest, components={recipe.name: component}))
        assert self.candidate.load is not None
        engine = self.candidate.load(bundle, recipe.name)
        every = []
        for feeds, wanted in cases:
            found = engine(feeds)
            every += [
                parity.measures(found[name], wanted[name], picture=recipe.picture)
                for name in recipe.outputs
            ]
        engine.close()
        return parity.worst(every)

    def _text_encoder_cases(self, module: nn.Module) -> list[Any]:
        from sdrt.runtime import Tokenizer

        tokenizer = Tokenizer.from_folder(self.folder / "tokenizer", self.manifest.max_tokens)
        ids = tokenizer(["", PROOF_PROMPT])
        contexts = module(torch.from_numpy(ids)).numpy()
        self.contexts = contexts[:, -1]
        return [({"input_ids": ids}, {"contexts": contexts})]

    def _unet_cases(self, module: nn.Module) -> list[Any]:
        table = sampler_table(PROOF_SCHEDULER, PROOF_STEPS)
        self.model_channels = module.config.in_channels
        cases = []
        for size in self.manifest.sizes:
            history = [randn(0, self._latent_shape(size))]
            for k, timestep in enumerate(table.timesteps):
                mixed = self._mix(table.matrix[k], history)
                feeds = {
                    "sample": np.concatenate([mixed, self._beside(size)], axis=1),
                    "timestep": np.full(1, timestep, np.float32),
                    "context": self.contexts[1:],
                }
                output = module(**{n: torch.from_numpy(v) for n, v in feeds.items()}).numpy()
                history.append(output)
                cases.append((feeds, {"output": output}))
            self.latents[size] = self._mix(table.matrix[-1], history)
        return cases

    @staticmethod
    def _mix(row: np.ndarray, history: list[np.ndarray]) -> np.ndarray:
        mixed = sum(np.float32(a) * b for a, b in zip(row, history, strict=False))
        return np.asarray(mixed, np.float32)

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        scale = self.manifest.downscale
        return (1, self.manifest.latent_channels, size[1] // scale, size[0] // scale)

    def _beside(self, size: tuple[int, int]) -> np.ndarray:
        """What some models are fed beside the latents, made up: [1, E, H/8, W/8], E mostly 0."""
        _, channels, *sides = self._latent_shape(size)
        return randn(1, (1, self.model_channels, *sides))[:, channels:]

    def _vae_decoder_cases(self, module: nn.Module) -> list[Any]:
        for size, latents in self.latents.items():
            self.images[size] = module(torch.from_numpy(latents)).numpy()
        return [
            ({"latents": self.latents[size]}, {"image": self.images[size]}) for size in self.images
        ]

    def _vae_encoder_cases(self, module: nn.Module) -> list[Any]:
        self.preview = preview_projection(module, self.manifest.downscale)
        cases = []
        for image in self.images.values():
            picture = np.clip(image, -1, 1)
            mean, std = module(torch.from_numpy(picture))
            cases.append(({"image": picture}, {"mean": mean.numpy(), "std": std.numpy()}))
        return cases

    def end_to_end(self, manifest: Manifest) -> dict[str, float]:
        """The runtime's own loop from the same noise, against torch's chained answers."""
        every = []
        with load_pipeline(Bundle(self.folder, manifest), self.candidate) as pipe:
            for size, wanted in self.images.items():
                found = self._drawn(pipe, size, PROOF_STEPS, guidance_scale=1.0)
                every.append(parity.measures(found, wanted, picture=True))
        values = parity.worst(every)
        log.info("end to end: %s", "  ".join(f"{k} {v:.6g}" for k, v in values.items()))
        parity.check("the whole pipeline", values, self.dtype)
        return values

    def _drawn(
        self, pipe: Pipeline, size: tuple[int, int], steps: int, guidance_scale: float
    ) -> np.ndarray:
        """The proof's picture, [1, 3, H, W], by a bundle's engines."""
        ids = pipe.tokenizer(["", PROOF_PROMPT])
        context = pipe.engines["text_encoder"]({"input_ids": ids})["contexts"][:, -1]
        table = sampler_table(PROOF_SCHEDULER, steps)
        guidance = Guidance(np.full(steps, guidance_scale))
        plan = plan_of(table, guidance)
        histories = histories_of(plan, [[randn(0, self._latent_shape(size))[0]]])
        loop = denoised(
            pipe.engines["unet"],
            table,
            guidance,
            plan,
            histories,
            context.astype(np.float32),
            self._beside(size),
        )
        *_, last = loop
        return pipe.decoded(last.latents)

    def admitted(self, manifest: Manifest) -> dict[str, float]:
        """The lower precisions of this machine whose pictures are near enough to the exact ones."""
        found = {}
        for candidate in candidates():
            if candidate.why_not is None and (name := candidate.reduced) is not None:
                lower = replace(manifest, admitted={name: 0.0})
                exact, near = (self._guided(each, candidate) for each in (manifest, lower))
                psnr = parity.measures(near, exact, picture=True)["psnr"]
                enough = psnr >= parity.PICTURE_FLOOR
                log.info("%s: psnr %.1f, %s", name, psnr, "admitted" if enough else "too far")
                if enough:
                    found[name] = round(psnr, 2)
        return found

    def _guided(self, manifest: Manifest, candidate: Candidate) -> np.ndarray:
        """A picture of the first size with guidance, which is where precision shows."""
        with load_pipeline(Bundle(self.folder, manifest), candidate) as pipe:
            return self._drawn(pipe, manifest.sizes[0], GUIDED_STEPS, guidance_scale=7.5)


def _two_rows(example: dict[str, Tensor]) -> dict[str, Tensor]:
    """The exporter takes a length of one for a fixed one, so show it two of every row."""
    return {
        name: tensor if len(tensor) > 1 else torch.cat([tensor, tensor])
        for name, tensor in example.items()
    }


def preview_projection(encoder: nn.Module, downscale: int) -> tuple[tuple[float, ...], ...]:
    """Colours from latents by least squares over soft patches of colour, [3, C + 1]."""
    side = 16
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand((1, 3, side // 2, side // 2), generator=generator) * 2.0 - 1.0
    picture = nn.functional.interpolate(patches, scale_factor=2 * downscale, mode="bilinear")
    mean, _ = encoder(picture)
    colours = nn.functional.avg_pool2d(picture, downscale)
    known = torch.cat([mean, torch.ones_like(mean[:, :1])], dim=1).flatten(2)[0].double()
    fitted = torch.linalg.lstsq(known.T, colours.flatten(2)[0].double().T).solution.T
    return tuple(tuple(round(float(value), 5) for value in row) for row in fitted)
