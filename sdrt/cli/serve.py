"""`sdrt serve`: from arguments to a running server. Imported by the command line when it runs."""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from sdrt import load
from sdrt.bundle import open_bundle
from sdrt.errors import SdrtError, UsageError

if TYPE_CHECKING:
    from sdrt.serve.model_manager import Source
    from sdrt.serve.settings import Settings


def serve(args: argparse.Namespace) -> None:
    """Serve until told to end; raises UsageError, BundleError or BackendError before it listens or
    while it loads.
    """
    try:
        from sdrt.serve.server import serve
    except ImportError as error:
        raise SdrtError(
            f"serving needs {error.name}, which is not installed; pip install 'sdrt[serve]'"
        ) from error
    if args.ray:
        from sdrt.serve.ray.app import serve_fleet

        serve_fleet(args)
        return
    settings = settings_from_arguments(args)
    serve(sources_from_arguments(args), settings)


def sources_from_arguments(args: argparse.Namespace) -> "dict[str, Source]":
    """The bundles of a command line by name; raises BundleError or UsageError."""
    from sdrt.serve.model_manager import Source

    precision = "exact" if args.exact else "auto"
    sources = {}
    for name in args.bundle or [None]:
        bundle = open_bundle(name)
        if bundle.manifest.name in sources:
            raise UsageError(f"two bundles are called {bundle.manifest.name}; serve one of them")
        one = partial(load, bundle.folder, backend=args.backend, precision=precision)
        sources[bundle.manifest.name] = Source(one, bundle.folder / "plans")
    return sources


def settings_from_arguments(args: argparse.Namespace) -> "Settings":
    """What a command line asks for; raises UsageError for what would let everyone in unasked."""
    from sdrt.serve.settings import LOCAL_NAMES, Settings, is_loopback, keys_from_file

    local = is_loopback(args.host)
    if not 0 <= args.port <= 65535:
        raise UsageError(f"port {args.port}; expected 0 to 65535")
    if not 0.0 <= args.drain <= 86_400.0:
        raise UsageError(f"--drain {args.drain:g}; expected 0 to 86400 seconds")
    if not (local or args.keys or args.no_keys):
        raise UsageError(
            f"{args.host} can be reached from other machines; give --keys FILE, one key a line, "
            "or say --no-keys"
        )
    named = tuple(name.lower() for name in args.allow_host)
    return Settings(
        host=args.host,
        port=args.port,
        keys=keys_from_file(args.keys) if args.keys else None,
        hosts=(*LOCAL_NAMES, *named) if local or named else None,
        slots=args.slots,
        waiting=args.waiting,
        deterministic=args.deterministic,
        drain=args.drain,
        log_prompts=args.log_prompts,
    )
