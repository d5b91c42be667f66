"""`sdrt build`: from a model to a bundle, and its plans.

What exports is imported when it runs, so that `sdrt --help` is immediate.
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.errors import UsageError

from . import plans as cli_plans
from .arguments import BACKENDS, integer

if TYPE_CHECKING:
    from sdrt.bundle import Bundle

TINY_VAE = "madebyollin/taesd"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BATCH = "1:1:4"  # MIN:OPT:MAX, unless it is passed


def add_build(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt build`."""
    source = to.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model",
        metavar="NAME|ID|FOLDER|FILE",
        help="a well-known name, Hub id, local folder or .safetensors file",
    )
    source.add_argument(
        "--controlnet",
        metavar="ID|FOLDER|FILE",
        help="a ControlNet or T2I-Adapter for `sdrt run --control`: its own bundle, which serves "
        "every model of its family",
    )
    source.add_argument(
        "--bundle", metavar="NAME|FOLDER", help="build only the plans of an existing bundle"
    )
    source.add_argument(
        "--upscaler",
        metavar="ID|FOLDER|FILE",
        help="ESRGAN weights for `sdrt upscale` and `sdrt run --hires-upscaler`: their own bundle",
    )
    source.add_argument(
        "--ip-adapter",
        metavar="FILE",
        help="an IP-Adapter, whose images are prompts: its own bundle, which serves every model of "
        "its family",
    )
    to.add_argument(
        "--image-encoder",
        metavar="FOLDER",
        help="the CLIP vision model that an IP-Adapter was trained with",
    )
    to.add_argument("--revision", metavar="NAME", help="a Hub model's branch, tag or commit")
    _add_output(to)
    _add_parts(to)
    _add_weights(to)
    _add_shapes(to)
    to.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto")
    cli_plans.add_arguments(to)


def _add_output(to: argparse.ArgumentParser) -> None:
    output = to.add_argument_group("Output")
    output.add_argument(
        "--name", help="of the bundle (default: the model's, and how the build differs from it)"
    )
    output.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: $SDRT_HOME/bundles/NAME"
    )
    output.add_argument("--force", action="store_true", help="replace an existing bundle")


def _add_parts(to: argparse.ArgumentParser) -> None:
    parts = to.add_argument_group("Other components")
    vae = parts.add_mutually_exclusive_group()
    vae.add_argument("--vae", metavar="ID|FOLDER|FILE", help="another autoencoder")
    vae.add_argument(
        "--tiny-vae", action="store_const", const=TINY_VAE, dest="vae", help=f"--vae {TINY_VAE}"
    )
    parts.add_argument(
        "--unet", metavar="ID|FOLDER|FILE", help="another UNet, such as a distilled one"
    )
    parts.add_argument(
        "--text-encoder",
        metavar="ID|FOLDER|FILE",
        help="another text encoder, or one for a file without any",
    )
    parts.add_argument(
        "--text-encoder-2", metavar="ID|FOLDER|FILE", help="the second one, of SDXL models"
    )
    parts.add_argument(
        "--safety-checker",
        action="store_true",
        help="include the checkpoint's safety checker: flagged images are black (default: off)",
    )


def _add_weights(to: argparse.ArgumentParser) -> None:
    weights = to.add_argument_group("Weights and training")
    precision = weights.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="half precision")
    precision.add_argument("--fp32", action="store_true", help="single precision (default)")
    weights.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="merge a LoRA into the weights; repeatable",
    )
    weights.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the model predicts (default: as the model says)",
    )
    weights.add_argument(
        "--zero-snr",
        action="store_true",
        help="rescale betas to zero terminal SNR (default: as the model says)",
    )
    weights.add_argument(
        "--feature-reuse",
        nargs="?",
        type=integer,
        const=0,
        metavar="BRANCH",
        help="also export a DeepCache branch for `sdrt run --reuse`; higher branches are slower "
        "but more accurate (default: off; without BRANCH: 0)",
    )
    weights.add_argument(
        "--lora-rank",
        type=integer,
        metavar="R",
        help="also export graphs by which images with different LoRA files up to this rank share "
        "calls of the model in `sdrt serve` (default: off)",
    )


def _add_shapes(to: argparse.ArgumentParser) -> None:
    shapes = to.add_argument_group("Sizes")
    shapes.add_argument(
        "--size",
        action="append",
        metavar="WxH",
        help="image size, repeatable; the first is the default (default: the model's)",
    )
    shapes.add_argument(
        "--batch",
        default=BATCH,
        metavar="MIN:OPT:MAX|auto",
        help="images per call (default: 1:1:4)",
    )


