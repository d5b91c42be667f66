"""Arguments of the commands, in groups.

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
    """An integer; raises the error that argparse reports."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def add_logging(to: argparse.ArgumentParser) -> None:
    """Arguments of every command."""
    to.add_argument("-v", "--verbose", action="store_true", help="log details")
    to.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")


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
    to.add_argument("--log-prompts", action="store_true", help="log prompts")
    to.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of log lines (default: text)",
    )
    _add_access_control(to)
    _add_ray(to)


def _add_access_control(to: argparse.ArgumentParser) -> None:
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
        type=float,
        metavar="N",
        help="GPUs of one replica (default: 1 if the cluster has GPUs, else 0)",
    )


DEFAULT_BUNDLE = "default: the one set by `sdrt use`, or the only one"


def add_bundle(to: argparse.ArgumentParser) -> None:
    """`--bundle` of commands that read one."""
    to.add_argument("--bundle", metavar="NAME|FOLDER", help=DEFAULT_BUNDLE)


def add_json(to: argparse.ArgumentParser) -> None:
    to.add_argument("--json", action="store_true", help="print JSON")


def add_bench(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt bench`."""
    add_bundle(to)
    to.add_argument("--size", metavar="WxH", help="image size (default: the bundle's first)")
    to.add_argument(
        "--steps", default="20", metavar="N,M", help="of full images, such as 1,4,20 (default: 20)"
    )
    to.add_argument(
        "--rounds", type=integer, default=7, metavar="N", help="measurements of each (default: 7)"
    )
    to.add_argument(
        "--engines", metavar="A,B", help="only engines whose names contain these (default: all)"
    )
    to.add_argument(
        "--parts",
        metavar="A,B",
        help="only these of text, unet, decode, picture (default: all)",
    )
    to.add_argument("--scheduler", metavar="NAME", help="default: the bundle's")
    to.add_argument(
        "--compiled", action="store_true", help="also compile diffusers, which takes minutes"
    )
    to.add_argument("--json", action="store_true", help="print JSON with every measurement")
    to.add_argument("--plot", type=Path, metavar="FILE.png", help="write a bar chart")
    to.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="an earlier report; exit code 1 if anything became slower",
    )


def add_verify(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt verify`."""
    add_bundle(to)
    _add_backend(to)
    add_json(to)


def add_gc(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt gc`."""
    to.add_argument("--yes", action="store_true", help="delete; without it, files are only listed")
    add_json(to)


def add_inspect(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt inspect`."""
    to.add_argument("--bundle", metavar="NAME|FOLDER", help="only this one (default: all)")
    to.add_argument(
        "--layers",
        action="store_true",
        help="show how TensorRT fuses attention and normalization",
    )
    add_json(to)


def add_name(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt use` and `sdrt remove`."""
    to.add_argument("name", metavar="NAME", help="as `sdrt list` shows it")


def add_run(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt run`."""
    to.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="(word:1.3), [word] and BREAK are understood; omit it for unconditional models",
    )
    to.add_argument(
        "--from",
        type=Path,
        metavar="FILE",
        dest="source",
        help="generate an image again from the settings in its file; other arguments override "
        "them. Identical pixels need the same bundle, backend and machine",
    )
    _add_output(to)
    sampling = to.add_argument_group("Sampling")
    sampling.add_argument(
        "--steps", type=integer, default=20, metavar="N", help="sampling steps (default: 20)"
    )
    _add_sampling(sampling)
    sampling.add_argument(
        "--scheduler",
        metavar="NAME",
        help='such as "DPM++ 2M Karras", see `sdrt schedulers` (default: the bundle\'s)',
    )
    sampling.add_argument(
        "--scheduler-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the scheduler, such as eta=0.5; repeatable",
    )
    sampling.add_argument(
        "--rng",
        choices=("cpu", "cuda"),
        default="cpu",
        help="reproduce torch's CPU or CUDA random numbers (default: cpu)",
    )
    sampling.add_argument(
        "--reuse",
        type=integer,
        default=1,
        metavar="N",
        help="run the full UNet every N evaluations only (DeepCache): faster, less exact "
        "(default: 1)",
    )
    _add_guidance(to)
    _add_image_input(to)
    _add_prompt(to)
    _add_model(to)


def _add_output(to: argparse.ArgumentParser) -> None:
    output = to.add_argument_group("Output")
    output.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="FILE|FOLDER",
        help="a .png, .jpg or .webp file, which is replaced, or a folder, where no file is "
        "(default: the current folder)",
    )
    output.add_argument(
        "--num-images", type=integer, default=1, metavar="N", help="per prompt (default: 1)"
    )
    output.add_argument(
        "--grid", action="store_true", help="write one image of all; its text has every seed"
    )
    output.add_argument("--preview", action="store_true", help="show the image as it forms")
    output.add_argument("--json", action="store_true", help="print paths, seeds and times as JSON")


