"""Arguments of the commands, a file for each group of them.

An argument of `sdrt run` whose `dest` is a field of `GenerationOptions` becomes that option: adding
one takes a single `add_argument` in the group that it belongs to. Its `type` may raise UsageError.

Knows argparse; what is slow to import is imported by who needs it, so that `sdrt --help` is
immediate.
"""

from .bundle_tools import add_bench, add_gc, add_inspect, add_name, add_verify
from .common import BACKENDS, add_json, add_logging, integer
from .generation import add_compare, add_run
from .served_models import sources_from_arguments
from .serving import (
    add_export_triton,
    add_serve,
    settings_from_arguments,
)

__all__ = [
    "BACKENDS",
    "add_bench",
    "add_compare",
    "add_export_triton",
    "add_gc",
    "add_inspect",
    "add_json",
    "add_logging",
    "add_name",
    "add_run",
    "add_serve",
    "add_verify",
    "integer",
    "settings_from_arguments",
    "sources_from_arguments",
]
