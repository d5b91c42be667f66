"""Arguments of the commands that serve, and what other commands' arguments share.

Knows argparse; what is slow to import is imported by who needs it, so that `sdrt --help` is
immediate.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.errors import UsageError

if TYPE_CHECKING:
    from sdrt.serve.model_manager import ModelSource
    from sdrt.serve.settings import Settings

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "openvino", "torch")


def integer(text: str) -> int:
    """A whole number, or an error as argparse tells it."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def add_logging(to: argparse.ArgumentParser) -> None:
    """What every command takes."""
    to.add_argument("-v", "--verbose", action="store_true", help="say more")
    to.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")


def add_serve(to: argparse.ArgumentParser) -> None:
    """Add the arguments of `sdrt serve`."""
    to.add_argument(
        "--bundle",
        action="append",
        default=[],
        metavar="NAME|FOLDER",
        help="bundle to serve; repeatable, the first is the default model (default: newest)",
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
        "--exact", action="store_true", help="never use a lower precision than the bundle's"
    )
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
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="graceful shutdown timeout (default: 30)",
    )
    access = to.add_argument_group("access control")
    keys = access.add_mutually_exclusive_group()
    keys.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys, one per line, plain or sha256:HEX"
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
    to.add_argument("--log-prompts", action="store_true", help="log prompts")
    to.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of log lines (default: text)",
    )
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
        type=float,
        metavar="N",
        help="GPUs of one replica (default: 1 if the cluster has GPUs, else 0)",
    )


def add_bench(to: argparse.ArgumentParser) -> None:
    """What `sdrt bench` takes."""
    to.add_argument("--bundle", metavar="NAME|FOLDER", help="default: the newest")
    to.add_argument("--size", metavar="WxH")
    to.add_argument("--steps", default="20", metavar="N,M", help="of whole pictures; 1,4,20,50")
    to.add_argument("--rounds", type=integer, default=7, metavar="N")
    to.add_argument("--engines", metavar="A,B", help="only those with these in their names")
    to.add_argument("--parts", metavar="A,B", help="only these: text, unet, decode, picture")
    to.add_argument("--scheduler", metavar="NAME", help="default: the bundle's")
    to.add_argument(
        "--compiled", action="store_true", help="the reference library compiled too; minutes"
    )
    to.add_argument("--json", action="store_true", help="for machines, with every turn")
    to.add_argument("--plot", type=Path, metavar="FILE.png", help="bars, the limit as a line")
    to.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="exit code 1 for what became slower"
    )


def add_verify(to: argparse.ArgumentParser) -> None:
    """What `sdrt verify` takes."""
    to.add_argument("--bundle", metavar="NAME|FOLDER", help="default: the newest")
    to.add_argument("--backend", choices=BACKENDS, default="auto")
    to.add_argument("--device", type=integer, default=0, metavar="N", help="which GPU")
    to.add_argument("--json", action="store_true", help="for machines")


def add_gc(to: argparse.ArgumentParser) -> None:
    """What `sdrt gc` takes."""
    to.add_argument("--yes", action="store_true", help="free it; without, it is only shown")
    to.add_argument("--json", action="store_true", help="for machines")


def add_export_triton(to: argparse.ArgumentParser) -> None:
    """Add the arguments of `sdrt export-triton`."""
    to.add_argument(
        "--bundle", metavar="NAME|FOLDER", help="bundle to export (default: newest bundle)"
    )
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


def add_run(to: argparse.ArgumentParser) -> None:
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
    to.add_argument("--steps", type=integer, default=20, metavar="N")
    to.add_argument(
        "--scheduler", metavar="NAME", help='such as "DPM++ 2M Karras"; sdrt schedulers'
    )
    to.add_argument("--scheduler-option", action="append", default=[], metavar="KEY=VALUE")
    to.add_argument("--num-images", type=integer, default=1, metavar="N", help="per prompt")
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
        type=integer,
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
    text.add_argument("--clip-skip", type=integer, default=0, metavar="N", help="layers left out")
    text.add_argument("--literal", action="store_true", help="brackets are text")
    text.add_argument("--cut", action="store_true", help="stop where the encoder's tokens end")
    text.add_argument("--rng", choices=("cpu", "cuda"), default="cpu", help="whose noise a seed is")


def _add_shared(to: argparse.ArgumentParser) -> None:
    to.set_defaults(options={}, loras={})
    to.add_argument("--bundle", metavar="NAME|FOLDER", help="default: the newest")
    to.add_argument("--guidance-scale", type=float, default=7.5, metavar="G")
    to.add_argument("--seed", type=integer, metavar="N", help="default: drawn, and in the file")
    to.add_argument("--size", metavar="WxH", help="larger than the bundle's is decoded in tiles")
    to.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|NAME[:WEIGHT]",
        help="added for this run, repeatable; a NAME is a file in $SDRT_HOME/loras",
    )
    to.add_argument("--backend", choices=BACKENDS, default="auto")
    to.add_argument("--device", type=integer, default=0, metavar="N", help="which GPU")
    to.add_argument("--exact", action="store_true", help="no lower precision than the bundle's")
    to.add_argument("--low-memory", action="store_true", help="one component loaded at a time")
    to.add_argument("--compile", action="store_true", help="with --backend torch; a minute once")
    to.add_argument("--json", action="store_true", help="print paths, seeds and times as JSON")


def add_compare(to: argparse.ArgumentParser) -> None:
    to.add_argument("prompt", metavar="PROMPT")
    to.add_argument("--schedulers", metavar="A,B", help="default: all; see sdrt schedulers")
    to.add_argument("--steps", default="20", metavar="N,M", help="such as 5,10,20")
    to.add_argument("--output", type=Path, default=Path("compare.png"), metavar="FILE")
    _add_shared(to)


def sources_from_arguments(args: argparse.Namespace) -> "dict[str, ModelSource]":
    """The bundles of a command line by name; raises BundleError or UsageError."""
    from sdrt import load
    from sdrt.bundle import open_bundle
    from sdrt.serve.model_manager import ModelSource

    precision = "exact" if args.exact else "auto"
    sources = {}
    for name in args.bundle or [None]:
        bundle = open_bundle(name)
        if bundle.manifest.name in sources:
            raise UsageError(
                f"two bundles have the name {bundle.manifest.name}", hint="serve only one of them"
            )
        one = partial(load, bundle.folder, backend=args.backend, precision=precision)
        sources[bundle.manifest.name] = ModelSource(one, bundle.folder / "plans")
    return sources


def settings_from_arguments(args: argparse.Namespace) -> "Settings":
    """The server's settings; raises UsageError for invalid ones, and for open access by default."""
    from sdrt.serve.settings import LOCAL_HOSTS, Settings, is_loopback, read_key_digests

    local = is_loopback(args.host)
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port {args.port}; expected 0 to 65535")
    if not 0.0 <= args.drain <= 86_400.0:
        raise UsageError(f"--drain {args.drain:g}; expected 0 to 86400 seconds")
    if not (local or args.keys or args.no_keys):
        raise UsageError(
            f"--host {args.host} is reachable from other machines; choose who has access",
            hint="pass --keys FILE (one API key per line), or --no-keys to allow everyone",
        )
    named = tuple(name.lower() for name in args.allow_host)
    return Settings(
        host=args.host,
        port=args.port,
        keys=read_key_digests(args.keys) if args.keys else None,
        hosts=(*LOCAL_HOSTS, *named) if local or named else None,
        slots=args.slots,
        waiting=args.waiting,
        deterministic=args.deterministic,
        drain_seconds=args.drain,
        log_prompts=args.log_prompts,
    )