def _add_sampling(to: argparse._ArgumentGroup) -> None:
    to.add_argument(
        "--seed", type=integer, metavar="N", help="default: random; saved in the image's metadata"
    )
    to.add_argument(
        "--size",
        metavar="WxH",
        help="sizes above the bundle's are decoded in tiles (default: the bundle's first)",
    )


def _add_guidance(to: argparse.ArgumentParser) -> None:
    guidance = to.add_argument_group("Guidance")
    _add_guidance_scale(guidance)
    guidance.add_argument(
        "--negative-prompt", default="", metavar="TEXT", help="what to avoid (default: none)"
    )
    guidance.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="0..1",
        help="against overexposed images (default: 0)",
    )
    guidance.add_argument(
        "--guidance-interval",
        default="0:1",
        metavar="FROM:TO",
        help="apply guidance in this part of the steps only (default: 0:1)",
    )


def _add_guidance_scale(to: argparse._ArgumentGroup) -> None:
    to.add_argument(
        "--guidance-scale",
        type=float,
        default=7.5,
        metavar="G",
        help="how closely to follow the prompt, also called CFG scale (default: 7.5)",
    )


def _add_image_input(to: argparse.ArgumentParser) -> None:
    start = to.add_argument_group("Image input")
    start.add_argument("--image", type=Path, metavar="FILE", help="the image to start from")
    start.add_argument("--mask", type=Path, metavar="FILE", help="white areas are repainted")
    start.add_argument("--depth", type=Path, metavar="FILE", help="depth map, for depth models")
    start.add_argument(
        "--strength",
        type=float,
        metavar="0..1",
        help="denoising strength (default: 0.8, or 1.0 with --mask)",
    )


def _add_prompt(to: argparse.ArgumentParser) -> None:
    text = to.add_argument_group("Prompt")
    text.add_argument(
        "--clip-skip",
        type=integer,
        default=0,
        metavar="N",
        help="last layers of the text encoder to skip (default: 0)",
    )
    text.add_argument(
        "--literal",
        action="store_true",
        help="disable prompt weighting; treat brackets literally",
    )
    text.add_argument("--cut", action="store_true", help="truncate prompts longer than 75 tokens")
    sizes = to.add_argument_group("SDXL size conditioning")
    sizes.add_argument("--original-size", metavar="WxH", help="default: the image size")
    sizes.add_argument("--crop", metavar="LEFTxTOP", help="default: 0x0")
    sizes.add_argument("--target-size", metavar="WxH", help="default: the image size")


def _add_model(to: argparse.ArgumentParser) -> None:
    to.set_defaults(options={}, loras={})
    model = to.add_argument_group("Model and backend")
    model.add_argument("--bundle", metavar="NAME|FOLDER", help=DEFAULT_BUNDLE)
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|NAME[:WEIGHT]",
        help="add a LoRA for this run, repeatable; NAME is a file in $SDRT_HOME/loras",
    )
    _add_backend(model)
    model.add_argument(
        "--exact", action="store_true", help="use no lower precision than the bundle's"
    )
    model.add_argument("--low-memory", action="store_true", help="load one component at a time")
    model.add_argument(
        "--compile",
        action="store_true",
        help="use torch.compile with --backend torch; takes about a minute",
    )


def _add_backend(to: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    to.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto")
    to.add_argument(
        "--device", type=integer, default=0, metavar="N", help="which NVIDIA GPU (default: 0)"
    )


def add_compare(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt compare`."""
    to.add_argument("prompt", metavar="PROMPT", help="the prompt of every image")
    to.add_argument("--schedulers", metavar="A,B", help="see `sdrt schedulers` (default: all)")
    to.add_argument("--steps", default="20", metavar="N,M", help="such as 5,10,20 (default: 20)")
    output = to.add_argument_group("Output")
    output.add_argument(
        "--output",
        type=Path,
        default=Path("compare.png"),
        metavar="FILE",
        help="default: compare.png",
    )
    output.add_argument("--json", action="store_true", help="print paths and times as JSON")
    sampling = to.add_argument_group("Sampling")
    _add_sampling(sampling)
    _add_guidance_scale(sampling)
    _add_model(to)


def add_export_triton(to: argparse.ArgumentParser) -> None:
    """Add the arguments of `sdrt export-triton`."""
    to.add_argument("--bundle", metavar="NAME|FOLDER", help=DEFAULT_BUNDLE)
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
