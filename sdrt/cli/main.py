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
from pathlib import Path
from typing import Any

from sdrt.errors import SdrtError, UsageError

from . import plans as cli_plans
from .arguments import BACKENDS, add_bench, add_export_triton, add_gc, add_serve, add_verify
from .arguments import whole as _whole

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
TINY_VAE = "madebyollin/taesd"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


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
        print(f"sdrt: {error}", file=sys.stderr)
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
    from .infotext import restored_from, settle

    restored = restored_from(args.source)
    return settle(parser(restored.arguments).parse_args(typed), restored)


def _interrupt_again(unraisable: Any) -> None:
    """Ctrl-C that fell into a finaliser, where Python drops it, is sent once more."""
    if unraisable.exc_type is KeyboardInterrupt:
        main_thread = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, [main_thread, signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(unraisable)


def entry() -> int:
    """What the `sdrt` script and `python -m sdrt` call."""
    from sdrt.process_exit import leave

    sys.unraisablehook = _interrupt_again
    code = main()
    leave(code)
    return code


def parser(for_run: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """for_run: defaults of `sdrt run` instead of its own"""
    from sdrt import __version__

    top = argparse.ArgumentParser(
        prog="sdrt",
        description="Stable Diffusion, compiled: build a bundle from a model, run prompts on it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"sdrt {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_build(_command(commands, "build", build, "turn a model into a bundle"))
    run_parser = _command(commands, "run", run, "turn a prompt into a picture")
    _add_run(run_parser)
    run_parser.set_defaults(**(for_run or {}))
    _add_compare(
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
    made.add_argument("-v", "--verbose", action="store_true", help="say more")
    made.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")
    return made


def _add_build(to: argparse.ArgumentParser) -> None:
    made_from = to.add_mutually_exclusive_group(required=True)
    made_from.add_argument(
        "--model",
        metavar="NAME|ID|FOLDER|FILE",
        help="well-known name, hub id, local folder or .safetensors file",
    )
    made_from.add_argument(
        "--bundle", metavar="NAME|FOLDER", help="only the plans of a bundle that is there"
    )
    to.add_argument("--revision", metavar="NAME", help="a hub model's branch, tag or commit")
    to.add_argument("--output", type=Path, metavar="FOLDER", help="where the bundle goes")
    parts = to.add_mutually_exclusive_group()
    parts.add_argument("--vae", metavar="ID|FOLDER|FILE", help="another autoencoder")
    parts.add_argument(
        "--tiny-vae", action="store_const", const=TINY_VAE, dest="vae", help=f"--vae {TINY_VAE}"
    )
    to.add_argument(
        "--unet", metavar="ID|FOLDER|FILE", help="another UNet, such as a distilled one"
    )
    to.add_argument(
        "--text-encoder",
        metavar="ID|FOLDER|FILE",
        help="another text encoder, or that of a file without one",
    )
    to.add_argument(
        "--text-encoder-2", metavar="ID|FOLDER|FILE", help="the second, of models such as XL"
    )
    to.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the model predicts (default: as the model says, see the line 'predicts')",
    )
    to.add_argument(
        "--zero-snr",
        action="store_true",
        help="the schedule ends in pure noise: betas rescaled to zero terminal SNR, steps spaced "
        "from the end (default: as the model says)",
    )
    to.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="added to the weights, repeatable",
    )
    to.add_argument(
        "--safety-checker",
        action="store_true",
        help="with the checkpoint's own: flagged pictures are black (default: off)",
    )
    to.add_argument(
        "--feature-reuse",
        nargs="?",
        type=_whole,
        const=0,
        metavar="BRANCH",
        help="so that sdrt run --reuse works; a higher branch is slower and nearer (default: 0)",
    )
    precision = to.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="half precision")
    precision.add_argument("--fp32", action="store_true", help="single precision (default)")
    to.add_argument(
        "--size", action="append", metavar="WxH", help="picture size, repeatable; first is default"
    )
    to.add_argument("--batch", default="1:1:4", metavar="MIN:OPT:MAX|auto", help="pictures at once")
    to.add_argument("--backend", choices=BACKENDS, default="auto")
    to.add_argument("--force", action="store_true", help="replace a bundle that is there")
    cli_plans.add_arguments(to)


def _add_run(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="(word:1.3), [word] and BREAK work; none for models that take none",
    )
    to.add_argument(
        "--from",
        type=Path,
        metavar="FILE",
        dest="source",
        help="make an image again by the text in its file; what is typed beside it goes first. The "
        "same pixels need the same bundle, backend and machine",
    )
    to.add_argument("--negative-prompt", default="", metavar="TEXT")
    to.add_argument("--steps", type=_whole, default=20, metavar="N")
    to.add_argument(
        "--scheduler", metavar="NAME", help='such as "DPM++ 2M Karras"; sdrt schedulers'
    )
    to.add_argument("--scheduler-option", action="append", default=[], metavar="KEY=VALUE")
    to.add_argument("--num-images", type=_whole, default=1, metavar="N", help="per prompt")
    to.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="FILE|FOLDER",
        help="a FILE is replaced; in a FOLDER no file is (default: the current folder)",
    )
    to.add_argument(
        "--grid", action="store_true", help="one image of all; its text holds every seed"
    )
    to.add_argument("--preview", action="store_true", help="show the picture as it forms")
    _add_shared(to)
    guidance = to.add_argument_group("guidance")
    guidance.add_argument("--guidance-rescale", type=float, default=0.0, metavar="0..1")
    guidance.add_argument(
        "--guidance-interval", default="0:1", metavar="FROM:TO", help="of the run"
    )
    to.add_argument(
        "--reuse",
        type=_whole,
        default=1,
        metavar="N",
        help="every Nth evaluation runs the whole model: faster, less exact (default: 1)",
    )
    start = to.add_argument_group("starting from a picture")
    start.add_argument("--image", type=Path, metavar="FILE", help="the picture to start from")
    start.add_argument("--mask", type=Path, metavar="FILE", help="light where it is made new")
    start.add_argument("--depth", type=Path, metavar="FILE", help="for models that take depth")
    start.add_argument("--strength", type=float, metavar="0..1", help="0.8; with a mask 1")
    told = to.add_argument_group("sizes that models such as XL are told of")
    told.add_argument("--original-size", metavar="WxH", help="default: the size made")
    told.add_argument("--crop", metavar="LEFTxTOP", help="what was cut off; default: 0x0")
    told.add_argument("--target-size", metavar="WxH", help="default: the size made")
    text = to.add_argument_group("reading prompts")
    text.add_argument("--clip-skip", type=_whole, default=0, metavar="N", help="layers left out")
    text.add_argument("--literal", action="store_true", help="brackets are text")
    text.add_argument("--cut", action="store_true", help="stop where the encoder's tokens end")
    text.add_argument("--rng", choices=("cpu", "cuda"), default="cpu", help="whose noise a seed is")


def _add_shared(to: argparse.ArgumentParser) -> None:
    to.set_defaults(options={}, loras={})
    to.add_argument("--bundle", metavar="NAME|FOLDER", help="default: the newest")
    to.add_argument("--guidance-scale", type=float, default=7.5, metavar="G")
    to.add_argument("--seed", type=_whole, metavar="N", help="default: drawn, and in the file")
    to.add_argument("--size", metavar="WxH", help="larger than the bundle's is decoded in tiles")
    to.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|NAME[:WEIGHT]",
        help="added for this run, repeatable; a NAME is a file in $SDRT_HOME/loras",
    )
    to.add_argument("--backend", choices=BACKENDS, default="auto")
    to.add_argument("--device", type=_whole, default=0, metavar="N", help="which GPU")
    to.add_argument("--exact", action="store_true", help="no lower precision than the bundle's")
    to.add_argument("--low-memory", action="store_true", help="one component loaded at a time")
    to.add_argument("--compile", action="store_true", help="with --backend torch; a minute once")
    to.add_argument("--json", action="store_true", help="print paths, seeds and times as JSON")


