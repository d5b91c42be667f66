"""Arguments of the sampler and of guidance."""

import argparse

from sdrt.errors import UsageError

from .common import Arguments, integer, number

PRESETS = ("exact", "balanced", "fast")  # of sdrt.runtime.presets, whose import takes long


def add_sampling(to: argparse.ArgumentParser) -> None:
    sampling = to.add_argument_group("Sampling")
    sampling.add_argument(
        "--steps",
        dest="num_inference_steps",
        type=integer,
        default=20,
        metavar="N",
        help="sampling steps (default: 20)",
    )
    add_seed_and_size(sampling)
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
        dest="feature_reuse",
        type=integer,
        metavar="N",
        help="run the full UNet every N evaluations only (DeepCache): faster, less exact "
        "(default: 1)",
    )
    sampling.add_argument(
        "--reuse-order",
        dest="feature_reuse_order",
        type=integer,
        metavar="0|1",
        help="1 extrapolates what is reused, as TaylorSeer does: as fast, more exact (default: 0)",
    )
    sampling.add_argument(
        "--output-reuse",
        type=integer,
        metavar="N",
        help="compute only one of N evaluations of the UNet and extrapolate the others, with "
        "samplers that add no noise: faster, less exact (default: 1)",
    )
    sampling.add_argument(
        "--preset",
        choices=PRESETS,
        help="a named set of reuse options; those that are passed take precedence "
        "(default: exact, the full run)",
    )


def add_seed_and_size(to: Arguments) -> None:
    to.add_argument(
        "--seed", type=integer, metavar="N", help="default: random; saved in the image's metadata"
    )
    to.add_argument(
        "--size",
        metavar="WxH",
        help="sizes above the bundle's are decoded in tiles (default: the bundle's first)",
    )


def add_guidance(to: argparse.ArgumentParser) -> None:
    guidance = to.add_argument_group("Guidance")
    add_guidance_scale(guidance)
    guidance.add_argument(
        "--negative-prompt", default="", metavar="TEXT", help="what to avoid (default: none)"
    )
    guidance.add_argument(
        "--guidance-rescale",
        type=number,
        default=0.0,
        metavar="0..1",
        help="against overexposed images (default: 0)",
    )
    guidance.add_argument(
        "--guidance-interval",
        type=_interval,
        metavar="FROM:TO",
        help="apply guidance in this part of the steps only (default: 0:1)",
    )


def add_guidance_scale(to: Arguments) -> None:
    to.add_argument(
        "--guidance-scale",
        type=number,
        default=7.5,
        metavar="G",
        help="how closely to follow the prompt, also called CFG scale (default: 7.5)",
    )


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise UsageError(f"{text!r} is not FROM:TO", hint="for example 0.1:0.8") from None
    return low, high
