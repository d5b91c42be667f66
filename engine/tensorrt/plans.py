"""The plans of a bundle: which TensorRT serves which GPU, and building what is missing.

Knows the kinds of TensorRT, their GPUs and packages; TensorRT itself only where a plan is built.
"""

import contextlib
import hashlib
from dataclasses import dataclass, replace
from functools import partial

from sdrt.bundle import Bundle
from sdrt.bundle.bundle import weights_name
from sdrt.bundle.graph_weights import read_graph_weights
from sdrt.engine.gpu import Gpu
from sdrt.engine.plans import (
    BuildSettings,
    Plan,
    PlanKey,
    get_or_build_plan,
    plan_from_json,
    plan_key,
    plans_folder,
)
from sdrt.errors import BackendError, UsageError

from .builder import build_plan, rewrite_graph
from .refitting import LORA_COMPONENTS
from .variants import FULL, PORTABLE, RTX, RTX_TARGETS, load_module

LEVEL = 3


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How plans are built.

    targets: compute capabilities; empty for the GPU at hand, or without one for `PORTABLE`
    level: builder optimisation, 0 to 5. workspace: bytes of scratch memory, 0 for unlimited.
        None takes a plan of any, and builds one of the default.
    streamed: the UNet's weights may stay with the host
    switch_lora: whether LoRA files can be applied to the plans. None: where the bundle has such
        plans already.
    """

    targets: tuple[str, ...] = ()
    level: int | None = None
    workspace: int | None = None
    streamed: bool = False
    switch_lora: bool | None = None


def required_key(
    bundle: Bundle, component: str, kind: str, gpu: Gpu | None, options: PlanOptions
) -> PlanKey:
    """The key of the plan to use or build; gpu: the one at hand, if any.

    Raises BackendError where the kind cannot build, UsageError for a target that it lacks.
    """
    streamed = options.streamed and component == "unet"
    trt = load_module(kind)
    refittable = "" if streamed else _refittable(bundle, component, gpu, options)
    settings = BuildSettings(
        kind=kind,
        version=str(trt.__version__),
        targets=select_targets(kind, gpu, options.targets),
        gpu=gpu.name if gpu and (kind == FULL or refittable) else "",
        level=LEVEL if options.level is None else options.level,
        workspace=options.workspace or 0,
        # Filling weights in needs a GPU already when the plan is built.
        stripped=gpu is not None
        and gpu.sm in (options.targets or (gpu.sm,))
        and not (streamed or refittable),
        streamed=streamed,
        user_allocation=kind == RTX and not streamed,  # the two exclude each other
        refittable=refittable,
    )
    key = plan_key(bundle, component, settings)
    content = rewrite_graph(trt, bundle.graph(component))
    return replace(key, graph=hashlib.sha256(content).hexdigest()) if content else key


def _refittable(bundle: Bundle, component: str, gpu: Gpu | None, options: PlanOptions) -> str:
    """The digest of the weights that LoRA files may change in a plan; empty if none."""
    if component not in LORA_COMPONENTS:
        return ""
    if options.switch_lora:
        check_switchable(gpu, options.targets)
    elif not _continues_switchable(bundle, component, gpu, options):
        return ""
    return read_graph_weights(bundle.graph(component)).digest


def _continues_switchable(
    bundle: Bundle, component: str, gpu: Gpu | None, options: PlanOptions
) -> bool:
    """Whether nobody asked, such plans are here, and another can be built."""
    if options.switch_lora is False or gpu is None or {*options.targets} - {gpu.sm}:
        return False
    return has_refittable_plan(bundle, component)


def has_refittable_plan(bundle: Bundle, component: str) -> bool:
    """Whether LoRA files can be applied to a plan of this user over a component's weights, of
    whatever graph, GPU and version.
    """
    record = bundle.manifest.files.get(weights_name(component))
    weights = record.sha256 if record else ""
    for sidecar in sorted(plans_folder(bundle).glob("*/*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            plan = plan_from_json(sidecar)
            if plan.key.refittable and plan.key.weights == weights and plan.is_trusted:
                return True
    return False


def check_switchable(gpu: Gpu | None, targets: tuple[str, ...]) -> None:
    """Raise BackendError where no plan can be built whose weights are replaced later: TensorRT
    prepares them on the GPU, for that GPU.
    """
    if gpu is None:
        raise BackendError(
            "plans to which LoRA files can be applied are built on the GPU that runs them, and "
            "there is none here",
            hint="run the same command there, or merge the files: `sdrt build --model MODEL --lora "
            "FILE`",
        )
    if unserved := [target for target in targets if target != gpu.sm]:
        raise UsageError(
            f"--switch-lora with --target {unserved[0]}: such plans are for the GPU at hand, "
            f"{gpu.name} ({gpu.sm})",
            hint="leave --target out",
        )


def select_targets(kind: str, gpu: Gpu | None, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The compute capabilities to build for; raises as `required_key`."""
    known = RTX_TARGETS if kind == RTX else (gpu.sm,) if gpu else ()
    usual = (gpu.sm,) if gpu else PORTABLE
    if not known:
        raise BackendError(
            "plans of tensorrt are built on the GPU that runs them, and there is none here; "
            "TensorRT for RTX builds anywhere: --backend tensorrt-rtx"
        )
    if unknown := [target for target in asked or usual if target not in known]:
        example = f"sm_{unknown[0]}" if f"sm_{unknown[0]}" in known else known[0]
        raise UsageError(
            f"target is {unknown[0]!r}; {kind} builds here for {', '.join(known)}",
            hint=f"for example --target {example}",
        )
    return tuple(sorted(set(asked or usual), key=known.index))


def get_plan(
    bundle: Bundle, component: str, kind: str, gpu: Gpu | None, options: PlanOptions
) -> Plan:
    """The plan of a component, built where there is none that fits."""
    key = required_key(bundle, component, kind, gpu, options)
    ignored = [name for name in ("level", "workspace") if getattr(options, name) is None]
    build = partial(build_plan, key, bundle.graph(component))
    return get_or_build_plan(plans_folder(bundle), key, build, ignored)
