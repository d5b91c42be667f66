"""`sdrt serve`: starts a server from parsed arguments. Imported only when the command runs."""

import argparse

from sdrt.errors import SdrtError

from .arguments import settings_from_arguments, sources_from_arguments


def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UsageError, BundleError, BackendError: Invalid arguments, or a model failed to load.
    """
    try:
        from sdrt.serve.logs import configure_logging
        from sdrt.serve.server import serve
    except ImportError as error:
        raise SdrtError(
            f"`sdrt serve` requires {error.name}, which is not installed",
            hint="run `pip install 'sdrt[serve]'`",
        ) from error
    configure_logging(args.log_format)
    if args.ray:
        from sdrt.serve.ray.app import serve_on_ray

        serve_on_ray(args)
        return
    settings = settings_from_arguments(args)
    serve(sources_from_arguments(args), settings)