def _add_compare(to: argparse.ArgumentParser) -> None:
    to.add_argument("prompt", metavar="PROMPT")
    to.add_argument("--schedulers", metavar="A,B", help="default: all; see sdrt schedulers")
    to.add_argument("--steps", default="20", metavar="N,M", help="such as 5,10,20")
    to.add_argument("--output", type=Path, default=Path("compare.png"), metavar="FILE")
    _add_shared(to)


def build(args: argparse.Namespace) -> None:
    """`sdrt build`: prints the bundle's folder."""
    from sdrt.bundle import open_bundle

    kind = cli_plans.wanted(args)
    folder = open_bundle(args.bundle).folder if args.bundle else _built(args)
    if kind:
        cli_plans.build_plans(open_bundle(folder), kind, args)
    print(folder)


def _built(args: argparse.Namespace) -> Path:
    """Build a bundle from a model."""
    try:
        from sdrt.export.build import BuildPlan, build_bundle
    except ImportError as error:
        raise SdrtError(
            f"building needs {error.name}, which is not installed; pip install 'sdrt[build]'"
        ) from error
    from sdrt.bundle import parse_size

    plan = BuildPlan(
        model=args.model,
        output=args.output,
        dtype="float16" if args.fp16 else "float32",
        sizes=tuple(parse_size(text) for text in args.size or ()),
        batch=_batch(args.batch),
        backend=cli_plans.proving(args.backend),
        force=args.force,
        vae=args.vae,
        unet=args.unet,
        text_encoder=args.text_encoder,
        text_encoder_2=args.text_encoder_2,
        prediction_type=args.prediction_type,
        zero_snr=args.zero_snr,
        loras=tuple(args.lora),
        revision=args.revision,
        safety_checker=args.safety_checker,
        feature_reuse=args.feature_reuse,
    )
    return build_bundle(plan)