def build(args: argparse.Namespace) -> None:
    """`sdrt build`: prints the bundle's folder."""
    from sdrt.bundle import open_bundle

    if args.upscaler:
        print(_build_upscaler(args).folder)
        return
    if args.ip_adapter:
        print(_build_ip_adapter(args).folder)
        return
    if args.image_encoder:
        raise UsageError("--image-encoder is an option of --ip-adapter")
    kind = cli_plans.plan_kind(args)
    if args.bundle:
        bundle = open_bundle(args.bundle)
    else:
        bundle = _build_control_bundle(args) if args.controlnet else _build_bundle(args)
    if kind:
        cli_plans.build_plans(bundle, kind, args)
    print(bundle.folder)


def _build_upscaler(args: argparse.Namespace) -> "Bundle":
    from sdrt.library import build_upscaler

    _refuse_model_options(args, "--upscaler")
    _refuse_shapes(args, "--upscaler")
    return build_upscaler(
        args.upscaler,
        output=args.output,
        name=_parse_name(args.name),
        precision="fp16" if args.fp16 else "fp32",
        backend=cli_plans.validation_backend(args.backend),
        force=args.force,
        revision=args.revision,
    )


def _build_ip_adapter(args: argparse.Namespace) -> "Bundle":
    from sdrt.library import build_ip_adapter

    _refuse_model_options(args, "--ip-adapter")
    _refuse_shapes(args, "--ip-adapter")
    return build_ip_adapter(
        args.ip_adapter,
        image_encoder=args.image_encoder,
        output=args.output,
        name=_parse_name(args.name),
        precision="fp16" if args.fp16 else "fp32",
        backend=cli_plans.validation_backend(args.backend),
        force=args.force,
    )


def _build_bundle(args: argparse.Namespace) -> "Bundle":
    """Build a bundle from a model."""
    from sdrt.library import build

    return build(
        args.model,
        output=args.output,
        name=_parse_name(args.name),
        precision="fp16" if args.fp16 else "fp32",
        sizes=args.size or (),
        batch=_parse_batch(args.batch),
        backend=cli_plans.validation_backend(args.backend),
        force=args.force,
        vae=args.vae,
        unet=args.unet,
        text_encoder=args.text_encoder,
        text_encoder_2=args.text_encoder_2,
        prediction_type=args.prediction_type,
        zero_snr=args.zero_snr,
        loras=args.lora,
        revision=args.revision,
        safety_checker=args.safety_checker,
        feature_reuse=args.feature_reuse,
        lora_rank=args.lora_rank,
    )


# Options of models, which no ControlNet has.
MODEL_OPTIONS = (
    *("vae", "unet", "text_encoder", "text_encoder_2", "safety_checker", "lora"),
    *("prediction_type", "zero_snr", "feature_reuse", "lora_rank", "switch_lora"),
)


def _refuse_model_options(args: argparse.Namespace, source: str) -> None:
    for name in MODEL_OPTIONS:
        value = getattr(args, name)
        if value is not None and value is not False and value != []:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is an option of models, not of {source}")


def _refuse_shapes(args: argparse.Namespace, source: str) -> None:
    for option, has_value in (("--size", args.size), ("--batch", args.batch != BATCH)):
        if has_value:
            raise UsageError(f"{option} is an option of models and ControlNets, not of {source}")


def _build_control_bundle(args: argparse.Namespace) -> "Bundle":
    """Build a control bundle from a ControlNet or T2I-Adapter."""
    from sdrt.library import build_controlnet

    _refuse_model_options(args, "--controlnet")
    batch = _parse_batch(args.batch)
    if batch is None:
        raise UsageError("--batch auto with --controlnet", hint="for example --batch 1:1:4")
    return build_controlnet(
        args.controlnet,
        output=args.output,
        name=_parse_name(args.name),
        precision="fp16" if args.fp16 else "fp32",
        sizes=args.size or (),
        batch=batch,
        backend=cli_plans.validation_backend(args.backend),
        force=args.force,
        revision=args.revision,
    )


def _parse_name(name: str | None) -> str | None:
    """It becomes a folder's name."""
    if name is None or re.fullmatch(r"[^\W_][\w.-]{0,99}", name):
        return name
    raise UsageError(
        f"--name {name!r}: expected a letter or digit, then letters, digits, `.`, `_` and `-`"
    )


def _parse_batch(text: str) -> tuple[int, int, int] | None:
    if text == "auto":
        return None
    parts = text.split(":")
    if len(parts) == 3 and all(part.isdigit() for part in parts):
        low, usual, high = (int(part) for part in parts)
        if 1 <= low <= usual <= high <= 256:
            return low, usual, high
    raise UsageError(
        f"--batch {text!r} is not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= 256",
        hint="for example --batch 1:1:4 or --batch auto",
    )
