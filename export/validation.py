"""The proof of a bundle: what its engines compute against what torch computes, as it is built.

Knows modules, graphs and engines; not where a checkpoint comes from nor how a bundle is published.
"""

import contextlib
import ctypes
import gc
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdrt.bundle import Bundle
from sdrt.bundle.bundle import graph_name
from sdrt.bundle.manifest import FEATURE, FLOAT32_GRAPH, SHALLOW, Component, Manifest
from sdrt.engine import Candidate, Feeds, list_backends, parity
from sdrt.errors import ParityError
from sdrt.runtime import GenerationOptions, load_pipeline, randn, sampler_table
from sdrt.runtime.embedded_guidance import GUIDANCE, guidance_embedding
from sdrt.runtime.images import images_from_decoded, pixels_of
from sdrt.runtime.reference_outputs import (
    GUIDED_STEPS,
    PROMPT,
    SCHEDULER,
    STEPS,
    ReferenceOutputs,
    generate_reference_image,
    latent_shape,
    reference_extra_channels,
    reference_inputs,
    round_samples,
)
from sdrt.runtime.safety_checker import clip_pixels
from sdrt.runtime.text.conditioning import Conditioning, build_time_ids

from . import modules
from .activation_memory import alive_bytes
from .checkpoint import Checkpoint
from .graph import export_graph, write_float32_graph, write_shallow_graph
from .pixel_unet import PixelUnet
from .vae import preview_projection

log = logging.getLogger("sdrt.build")
HALF_MAX = 65504.0
EXACT = ("timestep", "time_ids")  # inputs that half precision would round


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one component is exported."""

    name: str
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    picture: bool = False

    @property
    def part(self) -> str:
        """The checkpoint's part that it is made of."""
        return "vae" if self.name.startswith("vae") else self.name


LATENT_AXES = {0: "rows", 2: "latent_height", 3: "latent_width"}
RECIPES = (
    Recipe("text_encoder", ("contexts",), {"input_ids": {0: "rows"}}),
    Recipe("text_encoder_2", ("contexts", "pooled"), {"input_ids": {0: "rows"}}),
    Recipe(
        "unet",
        ("output",),
        {
            "sample": LATENT_AXES,
            "context": {0: "rows", 1: "tokens"},
            **{name: {0: "rows"} for name in ("timestep", "pooled", "time_ids", GUIDANCE)},
        },
    ),
    Recipe("vae_decoder", ("image",), {"latents": LATENT_AXES}, picture=True),
    Recipe("safety_checker", ("special", "concepts"), {"pixels": {0: "rows"}}),
    Recipe("vae_encoder", ("mean", "std"), {"image": {0: "rows", 2: "height", 3: "width"}}),
)