def _batch(text: str) -> tuple[int, int, int] | None:
    if text == "auto":
        return None
    parts = text.split(":")
    if len(parts) == 3 and all(part.isdigit() for part in parts):
        low, usual, high = (int(part) for part in parts)
        if 1 <= low <= usual <= high <= 256:
            return low, usual, high
    raise UsageError(
        f"batch {text!r} is not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= 256; "
        "type for example --batch 1:1:4 or --batch auto"
    )


def run(args: argparse.Namespace) -> None:
    """`sdrt run`: prints the path of every picture, or JSON."""
    from .run import run

    run(args)


def compare(args: argparse.Namespace) -> None:
    """`sdrt compare`: prints the path of the sheet, or JSON."""
    from .run import compare

    compare(args)


def schedulers(args: argparse.Namespace) -> None:
    """`sdrt schedulers`: prints a line for each, or JSON."""
    from .run import schedulers

    schedulers(args)


def bench(args: argparse.Namespace) -> None:
    """`sdrt bench`: prints a table, or JSON."""
    from sdrt.bench.rounds import bench

    bench(args)


def serve(args: argparse.Namespace) -> None:
    """`sdrt serve`: runs until it is told to end."""
    from .serve import serve

    serve(args)


def export_triton(args: argparse.Namespace) -> None:
    """`sdrt export-triton`: prints the model's folder."""
    from sdrt.serve.triton.export import TritonPlan, export_triton

    chosen = {field.name: getattr(args, field.name) for field in fields(TritonPlan)}
    print(export_triton(TritonPlan(**chosen)))


def inspect(args: argparse.Namespace) -> None:
    """`sdrt inspect`: every bundle, or one, as a table or JSON."""
    from sdrt.bundle import open_bundle
    from sdrt.bundle.store import list_bundles

    from . import inspect as cli_inspect

    folders = [args.bundle] if args.bundle else list_bundles()
    if not folders:
        open_bundle(None)
    bundles = [open_bundle(folder) for folder in folders]
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
    from .gc import collect

    collect(args)


def doctor(args: argparse.Namespace) -> None:
    """`sdrt doctor`: the machine, its packages and its backends."""
    from . import inspect as cli_inspect

    found = cli_inspect.diagnose()
    print(json.dumps(found, indent=2) if args.json else cli_inspect.text_from_diagnosis(found))
