"""`sdrt serve --ray`: a Ray Serve application from the arguments of `sdrt serve`.

    sdrt serve --ray --bundle NAME --replicas 1:4       in the foreground
    serve run sdrt.serve.ray.app:app bundle=NAME replicas=1:4   with Ray's own command

Deploying again under the same name replaces the replicas one by one, each after draining. Bundles
are opened where the replicas run, so every machine needs them under the same path.
"""

import argparse
import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from sdrt.cli.arguments import (
    add_logging,
    add_serve,
    settings_from_arguments,
    sources_from_arguments,
)
from sdrt.errors import BackendError, SdrtError, UsageError

if TYPE_CHECKING:
    from ray.serve import Application

    from sdrt.serve.model_manager import ModelSource
    from sdrt.serve.settings import Settings

log = logging.getLogger("sdrt.serve")

NAME = "sdrt"
SHUTDOWN_SECONDS = 10.0  # for Ray, in addition to draining


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Options of the replica deployment.

    Attributes:
        replicas: Minimum and maximum; Ray scales between them by ongoing requests.
        max_models: Models loaded at a time in one replica.
        gpus: GPUs of one replica; None: one if the cluster has any.
    """

    replicas: tuple[int, int]
    max_models: int
    gpus: float | None


def app(options: Mapping[str, Any]) -> "Application":
    """The application builder for `serve run` and `serve deploy`.

    Args:
        options: Those of `sdrt serve` by name, such as
            `{"bundle": ["a", "b"], "replicas": "1:4", "no_keys": True}`.

    Raises:
        UsageError: An option is unknown or invalid.
    """
    arguments = ["--ray", *_command_line(options)]
    try:
        args = _build_parser().parse_args(arguments)
    except SystemExit:
        raise UsageError(
            f"invalid options: {' '.join(['serve', *arguments])}", hint="run `sdrt serve --help`"
        ) from None
    return application_from_arguments(args)


def _build_parser() -> argparse.ArgumentParser:
    """A parser of the options of `sdrt serve`."""
    parser = argparse.ArgumentParser(prog="sdrt serve")
    add_serve(parser)
    add_logging(parser)
    return parser


def _command_line(options: Mapping[str, Any]) -> Sequence[str]:
    """The command line for options by name."""
    arguments = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True or value == "true":
            arguments.append(flag)
        elif value is not False and value not in ("false", None):
            arguments += [
                f"{flag}={item}" for item in (value if isinstance(value, list) else [value])
            ]
    return arguments


def application_from_arguments(args: argparse.Namespace) -> "Application":
    """The application for parsed arguments; raises UsageError or BundleError."""
    settings, sources = settings_from_arguments(args), sources_from_arguments(args)
    options = RayOptions(
        replicas=_parse_replicas(args.replicas),
        max_models=_check_max_models(args.models_per_replica, len(sources)),
        gpus=args.gpus_per_replica,
    )
    return build_application(sources, settings, options)


def build_application(
    sources: "Mapping[str, ModelSource]", settings: "Settings", options: RayOptions
) -> "Application":
    """An ingress in front of replicas; a Serve configuration file can override every option."""
    from ray.serve import deployment
    from ray.serve.config import RequestRouterConfig

    from .ingress import Ingress
    from .lora_affinity import switches_weights
    from .replica import Replica
    from .router import LoraRouter

    min_replicas, max_replicas = options.replicas
    capacity = settings.slots + settings.waiting
    replicas = deployment(
        name="Replica",
        autoscaling_config={
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": settings.slots,
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 300.0,
        },
        max_ongoing_requests=capacity,  # beyond it the engine rejects requests itself
        max_queued_requests=capacity,
        graceful_shutdown_timeout_s=settings.drain_seconds + SHUTDOWN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        request_router_config=RequestRouterConfig(
            request_router_class=LoraRouter, request_router_kwargs={"slots": settings.slots}
        ),
        ray_actor_options={"num_gpus": _replica_gpus(options.gpus)},
    )(Replica).bind(sources, settings, options.max_models)
    ingress = deployment(
        name="Front",
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=settings.drain_seconds + SHUTDOWN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )(Ingress)
    switching = [name for name, source in sources.items() if switches_weights(source.manifest)]
    return ingress.bind(replicas, list(sources), settings, switching)


def _replica_gpus(requested: float | None) -> float:
    import ray

    if requested is not None or not ray.is_initialized():
        return requested or 0.0
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0


def _parse_replicas(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if low.isdecimal() and (high or low).isdecimal():
        replicas = int(low), int(high or low)
        if 1 <= replicas[0] <= replicas[1] <= 10_000:
            return replicas
    raise UsageError(f"--replicas {text!r}; expected N or MIN:MAX from 1 to 10000, for example 1:4")


def _check_max_models(requested: int | None, default: int) -> int:
    if requested is not None and requested < 1:
        raise UsageError(f"--models-per-replica {requested}; expected at least 1")
    return requested or default


def serve_on_ray(args: argparse.Namespace) -> None:
    """Serve on the cluster at `RAY_ADDRESS`, or on a local one, until SIGTERM or SIGINT, then
    drain.

    Raises:
        UsageError, BundleError: Invalid arguments or bundles.
        BackendError: Ray Serve could not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise SdrtError(
            f"--ray requires {error.name}, which is not installed",
            hint="run `pip install 'sdrt[ray]'`",
        ) from error
    settings_from_arguments(args)  # fail before Ray starts
    if not args.verbose:
        logging.getLogger("ray").setLevel(logging.WARNING)
    ray.init(log_to_driver=args.verbose, logging_level=logging.WARNING)
    try:
        serve.start(http_options={"host": args.host, "port": args.port})
        try:
            serve.run(application_from_arguments(args), name=NAME)
        except RuntimeError as error:  # raised by Ray if the replicas fail to start
            raise BackendError(f"Ray Serve could not start: {error}") from error
        stop = _shutdown_event()  # after Ray has installed its own handlers
        log.info("Listening on http://%s:%d", args.host, args.port)
        stop.wait()
        log.info("Shutting down; draining requests for up to %g s", args.drain)
        serve.delete(NAME)
    finally:
        ray.shutdown()


def _shutdown_event() -> threading.Event:
    """Set by the first SIGTERM or SIGINT; a second one terminates the process at once."""
    stop = threading.Event()

    def on_signal(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop
