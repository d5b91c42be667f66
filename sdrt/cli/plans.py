"""`sdrt build`'s part about compiled plans: what was asked for, and building it."""

import argparse
import logging
from typing import TYPE_CHECKING

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import SHALLOW
from sdrt.errors import BackendError, UsageError

if TYPE_CHECKING:
    from sdrt.engine.gpu import Gpu

log = logging.getLogger("sdrt.build")
KINDS = ("tensorrt", "tensorrt-rtx")


def add_arguments(to: argparse.ArgumentParser) -> None:
    plans = to.add_argument_group("plans, with --backend tensorrt or tensorrt-rtx")
    plans.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="sm_NN",
        help="repeatable; default: the GPU's, or without one every RTX GPU's since Ampere",
    )
    plans.add_argument(
        "--optimization-level", type=int, metavar="0..5", help="3; higher builds longer"
    )
    plans.add_argument(
        "--stream-weights",
        action="store_true",
        help="the UNet's may stay with the host, for run --low-memory",
    )
    plans.add_argument("--workspace", type=int, metavar="MB", help="most scratch memory")


def plan_kind(args: argparse.Namespace) -> str | None:
    """The kind of plans to build: the one asked for, or the one that this machine would run.

    Raises UsageError for what does not fit, before any work.
    """
    from sdrt.engine import select_backend
    from sdrt.engine.tensorrt.plans import select_targets

    if args.backend not in KINDS:
        if args.target or args.bundle:
            given = "--target" if args.target else "--bundle"
            raise UsageError(f"{given} is for plans; type --backend tensorrt-rtx with it")
        chosen = select_backend().backend if args.backend == "auto" else ""
        return chosen if chosen in KINDS else None

    for name, most in (("optimization_level", 5), ("workspace", 1_000_000)):
        if (value := getattr(args, name)) is not None and not 0 <= value <= most:
            raise UsageError(f"--{name.replace('_', '-')} {value}; expected 0 to {most}")
    select_targets(args.backend, _gpu(), tuple(args.target))
    return str(args.backend)


def validation_backend(backend: str) -> str:
    """What the build proves the bundle on: the backend asked for, where it can run."""
    from sdrt.engine import select_backend

    if backend not in KINDS:
        return backend
    try:
        return select_backend(backend).backend
    except BackendError:
        return "auto"


def build_plans(bundle: Bundle, kind: str, args: argparse.Namespace) -> None:
    """Build the plan of every component that has none that fits. Where nobody asked for them the
    bundle is good without: what went wrong is a warning.
    """
    try:
        _build(bundle, kind, args)
    except BackendError as error:
        if args.backend == kind:
            raise
        log.warning("no plans of %s: %s", kind, error)


def _build(bundle: Bundle, kind: str, args: argparse.Namespace) -> None:
    from sdrt.engine.tensorrt.plans import PlanOptions, get_plan

    workspace = None if args.workspace is None else args.workspace * 1_000_000
    options = PlanOptions(
        tuple(args.target), args.optimization_level, workspace, args.stream_weights
    )
    # Runs of plans do not reuse features.
    graphs = [(bundle, name) for name in bundle.manifest.components if name != SHALLOW]
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
