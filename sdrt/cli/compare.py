"""`sdrt compare`: one prompt by several schedulers, on one sheet.

Imported by the command line when it runs.
"""

import argparse
import json
import secrets
import sys
import time
from dataclasses import replace

from sdrt.bundle import open_bundle
from sdrt.errors import UsageError
from sdrt.runtime.images import SUFFIXES, make_labelled_grid, save_image
from sdrt.runtime.loading import unloaded_pipeline
from sdrt.runtime.lora.switch import apply_tags

from .run import open_pipeline, options_from_arguments
from .schedulers import all_titles


def check_schedulers(bundle: str | None, names: list[str]) -> None:
    """Raise UsageError for an unknown scheduler before anything is loaded."""
    pipe = unloaded_pipeline(open_bundle(bundle))
    for name in names:
        pipe.with_scheduler(name)


def compare(args: argparse.Namespace) -> None:
    """One prompt over schedulers and numbers of steps, on one labelled sheet; prints its path.

    All images have one seed. The file's text says how the first was made.
    """
    if args.output.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--output {args.output}: expected a file of {', '.join(SUFFIXES)}")
    steps = [int(part) for part in args.steps.split(",") if part.strip().isdigit()]
    if not steps or len(steps) != len(args.steps.split(",")):
        raise UsageError(f"--steps {args.steps!r}: expected integers", hint="for example 10,20,50")
    names = [name.strip() for name in (args.schedulers or "").split(",") if name.strip()]
    check_schedulers(args.bundle, names)
    images, labels, rows, texts = [], [], [], []
    with open_pipeline(args) as pipe:
        names = names or [title for title in all_titles() if title != "PNDM"]
        base = options_from_arguments(args)
        if base.seed is None:
            base = replace(base, seed=secrets.randbelow(2**32))
        chosen = [pipe.with_scheduler(name) for name in names]
        prompt = apply_tags(pipe, args.prompt)
        next(pipe.stream(prompt, replace(base, num_inference_steps=1)))  # warm
        for name, one in zip(names, chosen, strict=True):
            for count in steps:
                began = time.perf_counter()
                job = one.create_job(prompt, replace(base, num_inference_steps=count))
                request, image = next(one.stream_job(job))
                seconds = time.perf_counter() - began
                texts.append(one.parameters_text(request, job))
                images.append(image)
                labels.append(f"{name}\n{count} steps, {seconds:.2f} s")
                rows.append({"scheduler": name, "steps": count, "seconds": round(seconds, 4)})
                if not args.quiet:
                    print(f"{name:24} {count:4} steps {seconds:8.2f} s", file=sys.stderr)
    columns = len(steps) if len(steps) > 1 else None
    save_image(make_labelled_grid(images, labels, columns), args.output, texts[0])
    report = {"sheet": str(args.output), "seed": base.seed, "pictures": rows}
    print(json.dumps(report) if args.json else args.output)
