"""`sdrt serve`: from arguments to a running server. Imported by the command line when it runs."""

import argparse

from sdrt.errors import SdrtError

from .arguments import settings_from_arguments, sources_from_arguments


def serve(args: argparse.Namespace) -> None:
    """Serve until told to end; raises UsageError, BundleError or BackendError before it listens or
    while it loads.
    """
    try:
        from sdrt.serve.logs import configure_logging
        from sdrt.serve.server import serve
    except ImportError as error:
        raise SdrtError(
            f"serving needs {error.name}, which is not installed; pip install 'sdrt[serve]'"
        ) from error
    configure_logging(args.log_format)
    if args.ray:
        from sdrt.serve.ray.app import serve_on_ray

        serve_on_ray(args)
        return
    settings = settings_from_arguments(args)
    serve(sources_from_arguments(args), settings)
