"""Compiled plans in `sdrt build`: which kind to build, and building them."""

import argparse
import logging
from typing import TYPE_CHECKING

from sdrt.errors import BackendError, UsageError

if TYPE_CHECKING:
    from sdrt.bundle import Bundle
    from sdrt.engine.gpu import Gpu

log = logging.getLogger("sdrt.build")
KINDS = ("tensorrt", "tensorrt-rtx")


def add_arguments(to: argparse.ArgumentParser) -> None:
    plans = to.add_argument_group("Plans, with --backend tensorrt or tensorrt-rtx")
    plans.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="sm_NN",
        help="GPU architecture, repeatable (default: this machine's, or without a GPU every "
        "RTX generation since Ampere)",
    )
    plans.add_argument(
        "--optimization-level", type=int, metavar="0..5", help="higher builds longer (default: 3)"
    )
    plans.add_argument(
        "--stream-weights",
        action="store_true",
        help="allow the UNet's weights to stay in host memory, for `sdrt run --low-memory`",
    )
    plans.add_argument(
        "--switch-lora",
        action="store_true",
        help="let LoRA files be applied without a rebuild (`sdrt run --lora`, `pipe.set_lora`), "
        "for the GPU at hand; such plans may run slower (default: as the bundle's plans are, else "
        "off)",
    )
    plans.add_argument(
        "--workspace", type=int, metavar="MB", help="maximum scratch memory (default: no limit)"
    )


def plan_kind(args: argparse.Namespace) -> str | None:
    """The kind of plans to build: the one asked for, or the one that this machine would run.

    Raises UsageError for what does not fit, before any work.
    """
    from sdrt.engine import select_backend
    from sdrt.engine.tensorrt.plans import check_switchable, select_targets

    if args.backend not in KINDS:
        for name in ("target", "switch_lora", "bundle"):
            if getattr(args, name):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} requires --backend tensorrt or tensorrt-rtx")
        chosen = select_backend().backend if args.backend == "auto" else ""
        return chosen if chosen in KINDS else None

    for name, limit in (("optimization_level", 5), ("workspace", 1_000_000)):
        if (value := getattr(args, name)) is not None and not 0 <= value <= limit:
            raise UsageError(f"--{name.replace('_', '-')} {value}; expected 0 to {limit}")
    select_targets(args.backend, _gpu(), tuple(args.target))
    if args.switch_lora:
        check_switchable(_gpu(), tuple(args.target))
        if args.stream_weights:
            raise UsageError("--switch-lora and --stream-weights exclude each other")
    return str(args.backend)


def validation_backend(backend: str) -> str:
    """The backend that validates the bundle: the one asked for, where it can run."""
    from sdrt.engine import select_backend

    if backend not in KINDS:
        return backend
    try:
        return select_backend(backend).backend
    except BackendError:
        return "auto"


def build_plans(bundle: "Bundle", kind: str, args: argparse.Namespace) -> None:
    """Build the plan of every component that has none that fits. Where nobody asked for them the
    bundle is good without: what went wrong is a warning.
    """
    try:
        _build(bundle, kind, args)
    except BackendError as error:
        if args.backend == kind:
            raise
        log.warning("No plans were built for %s: %s", kind, error)


def _build(bundle: "Bundle", kind: str, args: argparse.Namespace) -> None:
    from sdrt.bundle.manifest import CONTROL, SHALLOW
    from sdrt.engine.tensorrt.plans import PlanOptions, get_plan

    workspace = None if args.workspace is None else args.workspace * 1_000_000
    options = PlanOptions(
        tuple(args.target),
        args.optimization_level,
        workspace,
        args.stream_weights,
        args.switch_lora or None,
    )
    # Runs of plans do not reuse features; the plan with residuals is built where it is needed.
    absent = (SHALLOW, CONTROL)
    graphs = [(bundle, name) for name in bundle.manifest.components if name not in absent]
    if exact := bundle.in_float32("vae_decoder"):
        graphs.append((exact, "vae_decoder"))
    plans = [get_plan(of, name, kind, _gpu(), options) for of, name in graphs]
    log.info(
        "%d plans for %s, %.0f MB, in %s",
        len(plans),
        ", ".join(plans[0].key.targets),
        sum(plan.size for plan in plans) / 1e6,
        plans[0].path.parent,
    )


def _gpu() -> "Gpu | None":
    from sdrt.engine.gpu import detect_gpus

    return next(iter(detect_gpus().gpus), None)
