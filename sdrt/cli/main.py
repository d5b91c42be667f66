"""The command line. Standard output carries what a script wants; all talk goes to standard error.

Imports stay inside the commands, so that `sdrt --help` is immediate.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from sdrt.errors import SdrtError

from .arguments import (
    add_bench,
    add_compare,
    add_export_triton,
    add_gc,
    add_logging,
    add_run,
    add_serve,
    add_verify,
)
from .build import add_build, build

EXAMPLES = """examples:
  sdrt build --model shapes
  sdrt run "a red circle on a blue background" --seed 0
  sdrt build --model stable-diffusion-v1-5 --fp16
  sdrt build --bundle stable-diffusion-v1-5 --backend tensorrt-rtx --target sm_89
  sdrt run "a lighthouse at dusk" --steps 30 --num-images 4 --grid --output lighthouse.png
  sdrt run "a (red:1.2) circle" --scheduler "DPM++ 2M Karras" --preview
  sdrt run "a white cross" --image drawing.png --mask mask.png --strength 0.9
  sdrt run --from lighthouse.png --steps 50
  sdrt compare "a red circle on a blue background" --schedulers "Euler,DDIM" --steps 5,20
  sdrt serve --port 7860
  sdrt export-triton --bundle shapes --output repository
  sdrt inspect --json
  sdrt verify --bundle shapes
  sdrt gc --yes
  sdrt doctor

exit codes: 0 done, 1 failed, 2 usage, 3 bundle, 4 checkpoint, 5 backend, 6 parity, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = parser().parse_args(arguments)
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("sdrt").setLevel(logging.WARNING if args.quiet else level)
    command: Callable[[argparse.Namespace], None] = args.command
    try:
        command(_restored(args, arguments) if getattr(args, "source", None) else args)
    except SdrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sdrt: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _restored(args: argparse.Namespace, typed: Sequence[str] | None) -> argparse.Namespace:
    """The arguments as typed over those that an image's text holds."""
    from .infotext import apply_typed, restored_from

    restored = restored_from(args.source)
    return apply_typed(parser(restored.arguments).parse_args(typed), restored)


def _interrupt_again(unraisable: Any) -> None:
    """Ctrl-C that fell into a finaliser, where Python drops it, is sent once more."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def _interrupt_main() -> None:
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:  # a system call of the main thread's ends, too
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def entry() -> int:
    """What the `sdrt` script and `python -m sdrt` call."""
    from sdrt.process_exit import exit_now

    sys.unraisablehook = _interrupt_again
    code = main()
    exit_now(code)
    return code


def parser(for_run: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """for_run: defaults of `sdrt run` instead of its own"""
    from sdrt.version import __version__

    top = argparse.ArgumentParser(
        prog="sdrt",
        description="Stable Diffusion, compiled: build a bundle from a model, run prompts on it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"sdrt {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_build(_command(commands, "build", build, "turn a model into a bundle"))
    run_parser = _command(commands, "run", run, "turn a prompt into a picture")
    add_run(run_parser)
    run_parser.set_defaults(**(for_run or {}))
    add_compare(
        _command(commands, "compare", compare, "draw one prompt with several schedulers and steps")
    )
    schedulers_parser = _command(commands, "schedulers", schedulers, "list the samplers")
    schedulers_parser.add_argument("--json", action="store_true", help="for machines")
    add_bench(_command(commands, "bench", bench, "measure a bundle on every engine here"))
    add_serve(_command(commands, "serve", serve, "answer requests over HTTP"))
    add_export_triton(
        _command(commands, "export-triton", export_triton, "write a model repository for Triton")
    )
    inspect_parser = _command(commands, "inspect", inspect, "show bundles and what is in them")
    inspect_parser.add_argument("--bundle", metavar="NAME|FOLDER", help="only this one")
    inspect_parser.add_argument(
        "--layers", action="store_true", help="what TensorRT makes of attention and normalisation"
    )
    inspect_parser.add_argument("--json", action="store_true", help="for machines")
    add_verify(_command(commands, "verify", verify, "prove a bundle again, on this machine"))
    add_gc(_command(commands, "gc", gc, "show or free what is left over in sdrt's folders"))
    doctor_parser = _command(commands, "doctor", doctor, "show which backends work here, and why")
    doctor_parser.add_argument("--json", action="store_true", help="for machines")
    return top


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(command=function)
    add_logging(made)
    return made


def run(args: argparse.Namespace) -> None:
    """`sdrt run`: prints the path of every picture, or JSON."""
    from .run import run

    run(args)


def compare(args: argparse.Namespace) -> None:
    """`sdrt compare`: prints the path of the sheet, or JSON."""
    from .compare import compare

    compare(args)


def schedulers(args: argparse.Namespace) -> None:
    """`sdrt schedulers`: prints a line for each, or JSON."""
    from .schedulers import schedulers

    schedulers(args)


def bench(args: argparse.Namespace) -> None:
    """`sdrt bench`: prints a table, or JSON."""
    from .bench import bench

    bench(args)


def serve(args: argparse.Namespace) -> None:
    """`sdrt serve`: runs until it is told to end."""
    from .serve import serve

    serve(args)


def export_triton(args: argparse.Namespace) -> None:
    """`sdrt export-triton`: prints the model's folder."""
    from sdrt.serve.triton.export import TritonExport, export_triton

    chosen = {field.name: getattr(args, field.name) for field in fields(TritonExport)}
    print(export_triton(TritonExport(**chosen)))


def inspect(args: argparse.Namespace) -> None:
    """`sdrt inspect`: every bundle, or one, as a table or JSON."""
    from sdrt.bundle import open_bundle
    from sdrt.bundle.store import list_bundles

    from . import inspect as cli_inspect

    folders = [args.bundle] if args.bundle else list_bundles()
    bundles = [open_bundle(folder) for folder in folders] or [open_bundle()]
    described = [cli_inspect.describe(bundle, layers=args.layers) for bundle in bundles]
    print(
        json.dumps(described, indent=2) if args.json else cli_inspect.text_from_bundles(described)
    )


def verify(args: argparse.Namespace) -> None:
    """`sdrt verify`: prints every check, or JSON."""
    from .verify import verify

    verify(args)


def gc(args: argparse.Namespace) -> None:
    """`sdrt gc`: prints what is left over, or JSON."""
    from .gc import collect_garbage

    collect_garbage(args)


def doctor(args: argparse.Namespace) -> None:
    """`sdrt doctor`: the machine, its packages and its backends."""
    from . import doctor as cli_inspect

    found = cli_inspect.diagnose()
    print(json.dumps(found, indent=2) if args.json else cli_inspect.text_from_diagnosis(found))
