"""The command line: results on standard output, everything else on standard error.

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
from dataclasses import dataclass, fields
from typing import Any

from sdrt.atomic_files import NO_SPACE
from sdrt.errors import SdrtError, StorageError, UsageError

from .arguments import (
    add_bench,
    add_compare,
    add_export_triton,
    add_gc,
    add_inspect,
    add_json,
    add_logging,
    add_name,
    add_run,
    add_serve,
    add_verify,
)
from .build import add_build, build
from .parser import CommandParser, name_flags
from .preprocess import add_preprocess, preprocess
from .terminal import LogFormatter, LogHandler, report_error
from .upscale import add_upscale, upscale

EXAMPLES = """examples:
  sdrt run "a red circle on a blue background" --seed 0
  sdrt build --model stable-diffusion-v1-5 --fp16
  sdrt run "a lighthouse at dusk" --num-images 4 --grid --output lighthouse.png
  sdrt serve --port 7860
  sdrt doctor

exit codes:
  0 success        1 failure, such as a missing package
  2 arguments      3 bundle        4 checkpoint        5 backend
  6 parity with PyTorch            7 lost GPU
  8 storage, such as a full disk   130 interrupted

`sdrt COMMAND --help` describes a command
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand. examples: what follows `sdrt NAME`, one a line"""

    name: str
    summary: str
    function: Callable[[argparse.Namespace], None]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    examples: tuple[str, ...]


def commands() -> tuple[Command, ...]:
    """All subcommands, in the order of `sdrt --help`."""
    return (
        Command(
            "run",
            "generate images from a prompt",
            run,
            add_run,
            (
                '"a red circle on a blue background" --seed 0',
                '"a white cross" --image drawing.png --mask mask.png --strength 0.9',
                "--from lighthouse.png --steps 50",
            ),
        ),
        Command(
            "build",
            "build a bundle from a model",
            build,
            add_build,
            (
                "--model stable-diffusion-v1-5 --fp16",
                "--model model.safetensors --lora style.safetensors:0.8 --name styled",
                "--bundle stable-diffusion-v1-5-fp16 --backend tensorrt-rtx --target sm_89",
            ),
        ),
        Command(
            "upscale",
            "enlarge images",
            upscale,
            add_upscale,
            ("photo.png --scale 2", "*.png --upscaler RealESRGAN_x4plus --output large"),
        ),
        Command(
            "preprocess",
            "compute a control image from a photograph",
            preprocess,
            add_preprocess,
            ("canny photo.png --size 512x512 --output edges.png",),
        ),
        Command("list", "list the bundles", list_bundles, add_json, ("", "--json")),
        Command("use", "set the default bundle", use, add_name, ("stable-diffusion-v1-5-fp16",)),
        Command("remove", "delete a bundle and its plans", remove, add_name, ("shapes-fp16",)),
        Command(
            "compare",
            "compare schedulers and step counts on one sheet",
            compare,
            add_compare,
            (
                '"a red circle" --schedulers "Euler,DDIM" --steps 5,20',
                '"a lighthouse at dusk" --output sheet.png',
                '"a red circle" --steps 10 --seed 0 --json',
            ),
        ),
        Command("schedulers", "list the schedulers", schedulers, add_json, ("", "--json")),
        Command(
            "serve",
            "serve images over HTTP",
            serve,
            add_serve,
            (
                "--port 7860",
                "--bundle shapes --host 0.0.0.0 --keys keys.txt",
                "--ray --replicas 1:4",
            ),
        ),
        Command(
            "export-triton",
            "write a model repository for Triton",
            export_triton,
            add_export_triton,
            (
                "--bundle shapes --output repository",
                "--bundle shapes --output repository --instances 2 --force",
                "--output repository --name model --backend onnxruntime",
            ),
        ),
        Command(
            "bench",
            "measure a bundle on every engine of this machine",
            bench,
            add_bench,
            (
                "--bundle shapes",
                "--steps 1,4,20 --plot speed.png",
                "--json --compare earlier.json",
            ),
        ),
        Command(
            "inspect",
            "show what bundles contain",
            inspect,
            add_inspect,
            ("", "--bundle shapes --json", "--bundle shapes --layers"),
        ),
        Command(
            "verify",
            "validate a bundle on this machine",
            verify,
            add_verify,
            ("", "--bundle shapes --backend openvino", "--bundle shapes --json"),
        ),
        Command("gc", "list or delete files that are no longer needed", gc, add_gc, ("", "--yes")),
        Command("doctor", "show which backends work here, and why", doctor, add_json, ("",)),
        Command(
            "completion",
            "print a completion script for a shell",
            completion,
            _add_shell,
            ("bash > ~/.local/share/bash-completion/completions/sdrt", "zsh > ~/.zfunc/_sdrt"),
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    if not typed:
        build_parser().print_help(sys.stderr)
        return UsageError.exit_code
    if typed[0] == "help":
        typed = [*typed[1:2], "--help"]
    flags: Mapping[str, str] = {}
    try:
        args = _parse(build_parser(), typed)
        flags = args.flags
        _configure_logging(args)
        command: Callable[[argparse.Namespace], None] = args.command
        command(_restore(args, typed) if getattr(args, "source", None) else args)
        print(end="", flush=True)  # so that a full disk is an error of this command
    except SdrtError as error:
        report_error(name_flags(error, flags) if isinstance(error, UsageError) else error)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. No partial files were left behind.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        report_error(StorageError(f"failed to write: {error.strerror}", hint="free some space"))
        _drop_output()
        return StorageError.exit_code
    return 0


def _drop_output() -> None:
    """Let nothing more be written to standard output, where the last of it failed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _configure_logging(args: argparse.Namespace) -> None:
    handler = LogHandler()
    handler.setFormatter(LogFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.getLogger("sdrt").setLevel(logging.WARNING if args.quiet else level)


def _parse(parser: CommandParser, arguments: Sequence[str]) -> argparse.Namespace:
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = "" if arguments[0].startswith("-") else f"{arguments[0]} "
        hint = f"run `sdrt {command}--help`"
        raise UsageError(f"unexpected argument `{unknown[0]}`", hint=hint)
    return args


def _restore(args: argparse.Namespace, arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments as typed over those in an image's metadata."""
    from .infotext import apply_typed, restored_from

    restored = restored_from(args.source)
    return apply_typed(_parse(build_parser(restored.arguments), arguments), restored)


def _interrupt_again(unraisable: Any) -> None:
    """Ctrl-C that fell into a finaliser, where Python drops it, is sent once more."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def _interrupt_main() -> None:
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:  # it also ends a system call of the main thread
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def entry() -> int:
    """The `sdrt` script and `python -m sdrt`."""
    from sdrt.process_exit import exit_now

    sys.unraisablehook = _interrupt_again
    code = main()
    exit_now(code)
    return code


def build_parser(run_defaults: Mapping[str, Any] | None = None) -> CommandParser:
    """The parser of all commands. run_defaults: replace those of `sdrt run`"""
    from sdrt.version import __version__

    top = CommandParser(
        prog="sdrt",
        description="Stable Diffusion, compiled: build a bundle from a model, generate images.",
        epilog=EXAMPLES,
    )
    top.add_argument("--version", action="version", version=f"sdrt {__version__}")
    subparsers = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in commands():
        lines = "\n".join(f"  sdrt {command.name} {line}".rstrip() for line in command.examples)
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"examples:\n{lines}",
        )
        subparser.set_defaults(command=command.function)
        command.add_arguments(subparser)
        add_logging(subparser)
        subparser.set_defaults(flags=subparser.flags)
        if command.name == "run":
            subparser.set_defaults(**(run_defaults or {}))
    return top


def _add_shell(to: argparse.ArgumentParser) -> None:
    to.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")


def completion(args: argparse.Namespace) -> None:
    """`sdrt completion`: print the script."""
    import shtab

    print(shtab.complete(build_parser(), args.shell))


def list_bundles(args: argparse.Namespace) -> None:
    """`sdrt list`: print a table, or JSON."""
    from .bundles import list_bundles

    list_bundles(args)


def use(args: argparse.Namespace) -> None:
    """`sdrt use`: set the default bundle."""
    from .bundles import use

    use(args)


def remove(args: argparse.Namespace) -> None:
    """`sdrt remove`: delete a bundle."""
    from .bundles import remove

    remove(args)


def run(args: argparse.Namespace) -> None:
    """`sdrt run`: prints the path of every image, or JSON."""
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
    """`sdrt serve`: runs until interrupted."""
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
    """`sdrt gc`: prints leftovers, or JSON."""
    from .gc import collect_garbage

    collect_garbage(args)


def doctor(args: argparse.Namespace) -> None:
    """`sdrt doctor`: the machine, its packages and its backends."""
    from . import doctor as cli_doctor

    report = cli_doctor.diagnose()
    print(json.dumps(report, indent=2) if args.json else cli_doctor.text_from_diagnosis(report))
