"""`sdrt run`: from arguments to files and lines. Imported by the command line when it runs."""

import argparse
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from PIL import Image

from sdrt import load
from sdrt.bundle import Bundle, open_bundle
from sdrt.errors import UsageError
from sdrt.json_validation import shorten
from sdrt.runtime import GenerationOptions, Pipeline, Preview, Step
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.images import SUFFIXES, make_grid, save_image
from sdrt.runtime.ip_adapter import check_is_ip_adapter
from sdrt.runtime.job import GenerationJob
from sdrt.runtime.loading import unloaded_pipeline
from sdrt.runtime.lora.adapters import find_lora, parse_lora, read_lora
from sdrt.runtime.lora.sets import LoraSet, check_lora_set, group_by_lora_set, merge_loras
from sdrt.runtime.lora.switch import stream_by_lora_set
from sdrt.runtime.lora.tags import parse_weight
from sdrt.runtime.options import PARSERS
from sdrt.runtime.refiner_options import DEFAULT_SWITCH
from sdrt.runtime.requests import Request
from sdrt.runtime.safety_checker import is_flagged, is_flat
from sdrt.runtime.samplers.noise_schedule import FIELDS, is_scheduler_option

from .control import (
    control_options,
    ip_adapter_options,
    open_control_bundles,
    parse_ip_adapter,
)
from .infotext import check_embeddings
from .parser import closest
from .terminal import print_line, terminal_graphics

log = logging.getLogger(__name__)
PREVIEW_SIDE = 256
FLAGGED = "seed {}: the safety checker flagged the image, so it is black"


def options_from_arguments(
    args: argparse.Namespace, control_bundles: Mapping[str, Bundle] = MappingProxyType({})
) -> GenerationOptions:
    """The generation options of a command line: its arguments that are named like one."""
    named = {name: getattr(args, name, None) for name in (*PARSERS, "preset")}
    named |= control_options(args.control, control_bundles) | ip_adapter_options(args.ip_adapter)
    if args.refiner and named["refiner_switch_at"] is None:
        named["refiner_switch_at"] = DEFAULT_SWITCH
    return parse_options(named)


def open_pipeline(args: argparse.Namespace) -> Pipeline:
    """The pipeline of a command line."""
    precision = "exact" if args.exact else "auto"
    pipe = load(
        args.bundle,
        backend=args.backend,
        precision=precision,
        device=args.device,
        low_memory=args.low_memory,
        compile=args.compile,
        cuda_graphs=args.cuda_graphs,
        static_size=args.static_size,
        controlnet=list(open_control_bundles(args.control)),
        ip_adapter=args.ip_adapter and parse_ip_adapter(args.ip_adapter).net,
        refiner=args.refiner,
        embeddings=args.embedding,
    )
    try:
        if loras := _loras(args):
            pipe.set_lora(dict(loras))
        check_embeddings(args.embedding_hashes, pipe.embeddings.current)
    except BaseException:
        pipe.close()
        raise
    return pipe


def _loras(args: argparse.Namespace) -> LoraSet:
    """The LoRA files that are typed, else those of an image's text; the weights of one that is
    named twice add up.
    """
    typed = [(name, parse_weight(weight)) for name, weight in map(parse_lora, args.lora)]
    named = typed or list(args.loras.items())
    return check_lora_set(merge_loras((find_lora(name), weight) for name, weight in named))


def check_arguments(args: argparse.Namespace) -> GenerationOptions:
    """The generation options of a command line. Raises SdrtError for what does not fit the bundle,
    before any of its engines is loaded.
    """
    if not args.output.is_dir() and args.output.suffix.lower() not in ("", *SUFFIXES):
        raise UsageError(
            f"--output {args.output}: unsupported suffix; expected {', '.join(SUFFIXES)}",
            hint="or pass a folder",
        )
    for name in ("mask_image", "strength"):
        if args.image is None and getattr(args, name) is not None:
            raise UsageError(
                f"{args.flags[name]} requires --image",
                hint="pass the image to edit with --image FILE",
            )
    nets = open_control_bundles(args.control)
    options = options_from_arguments(args, nets)
    others = list(nets.values())
    if args.ip_adapter:
        others.append(open_bundle(parse_ip_adapter(args.ip_adapter).net))
        check_is_ip_adapter(others[-1].manifest)
    refiner = open_bundle(args.refiner) if args.refiner else None
    pipe = unloaded_pipeline(open_bundle(args.bundle), others, refiner)
    if pipe.accepts_prompt and not args.prompt:
        raise UsageError("no prompt was given", hint='for example `sdrt run "a red circle"`')
    check_quotes(args.prompt)
    chosen = with_scheduler(pipe, args.scheduler, args.scheduler_option)
    job = chosen.validate(args.prompt or None, options)
    loras = _loras(args)
    group_by_lora_set(job.requests, options, loras)
    for path, weight in loras:
        read_lora(path, weight)
    return options


def check_quotes(prompts: Sequence[str]) -> None:
    """Raise UsageError for prompts of one word, which are one prompt whose quotes are missing."""
    if len(prompts) > 1 and not any(re.search(r"[\s,]", prompt) for prompt in prompts):
        raise UsageError(
            f"{len(prompts)} prompts of one word",
            hint=f'quote the prompt: `sdrt run "{" ".join(prompts)}"`; for an image of each word, '
            f'add a comma: `sdrt run "{prompts[0]}," ...`',
        )


def with_scheduler(pipe: Pipeline, name: str | None, settings: Sequence[str]) -> Pipeline:
    """The pipeline with a scheduler, and options of it."""
    chosen = pipe if name is None else pipe.with_scheduler(name)
    if not settings:
        return chosen
    config = dict(chosen.scheduler_config)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key and equals):
            raise UsageError(
                f"--scheduler-option {setting!r} is not KEY=VALUE", hint="for example eta=0.5"
            )
        try:
            config[key] = json.loads(text)
        except ValueError:
            config[key] = text
        if not is_scheduler_option(key):
            near = closest(key, FIELDS)
            raise UsageError(
                f"unknown --scheduler-option {key}",
                hint=f"did you mean {near}?" if near else f"one of {', '.join(sorted(FIELDS))}",
            )
    return chosen.with_scheduler(config)


def run(args: argparse.Namespace) -> None:
    """Print the path of every image, or JSON; an interruption keeps what is finished."""
    began = time.perf_counter()
    options = check_arguments(args)
    with open_pipeline(args) as pipe, ExitStack() as stack:
        chosen = with_scheduler(pipe, args.scheduler, args.scheduler_option)
        loaded = time.perf_counter()
        watchers = stack.enter_context(_bar(args))
        if args.preview:
            watchers.append(stack.enter_context(_preview(chosen, args.output)))
        on_step = partial(_notify, watchers) if watchers else None  # None: one call may do it all
        job = chosen.create_job(args.prompt or None, options)
        for prompt in args.prompt if args.verbose else ():
            steps, weighting = options.num_inference_steps, options.weighting
            count = chosen.count_tokens(prompt, num_inference_steps=steps, weighting=weighting)
            log.debug("%s: %s", shorten(prompt), count)
        writer = stack.enter_context(ThreadPoolExecutor(1))
        total = 1 if args.grid else max(1, len(args.prompt)) * args.num_images_per_prompt
        finished: list[tuple[Request, Image.Image]] = []
        writing: dict[int, Future[Path]] = {}
        try:
            for request, image in stream_by_lora_set(chosen, job, on_step):
                if is_flagged(image):
                    print_line(FLAGGED.format(request.seed), sys.stderr)
                finished.append((request, image))
                if not args.grid:
                    text = chosen.parameters_text(request, job)
                    file = image_file(args.output, request, total)
                    writing[request.index] = writer.submit(_write, image, file, text, args.json)
                for future in writing.values():
                    if future.done():
                        future.result()  # a full disk ends the run
        finally:
            for future in writing.values():
                future.result()
            finished.sort(key=lambda pair: pair[0].index)
            paths = [writing[index].result() for index in sorted(writing)]
            if finished and args.grid:
                paths = [_write_grid(chosen, job, finished, args)]
    if args.json:
        report = {
            "images": [str(path) for path in paths],
            "seeds": [request.seed for request, _ in finished],
            "flagged": [is_flagged(image) for _, image in finished],
            "flat": [is_flat(image) for _, image in finished],
            "safety_checker": "safety_checker" in pipe.engines,
            "bundle": pipe.manifest.name,
            "backend": pipe.backend,
            "load_seconds": round(loaded - began, 4),
            "run_seconds": round(time.perf_counter() - loaded, 4),
        }
        print(json.dumps(report))


def _write(image: Image.Image, file: "File", text: str, silent: bool) -> Path:
    """An image's file, while the next image is made."""
    path = save_image(image, file.path, text, replace=file.replace)
    if not silent:
        print_line(str(path), sys.stdout)
    return path


def _write_grid(
    pipe: Pipeline,
    job: GenerationJob,
    finished: Sequence[tuple[Request, Image.Image]],
    args: argparse.Namespace,
) -> Path:
    """One image of all, with a text that holds every seed."""
    requests = [request for request, _ in finished]
    text = pipe.grid_parameters_text(replace(job, requests=requests))
    grid = make_grid([image for _, image in finished])
    return _write(grid, image_file(args.output, requests[0], 1), text, args.json)


def _notify(watchers: Sequence[Callable[[Step], None]], step: Step) -> None:
    for watcher in watchers:
        watcher(step)


class File(NamedTuple):
    """Where an image goes, and whether a file that is there is replaced."""

    path: Path
    replace: bool


def image_file(output: Path, request: Request, total: int) -> File:
    """The file named, which is replaced, or numbered if there are several images; in a folder, the
    first words of the image's own prompt with its seed, and its number if there are several.
    """
    number = f"-{request.index}" if total > 1 else ""
    if output.suffix and not output.is_dir():
        return File(output.with_stem(f"{output.stem}{number}"), total == 1)
    prompt = request.prompt.lower()[:60]
    letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in prompt)
    stem = "-".join(part for part in letters.split("-") if part) or "image"
    return File(output / f"{stem}{number}-{request.seed}.png", replace=False)


@contextmanager
def _bar(args: argparse.Namespace) -> Iterator[list[Callable[[Step], None]]]:
    """A progress bar on a terminal, over the steps as they were asked for: some schedulers
    evaluate the UNet more often than once a step.
    """
    if args.quiet or not sys.stderr.isatty():
        yield []
        return
    from tqdm import tqdm

    with tqdm(total=args.num_inference_steps, unit=" steps", leave=False) as bar:

        def on_step(step: Step) -> None:
            if step.index == 1:
                bar.reset(args.num_inference_steps)
                bar.set_description_str("Generating", refresh=False)
            bar.update(step.index * args.num_inference_steps // step.total - bar.n)
            if step.index == step.total:
                bar.set_description_str("Decoding")

        yield [on_step]


@contextmanager
def _preview(pipe: Pipeline, output: Path) -> Iterator[Callable[[Step], None]]:
    """The image as it forms: in the terminal where that shows images, else in a file that is
    replaced at every step and deleted at the end.
    """
    preview, protocol = Preview(pipe.manifest.preview), terminal_graphics()
    # A unique name, since the file is deleted at the end.
    path = (output.parent if output.suffix else output) / f"sdrt-{os.getpid()}.preview.png"
    if not protocol:
        print(f"preview: {path}", file=sys.stderr)

    def on_step(step: Step) -> None:
        image = preview.image(step)
        scale = max(1, PREVIEW_SIDE // max(image.size))
        large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if protocol:
            sys.stderr.write("\x1b7" + protocol(_png(large)) + "\x1b8")
            sys.stderr.flush()
        else:
            save_image(large, path, f"step {step.index} of {step.total}")

    try:
        yield on_step
    finally:
        if not protocol:
            path.unlink(missing_ok=True)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
