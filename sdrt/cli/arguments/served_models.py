"""The models of a server's command line."""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from sdrt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdrt.bundle import Bundle
    from sdrt.runtime import Pipeline
    from sdrt.serve.model_manager import ModelSource


def sources_from_arguments(args: argparse.Namespace) -> "dict[str, ModelSource]":
    """The bundles of a command line by name; raises BundleError or UsageError."""
    from sdrt import load
    from sdrt.bundle import open_bundle

    precision = "exact" if args.exact else "auto"
    bundles = [open_bundle(name) for name in args.bundle or [None]]
    if args.static_size is not None:
        _check_static_size(args.static_size, args.backend, bundles)
    nets = _assign_nets(bundles, [open_bundle(name) for name in args.controlnet])
    adapters = _assign_nets(bundles, [open_bundle(args.ip_adapter)] if args.ip_adapter else [])
    refiners = _assign_refiner(bundles, open_bundle(args.refiner) if args.refiner else None)
    sources: dict[str, ModelSource] = {}
    for bundle, own_nets, own_adapters, refiner in zip(
        bundles, nets, adapters, refiners, strict=True
    ):
        if bundle.manifest.name in sources:
            raise UsageError(
                f"two bundles have the name {bundle.manifest.name}", hint="serve only one of them"
            )
        one = partial(
            load,
            bundle.folder,
            backend=args.backend,
            precision=precision,
            static_size=args.static_size,
            controlnet=[net.folder for net in own_nets],
            ip_adapter=next((adapter.folder for adapter in own_adapters), None),
            refiner=refiner.folder if refiner else None,
            embeddings=args.embedding,
        )
        sources[bundle.manifest.name] = _build_source(one, bundle, own_nets, own_adapters, refiner)
    return sources


def _check_static_size(static_size: str, backend: str, bundles: "Sequence[Bundle]") -> None:
    """Raise now the UsageError that loading would raise, possibly only at the first request."""
    from sdrt.bundle import parse_size
    from sdrt.engine import LoadOptions
    from sdrt.engine.selection import check_load_options
    from sdrt.runtime.job import check_output_size
    from sdrt.runtime.parsing import parse_size_option

    size = parse_size(parse_size_option("static_size", static_size))
    check_load_options(backend, LoadOptions(static_size=size))
    for bundle in bundles:
        check_output_size(bundle.manifest, size, "static_size")


def _build_source(
    load: "Callable[[], Pipeline]",
    bundle: "Bundle",
    nets: "Sequence[Bundle]",
    adapters: "Sequence[Bundle]",
    refiner: "Bundle | None",
) -> "ModelSource":
    """A model with what is known of it before it is loaded."""
    from sdrt.engine.memory_budget import compute_full_budget
    from sdrt.serve.model_manager import ModelSource

    return ModelSource(
        load,
        bundle.folder / "plans",
        bundle.manifest,
        compute_full_budget(bundle, (*nets, *adapters), refiner).total,
        tuple(net.manifest.name for net in nets),
        next((adapter.manifest.name for adapter in adapters), None),
        refiner.manifest.name if refiner else None,
    )


def _assign_nets(bundles: "Sequence[Bundle]", nets: "Sequence[Bundle]") -> "list[list[Bundle]]":
    """The nets that fit each bundle; raises UsageError for a net that fits none."""
    from sdrt.runtime.loading import unloaded_pipeline

    fitting: list[list[Bundle]] = [[] for _ in bundles]
    for net in nets:
        reasons = []
        for bundle, own in zip(bundles, fitting, strict=True):
            try:
                unloaded_pipeline(bundle, [net])
                own.append(net)
            except UsageError as error:
                reasons.append(error)
        if len(reasons) == len(bundles):
            raise reasons[0]
    return fitting


def _assign_refiner(bundles: "Sequence[Bundle]", refiner: "Bundle | None") -> "list[Bundle | None]":
    """The refiner for each bundle that it can follow; raises UsageError if it can follow none."""
    from sdrt.runtime.refiner import check_refiner_fit

    if refiner is None:
        return [None] * len(bundles)
    fitting: list[Bundle | None] = []
    reasons = []
    for bundle in bundles:
        try:
            check_refiner_fit(bundle.manifest, refiner.manifest)
            fitting.append(refiner)
        except UsageError as error:
            fitting.append(None)
            reasons.append(error)
    if len(reasons) == len(bundles):
        raise reasons[0]
    return fitting
