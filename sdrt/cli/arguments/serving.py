"""Arguments of the servers, and their settings."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.errors import UsageError

from .common import (
    BACKENDS,
    add_bundle,
    add_embedding,
    add_static_size,
    integer,
    memory_size,
    number,
)

MAX_QUEUE = 10_000  # images

if TYPE_CHECKING:
    from sdrt.serve.settings import Settings
    from sdrt.serve.webhook import WebhookSettings


def add_serve(to: argparse.ArgumentParser) -> None:
    """Add the arguments of `sdrt serve`."""
    to.add_argument(
        "--bundle",
        action="append",
        default=[],
        metavar="NAME|FOLDER",
        help="bundle to serve; repeatable, the first is the default model (default: that of "
        "`sdrt use`, or the only one)",
    )
    to.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1)",
    )
    to.add_argument(
        "--port", type=integer, default=7860, metavar="N", help="port to listen on (default: 7860)"
    )
    to.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="inference backend (default: auto)"
    )
    to.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="NAME|FOLDER",
        help="ControlNet or T2I-Adapter that requests may use, for the bundles that it fits; "
        "repeatable",
    )
    to.add_argument(
        "--ip-adapter",
        metavar="NAME|FOLDER",
        help="IP-Adapter that requests may use, for the bundles that it fits",
    )
    to.add_argument(
        "--refiner",
        metavar="NAME|FOLDER",
        help="refiner that requests may use, for the bundles that it fits",
    )
    add_embedding(to)
    to.add_argument(
        "--exact", action="store_true", help="never use a lower precision than the bundle's"
    )
    add_static_size(to)
    to.add_argument(
        "--slots", type=integer, default=16, metavar="N", help="max concurrent images (default: 16)"
    )
    to.add_argument(
        "--waiting", type=integer, default=64, metavar="N", help="max queued images (default: 64)"
    )
    to.add_argument(
        "--deterministic",
        action="store_true",
        help="bitwise-reproducible results regardless of batching, on GPUs too",
    )
    to.add_argument(
        "--drain",
        type=number,
        default=30.0,
        metavar="SECONDS",
        help="graceful shutdown timeout (default: 30)",
    )
    to.add_argument(
        "--max-size",
        metavar="WxH",
        help="most pixels of an image (default: twice the sides of a bundle's largest size)",
    )
    to.add_argument(
        "--jobs",
        type=Path,
        metavar="FOLDER",
        help="store the jobs of /v1/jobs here, with their images (default: there are no jobs)",
    )
    to.add_argument(
        "--keep-jobs",
        type=number,
        default=24.0,
        metavar="HOURS",
        help="how long a job stays after it has ended (default: 24)",
    )
    to.add_argument(
        "--max-jobs-size",
        type=number,
        default=16.0,
        metavar="GIB",
        help="of the images of all jobs; the oldest jobs are removed for new ones (default: 16)",
    )
    to.add_argument(
        "--results",
        metavar="s3://BUCKET/PREFIX",
        help="store the images of jobs in a bucket (default: in the folder of --jobs)",
    )
    to.add_argument(
        "--gallery",
        type=Path,
        metavar="FOLDER",
        help="store all generated images here, by day (default: nothing is stored)",
    )
    to.add_argument(
        "--gallery-size",
        type=number,
        default=10.0,
        metavar="GIB",
        help="remove the gallery's oldest images beyond this size (default: 10)",
    )
    _add_webhooks(to)
    to.add_argument(
        "--otel",
        action="store_true",
        help="send traces to an OpenTelemetry collector, by the OTEL_… variables",
    )
    _add_model_memory(to)
    to.add_argument("--log-prompts", action="store_true", help="log prompts")
    to.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of log lines (default: text)",
    )
    _add_access_control(to)
    _add_ray(to)


def _add_webhooks(to: argparse.ArgumentParser) -> None:
    webhooks = to.add_argument_group("webhooks")
    webhooks.add_argument(
        "--webhook-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="scheme and host, such as https://hooks.example.org, that jobs may be announced to; "
        "repeatable (default: there are no webhooks)",
    )
    webhooks.add_argument(
        "--webhook-secret",
        type=Path,
        metavar="FILE",
        help="secrets that sign webhooks, whsec_…, one per line (default: $SDRT_WEBHOOK_SECRET)",
    )
    webhooks.add_argument(
        "--webhook-private",
        action="store_true",
        help="allow receivers in private networks and on this machine",
    )


def _add_model_memory(to: argparse.ArgumentParser) -> None:
    memory = to.add_argument_group("memory of several models")
    memory.add_argument(
        "--memory-budget",
        type=memory_size,
        metavar="SIZE",
        help="such as 8GB: load models on first use and evict the least recently used ones, so "
        "that the loaded ones need no more (default: all are loaded at start and stay)",
    )
    memory.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="NAME",
        help="load this model at start and never evict it; repeatable",
    )
    memory.add_argument(
        "--load-timeout",
        type=number,
        default=300.0,
        metavar="SECONDS",
        help="how long a request waits until its model is loaded (default: 300)",
    )


def _add_access_control(to: argparse.ArgumentParser) -> None:
    access = to.add_argument_group("access control")
    keys = access.add_mutually_exclusive_group()
    keys.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="API keys, one per line, plain or sha256:HEX; or FILE.toml, with names and limits",
    )
    keys.add_argument(
        "--no-keys", action="store_true", help="allow unauthenticated access from other machines"
    )
    access.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="additional host name of this server; repeatable",
    )


def _add_ray(to: argparse.ArgumentParser) -> None:
    ray = to.add_argument_group("Ray Serve")
    ray.add_argument("--ray", action="store_true", help="run the engines as Ray Serve replicas")
    ray.add_argument(
        "--replicas",
        default="1",
        metavar="N|MIN:MAX",
        help="number of replicas, or a range to autoscale by ongoing requests (default: 1)",
    )
    ray.add_argument(
        "--models-per-replica",
        type=integer,
        metavar="N",
        help="models loaded at a time in one replica (default: all)",
    )
    ray.add_argument(
        "--gpus-per-replica",
        type=number,
        metavar="N",
        help="GPUs of one replica (default: 1 if the cluster has GPUs, else 0)",
    )


def add_export_triton(to: argparse.ArgumentParser) -> None:
    """Add the arguments of `sdrt export-triton`."""
    add_bundle(to)
    to.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="the model repository"
    )
    to.add_argument("--name", help="name of the model (default: that of the bundle)")
    to.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="inference backend (default: auto)"
    )
    to.add_argument(
        "--instances",
        type=integer,
        default=1,
        metavar="N",
        help="instances on each GPU, or in all on the CPU (default: 1)",
    )
    to.add_argument(
        "--slots",
        type=integer,
        default=16,
        metavar="N",
        help="max concurrent images of an instance (default: 16)",
    )
    to.add_argument(
        "--waiting",
        type=integer,
        default=64,
        metavar="N",
        help="max queued images of an instance (default: 64)",
    )
    to.add_argument("--force", action="store_true", help="replace an existing model")


def _check_numbers_and_pairs(args: argparse.Namespace) -> None:
    """Raise UsageError for a number out of range, and for options that exclude or need others."""
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port {args.port}; expected 0 to 65535")
    for name in ("slots", "waiting"):
        if not 1 <= getattr(args, name) <= MAX_QUEUE:
            raise UsageError(f"--{name} {getattr(args, name)}; expected 1 to {MAX_QUEUE}")
    if not 0.0 <= args.drain <= 86_400.0:
        raise UsageError(f"--drain {args.drain:g}; expected 0 to 86400 seconds")
    if not 0.0 < args.keep_jobs <= 87_600.0:
        raise UsageError(f"--keep-jobs {args.keep_jobs:g}; expected up to 87600 hours")
    if not 0.0 < args.max_jobs_size <= 1_048_576.0:
        raise UsageError(f"--max-jobs-size {args.max_jobs_size:g}; expected up to 1048576 GiB")
    if not 0.0 < args.load_timeout <= 86_400.0:
        raise UsageError(f"--load-timeout {args.load_timeout:g}; expected up to 86400 seconds")
    if args.ray and args.memory_budget:
        raise UsageError(
            "--memory-budget with --ray is unsupported", hint="pass --models-per-replica"
        )
    if args.pin and not args.memory_budget:
        raise UsageError("--pin requires --memory-budget", hint="without it all models stay loaded")
    for name in ("results", "webhook_origin"):
        if getattr(args, name) and not args.jobs:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} requires --jobs", hint="pass a folder with --jobs FOLDER")
    if not 0.0 < args.gallery_size <= 1_048_576.0:
        raise UsageError(f"--gallery-size {args.gallery_size:g}; expected up to 1048576 GiB")
    for name in ("jobs", "gallery", "otel"):
        if args.ray and getattr(args, name):
            raise UsageError(f"--{name} with --ray is unsupported", hint="leave one of them out")


def settings_from_arguments(args: argparse.Namespace) -> "Settings":
    """The server's settings; raises UsageError for invalid ones, and for open access by default."""
    from sdrt.bundle import parse_size
    from sdrt.serve.api_keys import KeyLimits, read_api_keys
    from sdrt.serve.settings import LOCAL_HOSTS, Settings, is_loopback
    from sdrt.serve.tracing import Tracing, open_tracing

    local = is_loopback(args.host)
    _check_numbers_and_pairs(args)
    if not (local or args.keys or args.no_keys):
        raise UsageError(
            f"--host {args.host} is reachable from other machines; choose who has access",
            hint="pass --keys FILE (one API key per line), or --no-keys to allow everyone",
        )
    named = tuple(name.lower() for name in args.allow_host)
    keys = read_api_keys(args.keys) if args.keys else None
    if args.ray and any(key.limits != KeyLimits() for key in keys or ()):
        raise UsageError(
            f"limits of API keys with --ray are unsupported; {args.keys} has some",
            hint="replicas do not share their counts; limit requests in a proxy",
        )
    return Settings(
        host=args.host,
        port=args.port,
        keys=keys,
        hosts=(*LOCAL_HOSTS, *named) if local or named else None,
        slots=args.slots,
        waiting=args.waiting,
        max_size=parse_size(args.max_size) if args.max_size else None,
        deterministic=args.deterministic,
        drain_seconds=args.drain,
        memory_budget=args.memory_budget,
        pinned_models=tuple(dict.fromkeys(args.pin)),
        load_timeout_seconds=args.load_timeout,
        jobs_folder=args.jobs,
        keep_jobs_seconds=3600.0 * args.keep_jobs,
        max_jobs_bytes=round(args.max_jobs_size * 2**30),
        results_url=args.results,
        webhooks=_webhook_settings(args),
        gallery_folder=args.gallery,
        gallery_bytes=round(args.gallery_size * 2**30),
        tracing=open_tracing() if args.otel else Tracing(),
        log_prompts=args.log_prompts,
    )


def _webhook_settings(args: argparse.Namespace) -> "WebhookSettings | None":
    """Raises UsageError for invalid origins and secrets."""
    from sdrt.serve.webhook import WebhookSettings, parse_origin, read_secrets

    if not args.webhook_origin:
        return None
    origins = tuple(map(parse_origin, args.webhook_origin))
    return WebhookSettings(origins, read_secrets(args.webhook_secret), args.webhook_private)