@contextlib.contextmanager
def largest_activation(module: nn.Module) -> Iterator[list[float]]:
    """The largest magnitude that any layer puts out meanwhile: a processor without half precision
    computes in single, so that only this tells what overflows elsewhere.
    """
    peak = [0.0]

    def look(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            low, high = output.aminmax()
            peak[0] = max(peak[0], -float(low), float(high))

    hooks = [layer.register_forward_hook(look) for layer in module.modules()]
    try:
        yield peak
    finally:
        for hook in hooks:
            hook.remove()


class Proof:
    """Exports components one after the other, keeping torch's answers to compare with.

    Torch's answers are chained: its context feeds its UNet, whose latents feed its decoder, so
    that they are also the end-to-end reference.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        dtype: str,
        candidate: Candidate,
        branch: int | None = None,
    ) -> None:
        """branch: of the UNet, above which it is also exported as a network of its own"""
        self.manifest = manifest
        self.folder = folder
        self.dtype = dtype
        self.candidate = candidate
        self.branch = branch
        self.told: Conditioning = {}
        self.latents: dict[tuple[int, int], np.ndarray] = {}
        self.images: dict[tuple[int, int], np.ndarray] = {}
        self.preview: tuple[tuple[float, ...], ...] = ()
        self.shallow_cases: list[Any] = []
        self.samples: dict[str, dict[str, list[float]]] = {}

    def components(self, checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Component]:
        """Export what a recipe makes and prove it; in float32 where half precision does not hold
        it.
        """
        if recipe.name == "unet" and self.branch is not None:
            recipe = replace(recipe, outputs=(*recipe.outputs, FEATURE))
        module = self._module(checkpoint, recipe)
        with torch.no_grad(), largest_activation(module) as peak:
            cases = getattr(self, f"_{recipe.name}_cases")(module)
            cases.append(self._kept(recipe, module, cases[0][0]))
            if FEATURE in recipe.outputs:
                like, own = self.shallow_cases[0][0], Recipe(SHALLOW, ("output",), {})
                self.shallow_cases.append(self._kept(own, module.shallow, like))
        # What a threshold decides should not hang on precision.
        dtype = "float32" if recipe.name == "safety_checker" else self.dtype
        if dtype == "float16" and peak[0] > HALF_MAX:
            log.info("      activations reach %.3g, beyond float16; kept in float32", peak[0])
            dtype = "float32"
        specs = self._export(module, recipe, cases, dtype)
        del module
        gc.collect()
        try:
            return self._proven(recipe, cases, dtype, specs)
        except ParityError as error:
            if dtype == "float32":
                raise
            log.info("      %s; kept in float32", error)
        specs = self._export(self._module(checkpoint, recipe), recipe, cases, "float32")
        gc.collect()
        return self._proven(recipe, cases, "float32", specs)

    def _module(self, checkpoint: Checkpoint, recipe: Recipe) -> Any:
        module = getattr(modules, recipe.name)(checkpoint)
        if FEATURE in recipe.outputs:
            module.branch = self.branch
        return module

    def _kept(
        self, recipe: Recipe, module: Any, like: dict[str, np.ndarray]
    ) -> tuple[Feeds, dict[str, np.ndarray]]:
        """Torch's answers to inputs that any machine can make up, of which samples are kept."""
        shapes = {name: value.shape for name, value in like.items()}
        feeds = reference_inputs(shapes, like.get("input_ids"), self.manifest.sizes[0])
        found = module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        outputs = found if isinstance(found, tuple) else (found,)
        answers = {name: o.numpy() for name, o in zip(recipe.outputs, outputs, strict=True)}
        self.samples[recipe.name] = {
            name: round_samples(answer) for name, answer in answers.items()
        }
        return feeds, answers

    @property
    def answers(self) -> ReferenceOutputs:
        """What the bundle keeps of torch's."""
        return ReferenceOutputs(self.samples, round_samples(self.images[self.manifest.sizes[0]]))

    def _export(
        self, module: nn.Module, recipe: Recipe, cases: list[Any], dtype: str
    ) -> tuple[Any, Any]:
        """Write graph and weights; the specifications of inputs and outputs."""
        kind = getattr(torch, dtype)
        example = {k: self._cast(k, torch.from_numpy(v), kind) for k, v in cases[0][0].items()}
        folder = self.folder / recipe.name
        shutil.rmtree(folder, ignore_errors=True)
        return export_graph(
            module.to(kind), _two_rows(example), recipe.outputs, recipe.axes, folder
        )

    def _proven(
        self, recipe: Recipe, cases: list[Any], dtype: str, specs: tuple[Any, Any]
    ) -> dict[str, Component]:
        """What was exported, and what is made of its graph."""
        component = Component(*specs, dtype, {})
        made = {recipe.name: self._prove(recipe, component, cases)}
        if recipe.picture and dtype == "float16":
            self._add_float32(recipe, cases, component)
        if FEATURE in recipe.outputs:
            shallow = write_shallow_graph(self.folder / recipe.name, dtype)
            log.info("      the layers above branch %d alone:", self.branch)
            own = Recipe(SHALLOW, ("output",), {})
            made[SHALLOW] = self._prove(own, shallow, self.shallow_cases)
        return made

    def _prove(self, recipe: Recipe, component: Component, cases: list[Any]) -> Component:
        values = self._compare(recipe, component, cases)
        log.info("      %s", _said(values))
        parity.check(recipe.name, values, component.dtype)
        alive = alive_bytes(self.folder / graph_name(recipe.name), self.manifest)
        return replace(component, parity=values, activations=alive)

    def _add_float32(self, recipe: Recipe, cases: list[Any], component: Component) -> None:
        """Add and prove the graph for pictures that overflow half precision."""
        write_float32_graph(self.folder / recipe.name)
        values = self._compare(recipe, component, cases, FLOAT32_GRAPH)
        log.info("      again in float32: %s", _said(values))
        parity.check(f"{recipe.name} in float32", values, "float16")

    @staticmethod
    def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        exact = name in EXACT or not tensor.is_floating_point()
        return tensor if exact else tensor.to(dtype)

    def _compare(
        self,
        recipe: Recipe,
        component: Component,
        cases: list[Any],
        graph_file: str = "model.onnx",
    ) -> dict[str, float]:
        manifest = replace(self.manifest, components={recipe.name: component})
        bundle = Bundle(self.folder, manifest, graph_file)
        assert self.candidate.load is not None
        engine = self.candidate.load(bundle, recipe.name)
        every = []
        for feeds, wanted in cases:
            found = engine(feeds)
            every += [
                parity.measure(found[name], wanted[name], is_image=recipe.picture)
                for name in recipe.outputs
            ]
        engine.close()
        return parity.worst_case(every)

    def _text_encoder_cases(self, module: nn.Module) -> list[Any]:
        ids = self._ids("tokenizer")
        contexts = module(torch.from_numpy(ids)).numpy()
        self.told["context"] = contexts[1:, -1]
        return [({"input_ids": ids}, {"contexts": contexts})]

    def _text_encoder_2_cases(self, module: nn.Module) -> list[Any]:
        ids = self._ids("tokenizer_2")
        contexts, pooled = (found.numpy() for found in module(torch.from_numpy(ids)))
        both = [self.told["context"], contexts[1:, -1]]
        self.told = {"context": np.concatenate(both, axis=-1), "pooled": pooled[1:]}
        return [({"input_ids": ids}, {"contexts": contexts, "pooled": pooled})]

    def _ids(self, tokenizer: str) -> np.ndarray:
        from sdrt.runtime import Tokenizer

        read = Tokenizer.from_folder(self.folder / tokenizer, self.manifest.max_tokens)
        return read(["", PROMPT])

    def _unet_cases(self, module: Any) -> list[Any]:
        table = sampler_table(SCHEDULER, STEPS)
        cases = []
        for size in self.manifest.sizes:
            history = [randn(0, latent_shape(self.manifest, size))]
            more = reference_extra_channels(self.manifest, size, module.config.in_channels)
            wanted: Conditioning = {}
            for k, timestep in enumerate(table.timesteps):
                mixed = self._mix(table.matrix[k], history)
                feeds = {
                    "sample": np.concatenate([mixed, more], axis=1),
                    "timestep": np.full(1, timestep, np.float32),
                    **self.told,
                }
                if getattr(module, "add_embedding", None) is not None:
                    feeds["time_ids"] = build_time_ids(GenerationOptions(), size)[1:]
                if width := getattr(module.config, "time_cond_proj_dim", None):
                    feeds[GUIDANCE] = guidance_embedding(1.0, width)[None]
                wanted = self._unet_answers(module, feeds, wanted)
                history.append(wanted["output"])
                cases.append((feeds, wanted))
            self.latents[size] = self._mix(table.matrix[-1], history)
        if isinstance(module, PixelUnet):  # what it leaves is the picture
            self.images = {size: pixels_of(drawn) for size, drawn in self.latents.items()}
            channels = self.manifest.latent_channels
            colours = np.eye(3) if channels == 3 else np.ones((3, 1))
            self.preview = tuple((*row, 0.0) for row in colours.tolist())
        return cases

    def _unet_answers(self, module: Any, feeds: Conditioning, before: Conditioning) -> Conditioning:
        """What torch's module puts out. Where it has a branch, also what its layers above that make
        of the feature of the evaluation before, as in a run.
        """
        given = {name: torch.from_numpy(value) for name, value in feeds.items()}
        if self.branch is None:
            return {"output": module(**given).numpy()}
        if FEATURE in before:
            shallow = module.shallow(**given, feature=torch.from_numpy(before[FEATURE])).numpy()
            case = {**feeds, FEATURE: before[FEATURE]}, {"output": shallow}
            self.shallow_cases.append(case)
        output, feature = (made.numpy() for made in module(**given))
        return {"output": output, FEATURE: feature}

    @staticmethod
    def _mix(row: np.ndarray, history: list[np.ndarray]) -> np.ndarray:
        mixed = sum(np.float32(a) * b for a, b in zip(row, history, strict=False))
        return np.asarray(mixed, np.float32)

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

    def _safety_checker_cases(self, module: Any) -> list[Any]:
        side = module.vision_model.config.image_size
        cases = []
        for image in self.images.values():
            pixels = clip_pixels(images_from_decoded(image)[0], side)
            special, concepts = (found.numpy() for found in module(torch.from_numpy(pixels)))
            cases.append(({"pixels": pixels}, {"special": special, "concepts": concepts}))
        return cases

    def end_to_end(self, manifest: Manifest) -> dict[str, float]:
        """The runtime's own loop from the same noise, against torch's chained answers."""
        every = []
        with load_pipeline(Bundle(self.folder, manifest), self.candidate) as pipe:
            for size, wanted in self.images.items():
                found = generate_reference_image(pipe, size)
                every.append(parity.measure(found, wanted, is_image=True))
        values = parity.worst_case(every)
        log.info("end to end: %s", _said(values))
        parity.check("the whole pipeline", values, self.dtype)
        return values

    def admitted(self, manifest: Manifest) -> dict[str, float]:
        """The lower precisions of this machine whose pictures are near enough to the exact ones.

        Bundles in half precision are made for GPUs: their builds wait for no pictures of the CPU's.
        """
        found: dict[str, float] = {}
        if self.dtype == "float16":
            return found
        for candidate in list_backends():
            if (
                candidate.unavailable_reason is None
                and (name := candidate.reduced_precision) is not None
            ):
                exact = self._guided(manifest, self.candidate)
                give_memory_back()
                near = self._guided(replace(manifest, admitted={name: 0.0}), candidate)
                psnr = parity.measure(near, exact, is_image=True)["psnr"]
                enough = psnr >= parity.MIN_IMAGE_PSNR
                log.info("%s: psnr %.1f, %s", name, psnr, "admitted" if enough else "too far")
                if enough:
                    found[name] = round(psnr, 2)
        return found

    def _guided(self, manifest: Manifest, candidate: Candidate) -> np.ndarray:
        """A picture of the first size with guidance, which is where precision shows."""
        with load_pipeline(Bundle(self.folder, manifest), candidate) as pipe:
            return generate_reference_image(
                pipe, manifest.sizes[0], GUIDED_STEPS, guidance_scale=7.5
            )


def _said(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.6g}" for name, value in values.items())


def give_memory_back() -> None:
    """Return what earlier engines freed to the system, where the allocator would keep it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _two_rows(example: dict[str, Tensor]) -> dict[str, Tensor]:
    """The exporter takes a length of one for a fixed one, so show it two of every row."""
    return {
        name: tensor if len(tensor) > 1 else torch.cat([tensor, tensor])
        for name, tensor in example.items()
    }
