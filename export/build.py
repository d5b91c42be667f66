"""`sdrt build`: from a checkpoint to a proven bundle that appears whole or not at all."""

import errno
import fcntl
import gc
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdrt.bundle import (
    MANIFEST,
    Bundle,
    Component,
    Manifest,
    bundles_folder,
    describe_files,
    json_from_manifest,
)
from sdrt.engine import Candidate, candidates, choose
from sdrt.errors import BundleError, SdrtError
from sdrt.runtime import load_pipeline, randn, sampler_table

from . import modules, parity
from .checkpoint import PARTS, Checkpoint, find_checkpoint
from .graph import OPSET, export_graph
from .unet import UnetConfig
from .vae import VaeConfig

log = logging.getLogger("sdrt.build")
PROOF_PROMPT = "a red circle on a blue background"
PROOF_STEPS = 2
GUIDED_STEPS = 4


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What `sdrt build` was asked for."""

    model: str
    output: Path | None = None
    dtype: str = "float32"
    sizes: tuple[tuple[int, int], ...] = ()
    batch: tuple[int, int, int] = (1, 1, 4)
    backend: str = "auto"
    force: bool = False


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


def build_bundle(plan: BuildPlan) -> Path:
    """Build, prove and publish; returns the bundle's folder.

    Raises CheckpointError, ParityError, BackendError, and BundleError where the folder is taken.
    """
    choose(plan.backend)
    checkpoint = find_checkpoint(plan.model)
    candidate = choose(plan.backend, _bytes(checkpoint, plan.dtype))
    target = (plan.output or bundles_folder() / checkpoint.name).expanduser()
    if target.exists() and not (target / MANIFEST).is_file():
        raise BundleError(f"{target} exists and is not a bundle; name another --output")
    with _folder_errors(target), _lock(target):
        if target.exists() and not plan.force:
            raise BundleError(f"{target} is there already; --force builds it again")
        began = time.monotonic()
        with _workshop(target) as folder:
            _announce(checkpoint, plan, target)
            log.info("proving on %s (%s)", candidate.title, candidate.because)
            manifest = _make(checkpoint, plan, candidate, folder)
            _publish(folder, target)
        size = sum(record.size for record in manifest.files.values())
        log.info("done in %.0f s, %.1f MB", time.monotonic() - began, size / 1e6)
    return target


def _announce(checkpoint: Checkpoint, plan: BuildPlan, target: Path) -> None:
    """Say what will be done; raise SdrtError if the disk cannot hold it."""
    needed = _bytes(checkpoint, plan.dtype)
    free = shutil.disk_usage(target.parent).free
    log.info(
        "building %s from %s: %s, about %.0f MB",
        target,
        checkpoint.source,
        plan.dtype,
        needed / 1e6,
    )
    if needed > free:
        raise SdrtError(
            f"{target} needs about {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; "
            "free some, or name another --output or SDRT_HOME"
        )


def _bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """About how large the bundle will be."""
    stored = sum(f.stat().st_size for part in PARTS for f in checkpoint.weight_files(part))
    parameters = stored // checkpoint.bytes_per_parameter()
    return parameters * (2 if dtype == "float16" else 4)


@contextmanager
def _folder_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SdrtError(
                f"no space left for {target}; nothing was published. Free some, or name another "
                "--output or SDRT_HOME"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise SdrtError(
                f"cannot write {target}: {error.strerror}; name another --output or SDRT_HOME"
            ) from error
        raise


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Two builds of one bundle wait for each other; the kernel drops a killed build's lock."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another build of %s is running; waiting for it", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A folder beside the target that is gone afterwards, and whatever killed builds left."""
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(_old(target), ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _publish(folder: Path, target: Path) -> None:
    if target.exists():
        target.rename(_old(target))
    folder.rename(target)
    shutil.rmtree(_old(target), ignore_errors=True)


def _make(checkpoint: Checkpoint, plan: BuildPlan, candidate: Candidate, folder: Path) -> Manifest:
    _copy_small_files(checkpoint, folder)
    vae = VaeConfig.from_json(checkpoint.config("vae"))
    unet = UnetConfig.from_json(checkpoint.config("unet"))
    text = checkpoint.config("text_encoder")
    downscale = 2 ** (len(vae.block_out_channels) - 1)
    native = unet.sample_size * downscale
    manifest = Manifest(
        name=checkpoint.name,
        source=checkpoint.source,
        sizes=plan.sizes or ((native, native),),
        batch=plan.batch,
        latent_channels=vae.latent_channels,
        downscale=downscale,
        max_tokens=int(text.get("max_position_embeddings", 77)),
        opset=OPSET,
        components={},
        parity={},
        preview=(),
        files={},
    )
    proof = Proof(manifest, folder, plan.dtype, candidate)
    components = {}
    for number, recipe in enumerate(RECIPES, 1):
        log.info("[%d/%d] %s: read, export, prove", number, len(RECIPES), recipe.name)
        components[recipe.name] = proof.component(checkpoint, recipe)
    manifest = replace(manifest, components=components)
    (folder / MANIFEST).write_text(json_from_manifest(manifest))
    end_to_end = proof.end_to_end(manifest)
    manifest = replace(
        manifest,
        parity=end_to_end,
        preview=proof.preview,
        files=describe_files(folder),
        admitted=proof.admitted(manifest),
    )
    (folder / MANIFEST).write_text(json_from_manifest(manifest))
    return manifest


def _copy_small_files(checkpoint: Checkpoint, folder: Path) -> None:
    (folder / "scheduler").mkdir()
    text = json.dumps(checkpoint.scheduler_config(), indent=2, sort_keys=True) + "\n"
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(checkpoint.folder / "tokenizer" / name, folder / "tokenizer" / name)


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
        table = sampler_table({"_class_name": "DDIMScheduler", "clip_sample": False}, PROOF_STEPS)
        cases = []
        for size in self.manifest.sizes:
            history = [randn(0, self._latent_shape(size))]
            for k, timestep in enumerate(table.timesteps):
                feeds = {
                    "sample": self._mix(table.matrix[k], history),
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
        """The pipeline's own loop from the same noise, against torch's chained answers."""
        config = {"_class_name": "DDIMScheduler", "clip_sample": False}
        every = []
        with load_pipeline(Bundle(self.folder, manifest), self.candidate) as pipe:
            ddim = pipe.with_scheduler(config)
            for size, wanted in self.images.items():
                *_, last = ddim.steps(
                    PROOF_PROMPT,
                    num_inference_steps=PROOF_STEPS,
                    guidance_scale=1.0,
                    seed=0,
                    size=f"{size[0]}x{size[1]}",
                )
                found = ddim.decoded(last.latents)
                every.append(parity.measures(found, wanted, picture=True))
        values = parity.worst(every)
        log.info("end to end: %s", "  ".join(f"{k} {v:.6g}" for k, v in values.items()))
        parity.check("the whole pipeline", values, self.dtype)
        return values

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
        config = {"_class_name": "DDIMScheduler", "clip_sample": False}
        with load_pipeline(Bundle(self.folder, manifest), candidate) as pipe:
            ddim = pipe.with_scheduler(config)
            *_, last = ddim.steps(PROOF_PROMPT, num_inference_steps=GUIDED_STEPS, seed=0)
            return ddim.decoded(last.latents)


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
