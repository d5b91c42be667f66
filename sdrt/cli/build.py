"""`sdrt build`: from a model to a bundle, and its plans.

What exports is imported when it runs, so that `sdrt --help` is immediate.
"""

import argparse
from pathlib import Path

from sdrt.errors import SdrtError, UsageError

from . import plans as cli_plans
from .arguments import BACKENDS, integer

TINY_VAE = "madebyollin/taesd"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def add_build(to: argparse.ArgumentParser) -> None:
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
        type=integer,
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


def build(args: argparse.Namespace) -> None:
    """`sdrt build`: prints the bundle's folder."""
    from sdrt.bundle import open_bundle

    kind = cli_plans.plan_kind(args)
    folder = open_bundle(args.bundle).folder if args.bundle else _build_bundle(args)
    if kind:
        cli_plans.build_plans(open_bundle(folder), kind, args)
    print(folder)


def _build_bundle(args: argparse.Namespace) -> Path:
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
        batch=_parse_batch(args.batch),
        backend=cli_plans.validation_backend(args.backend),
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


def _parse_batch(text: str) -> tuple[int, int, int] | None:
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
