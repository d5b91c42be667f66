"""`sdrt serve --ray`: the arguments of `sdrt serve` as an application of Ray Serve.

    sdrt serve --ray --bundle NAME --replicas 1:4       in the foreground
    serve run sdrt.serve.ray.app:app bundle=NAME replicas=1:4   by Ray's own commands

A new deployment under the same name replaces the replicas one by one, each once it has answered
what it was asked. Bundles are opened where the replicas run, so every machine needs them under the
same path.
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

from sdrt.cli.arguments import add_serve, add_talk, settings_from_arguments, sources_from_arguments
from sdrt.errors import BackendError, SdrtError, UsageError

if TYPE_CHECKING:
    from ray.serve import Application

    from sdrt.serve.model_manager import Source
    from sdrt.serve.settings import Settings

log = logging.getLogger("sdrt.serve")

NAME = "sdrt"
SHUTDOWN_SECONDS = 10.0  # for Ray, beyond what running requests have


@dataclass(frozen=True, slots=True)
class Fleet:
    """
    replicas: at least and at most; between them by what runs and waits
    most_models: loaded in one replica at a time
    gpus: of one replica; None takes one where the cluster has any
    """

    replicas: tuple[int, int]
    most_models: int
    gpus: float | None


def app(options: Mapping[str, Any]) -> "Application":
    """What `serve run` and `serve deploy` take; options: those of `sdrt serve` by name, such as
    `{"bundle": ["a", "b"], "replicas": "1:4", "no_keys": True}`.
    """
    words = ["--ray", *_words(options)]
    try:
        args = _parser().parse_args(words)
    except SystemExit:
        raise UsageError(
            f"{' '.join(['serve', *words])!r} was not understood; sdrt serve --help"
        ) from None
    return application(args)


def _parser() -> argparse.ArgumentParser:
    """Of the options of `sdrt serve`, with those that every command has."""
    parser = argparse.ArgumentParser(prog="sdrt serve")
    add_serve(parser)
    add_talk(parser)
    return parser


def _words(options: Mapping[str, Any]) -> Sequence[str]:
    """Options by name as a command line has them."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True or value == "true":
            words.append(flag)
        elif value is not False and value not in ("false", None):
            words += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def application(args: argparse.Namespace) -> "Application":
    """Raises UsageError, or BundleError for a bundle that is not here."""
    settings, sources = settings_from_arguments(args), sources_from_arguments(args)
    fleet = Fleet(
        replicas=_range(args.replicas),
        most_models=_positive(args.models_per_replica, len(sources)),
        gpus=args.gpus_per_replica,
    )
    return bound(sources, settings, fleet)


def bound(sources: "Mapping[str, Source]", settings: "Settings", fleet: Fleet) -> "Application":
    """A front before replicas; every option can be set anew in a Serve configuration file."""
    from ray.serve import deployment

    from .ingress import Ingress
    from .replica import Replica

    least, most = fleet.replicas
    work = settings.slots + settings.waiting
    replicas = deployment(
        name="Replica",
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": settings.slots,
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 300.0,
        },
        max_ongoing_requests=work,  # the engine refuses in its own words what is more
        max_queued_requests=work,
        graceful_shutdown_timeout_s=settings.drain + SHUTDOWN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        ray_actor_options={"num_gpus": _gpus(fleet.gpus)},
    )(Replica).bind(sources, settings, fleet.most_models)
    front = deployment(
        name="Front",
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=settings.drain + SHUTDOWN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )(Ingress)
    return front.bind(replicas, list(sources), settings)


def _gpus(asked: float | None) -> float:
    import ray

    if asked is not None or not ray.is_initialized():
        return asked or 0.0
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0


def _range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    if least.isdecimal() and (most or least).isdecimal():
        found = int(least), int(most or least)
        if 1 <= found[0] <= found[1] <= 10_000:
            return found
    raise UsageError(f"--replicas {text!r}; expected N or MIN:MAX from 1 to 10000, such as 1:4")


def _positive(asked: int | None, default: int) -> int:
    if asked is not None and asked < 1:
        raise UsageError(f"--models-per-replica {asked}; expected at least 1")
    return asked or default


def serve_fleet(args: argparse.Namespace) -> None:
    """Serve on the cluster at `RAY_ADDRESS`, or on a Ray of its own, until SIGTERM or SIGINT; what
    runs then ends within `--drain` seconds. Raises UsageError, BundleError, BackendError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise SdrtError(
            f"--ray needs {error.name}, which is not installed; pip install 'sdrt[ray]'"
        ) from error
    settings_from_arguments(args)  # before anything is started
    if not args.verbose:
        logging.getLogger("ray").setLevel(logging.WARNING)
    ray.init(log_to_driver=args.verbose, logging_level=logging.WARNING)
    try:
        serve.start(http_options={"host": args.host, "port": args.port})
        try:
            serve.run(application(args), name=NAME)
        except RuntimeError as error:  # Ray's, when replicas do not come up
            raise BackendError(f"Ray Serve could not start: {error}") from error
        ended = _signalled()  # only now: Ray sets signals of its own
        log.info("listening on http://%s:%d", args.host, args.port)
        ended.wait()
        log.info("ending; what runs has %g s", args.drain)
        serve.delete(NAME)
    finally:
        ray.shutdown()


def _signalled() -> threading.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends at once."""
    ended = threading.Event()

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return ended
