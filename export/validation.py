"""Export of a bundle's components, each validated against torch before anything is published.

Knows recipes, graphs and engines; not where a checkpoint comes from nor how a bundle is published.
"""

import contextlib
import ctypes
import gc
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdrt.bundle import Bundle
from sdrt.bundle.bundle import embeddings_component, graph_name
from sdrt.bundle.manifest import (
    CONTROL,
    EMBEDDINGS_GRAPH,
    FEATURE,
    FLOAT32_GRAPH,
    LORA_FACTORS,
    LORA_PARTS,
    SHALLOW,
    TEXT_ENCODERS,
    TOKEN_EMBEDDINGS,
    Component,
    Manifest,
    TensorSpec,
)
from sdrt.bundle.token_embeddings import read_table, write_embeddings_graph
from sdrt.engine import (
    Candidate,
    GpuInventory,
    LoadOptions,
    list_backends,
    parity,
    select_backend,
)
from sdrt.errors import ParityError
from sdrt.runtime import load_pipeline
from sdrt.runtime.reference_outputs import GUIDED_STEPS, generate_reference_image

from .activation_memory import alive_bytes
from .control_graph import write_control_graph
from .graph import export_graph, write_float32_graph, write_shallow_graph
from .lora_graph import write_lora_graph
from .lora_reference import compute_lora_case
from .recipes import Recipe
from .reference import Case, Size, TorchReference
from .stored_weights import convert
from .unet import Unet
from .unet_config import UnetConfig

log = logging.getLogger("sdrt.build")
FLOAT16_MAX = 65504.0
FLOAT32_INPUTS = ("timestep", "time_ids")  # half precision would round them
Specs = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]  # of inputs and outputs


def select_validation_backend(backend: str) -> Candidate:
    """The backend that validates a build: the CPU unless asked otherwise, so that a bundle does not
    depend on the GPU at hand; and there ONNX Runtime, which needs the least memory.

    Raises:
        BackendError: It is not available.
    """
    no_gpus = GpuInventory(unavailable_reason="bundles are validated on the CPU")
    options = LoadOptions(map_weights=True)
    return select_backend(backend, 0, options, gpus=no_gpus if backend == "auto" else None)


@contextlib.contextmanager
def track_largest_activation(module: nn.Module) -> Iterator[list[float]]:
    """Track the largest magnitude of any layer's output, in a list of one number.

    A CPU without half precision computes it in single precision, so that no NaN shows what will
    overflow elsewhere.
    """
    peak = [0.0]

    def update(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            low, high = output.aminmax()
            peak[0] = max(peak[0], -float(low), float(high))

    hooks = [layer.register_forward_hook(update) for layer in module.modules()]
    try:
        yield peak
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Validator:
    """Exports one component after the other and compares the engines' outputs with torch's.

    dtype: float32 or float16; candidate: the backend that runs the exported graphs
    branch: of the UNet, if its layers above that are exported as well
    lora_rank: of the factors that rows may have, if any
    """

    manifest: Manifest
    folder: Path
    dtype: str
    candidate: Candidate
    branch: int | None = None
    lora_rank: int | None = None
    reference: TorchReference = field(init=False)

    def __post_init__(self) -> None:
        self.reference = TorchReference(self.manifest, self.folder, self.branch)

    def build_component(self, load: Callable[[], Any], recipe: Recipe) -> dict[str, Component]:
        """Export a component and validate it; in float32 where float16 is not accurate enough.

        load: the component's torch module.
        Returns the component by name; for a UNet also the one with residuals and, with a branch,
        its shallow layers; with `lora_rank` also the one with factors.
        Raises ParityError.
        """
        if recipe.name == "unet" and self.branch is not None:
            recipe = replace(recipe, outputs=(*recipe.outputs, FEATURE))
        module = self._load(load, recipe)
        with torch.no_grad(), track_largest_activation(module) as peak:
            cases = self._run_reference(module, recipe)
        dtype = self._choose_dtype(recipe, peak[0])
        specs = self._export(module, recipe, cases, dtype)
        config = module.config if isinstance(module, Unet) else None
        del module
        gc.collect()
        try:
            return self._validate_all(recipe, cases, dtype, specs, config)
        except ParityError as error:
            if dtype == "float32":
                raise
            log.info("      %s; kept in float32", error.message)
        specs = self._export(self._load(load, recipe), recipe, cases, "float32")
        gc.collect()
        return self._validate_all(recipe, cases, "float32", specs, config)

    def _load(self, load: Callable[[], Any], recipe: Recipe) -> Any:
        module = load()
        if FEATURE in recipe.outputs:
            module.branch = self.branch
        return module

    def _run_reference(self, module: Any, recipe: Recipe) -> list[Case]:
        reference = self.reference
        cases = recipe.reference(reference, module)
        like = cases[0].inputs
        cases.append(reference.synthetic(recipe.name, module, recipe.outputs, like))
        if FEATURE in recipe.outputs:
            shallow = reference.shallow_cases
            like = shallow[0].inputs
            shallow.append(reference.synthetic(SHALLOW, module.shallow, ("output",), like))
        if isinstance(module, Unet):
            reference.control(module, recipe.outputs, cases[0])
        if self.lora_rank and recipe.name in LORA_PARTS:
            reference.lora_cases[recipe.name] = compute_lora_case(
                module, self.lora_rank, like, recipe.outputs
            )
        return cases

    def _choose_dtype(self, recipe: Recipe, peak: float) -> str:
        if recipe.name == "safety_checker":  # a threshold should not depend on precision
            return "float32"
        if self.dtype == "float16" and peak > FLOAT16_MAX:
            log.info("      activations reach %.3g, beyond float16; kept in float32", peak)
            return "float32"
        return self.dtype

    def _export(self, module: nn.Module, recipe: Recipe, cases: list[Case], dtype: str) -> Specs:
        """Write graph and weights."""
        torch_dtype = getattr(torch, dtype)
        example = {
            name: _cast(name, torch.from_numpy(value), torch_dtype)
            for name, value in cases[0].inputs.items()
        }
        folder = self.folder / recipe.name
        shutil.rmtree(folder, ignore_errors=True)
        return export_graph(
            convert(module, torch_dtype),
            _with_two_rows(example),
            recipe.outputs,
            recipe.axes,
            folder,
        )

    def _validate_all(
        self,
        recipe: Recipe,
        cases: list[Case],
        dtype: str,
        specs: Specs,
        config: UnetConfig | None,
    ) -> dict[str, Component]:
        """Validate the exported graph and the graphs that are derived from it."""
        component = Component(*specs, dtype, {})
        components = {recipe.name: self._validate(recipe.name, recipe, component, cases)}
        if recipe.name in TEXT_ENCODERS:
            self._add_embeddings_graph(recipe, cases, component)
        if recipe.is_image and dtype == "float16":
            self._add_float32_graph(recipe, cases, component)
        components |= self._build_lora_graph(recipe, cases, dtype)
        if config is not None:
            control = write_control_graph(self.folder / recipe.name, config, dtype)
            log.info("      with residuals:")
            cases = self.reference.control_cases
            components[CONTROL] = self._validate(CONTROL, recipe, control, cases)
        if FEATURE in recipe.outputs:
            shallow = write_shallow_graph(self.folder / recipe.name, dtype)
            log.info("      the layers above branch %d:", self.branch)
            recipe, cases = replace(recipe, outputs=("output",)), self.reference.shallow_cases
            components[SHALLOW] = self._validate(SHALLOW, recipe, shallow, cases)
        return components

    def _validate(
        self, name: str, recipe: Recipe, component: Component, cases: list[Case]
    ) -> Component:
        values = self._compare(name, recipe, component, cases)
        log.info("      %s", _format_measures(values))
        parity.check(name, values, component.dtype)
        activations = alive_bytes(self.folder / graph_name(name), self.manifest)
        return replace(component, parity=values, activations=activations)

    def _build_lora_graph(
        self, recipe: Recipe, cases: list[Case], dtype: str
    ) -> dict[str, Component]:
        """Build and validate the graph whose rows have LoRA factors; none where nothing has them.
        Zeros are as none.
        """
        if not self.lora_rank or recipe.name not in LORA_PARTS:
            return {}
        component = write_lora_graph(self.folder / recipe.name, self.lora_rank, dtype)
        if component is None:
            return {}
        case, name = self.reference.lora_cases[recipe.name], LORA_PARTS[recipe.name]
        feeds = case.feeds(component.weights)
        off = replace(cases[0], inputs={**cases[0].inputs, LORA_FACTORS: 0 * feeds[LORA_FACTORS]})
        log.info("      with LoRA factors:")
        component = self._validate(name, recipe, component, [off, Case(feeds, case.outputs)])
        factors = component.inputs[-1]
        size = int(factors.shape[1]) * np.dtype(factors.dtype).itemsize
        return {name: replace(component, activations=component.activations + size)}

    def _add_float32_graph(self, recipe: Recipe, cases: list[Case], component: Component) -> None:
        """Add and validate a graph for images that overflow half precision."""
        write_float32_graph(self.folder / recipe.name)
        values = self._compare(recipe.name, recipe, component, cases, FLOAT32_GRAPH)
        log.info("      in float32: %s", _format_measures(values))
        parity.check(f"{recipe.name} in float32", values, "float16")

    def _add_embeddings_graph(
        self, recipe: Recipe, cases: list[Case], component: Component
    ) -> None:
        """Add and validate a text encoder's graph for words that its vocabulary does not have."""
        folder, component = self.folder / recipe.name, embeddings_component(component)
        write_embeddings_graph(folder, component.inputs[-1])
        _, table = read_table(folder)
        cases = [
            replace(case, inputs={**case.inputs, TOKEN_EMBEDDINGS: table[case.inputs["input_ids"]]})
            for case in cases
        ]
        values = self._compare(recipe.name, recipe, component, cases, EMBEDDINGS_GRAPH)
        log.info("      from token embeddings: %s", _format_measures(values))
        parity.check(f"{recipe.name} from token embeddings", values, component.dtype)

    def _compare(
        self,
        name: str,
        recipe: Recipe,
        component: Component,
        cases: Sequence[Case],
        graph_file: str = "model.onnx",
    ) -> dict[str, float]:
        manifest = replace(self.manifest, components={name: component})
        assert self.candidate.load is not None
        engine = self.candidate.load(Bundle(self.folder, manifest, graph_file), name)
        measured = []
        for case in cases:
            outputs = engine(case.inputs)
            measured += [
                parity.measure(outputs[key], case.outputs[key], is_image=recipe.is_image)
                for key in recipe.outputs
            ]
        engine.close()
        return parity.worst_case(measured)

    def validate_pipeline(self, manifest: Manifest) -> dict[str, float]:
        """Compare images of the runtime's own sampling loop with torch's; raises ParityError."""
        measured = []
        bundle = Bundle(self.folder, manifest)
        with load_pipeline(bundle, self.candidate, sequential=True) as pipe:
            for size, image in self.reference.images.items():
                measured.append(
                    parity.measure(generate_reference_image(pipe, size), image, is_image=True)
                )
        values = parity.worst_case(measured)
        log.info("end to end: %s", _format_measures(values))
        parity.check("the full pipeline", values, self.dtype)
        return values

    def find_allowed_precisions(self, manifest: Manifest) -> dict[str, float]:
        """The reduced precisions of this machine whose images are close enough to the exact ones,
        with the PSNR in dB.

        Bundles in half precision are mostly for GPUs: their builds wait for smaller images.
        """
        allowed: dict[str, float] = {}
        size = manifest.sizes[0]
        if self.dtype == "float16":
            size = _halve(size, manifest.multiple)
        for candidate in list_backends():
            if (
                candidate.unavailable_reason is None
                and (name := candidate.reduced_precision) is not None
            ):
                exact = self._guided_image(manifest, self.candidate, size)
                release_memory()
                admitted = replace(manifest, admitted={name: 0.0})
                reduced = self._guided_image(admitted, candidate, size)
                psnr = parity.measure(reduced, exact, is_image=True)["psnr"]
                close = psnr >= parity.MIN_IMAGE_PSNR
                log.info("%s: psnr %.1f, %s", name, psnr, "allowed" if close else "too low")
                if close:
                    allowed[name] = round(psnr, 2)
        return allowed

    def _guided_image(self, manifest: Manifest, candidate: Candidate, size: Size) -> np.ndarray:
        """An image with guidance, which amplifies differences of precision."""
        with load_pipeline(Bundle(self.folder, manifest), candidate, sequential=True) as pipe:
            return generate_reference_image(pipe, size, GUIDED_STEPS, guidance_scale=7.5)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    exact = name in FLOAT32_INPUTS or not tensor.is_floating_point()
    return tensor if exact else tensor.to(dtype)


def _halve(size: Size, multiple: int) -> Size:
    """Half of both sides, rounded up to multiples."""
    width, height = (-(-side // (2 * multiple)) * multiple for side in size)
    return width, height


def _with_two_rows(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Repeat single rows: the exporter treats a dimension of length one as static."""
    return {
        name: tensor if len(tensor) > 1 else torch.cat([tensor, tensor])
        for name, tensor in example.items()
    }


def _format_measures(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.6g}" for name, value in values.items())


def release_memory() -> None:
    """Return freed memory to the system, where the allocator would keep it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
