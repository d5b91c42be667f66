"""`sdrt schedulers`: the samplers by name. Imported by the command line when it runs."""

import argparse
import json
import sys
from typing import Any


def all_titles() -> list[str]:
    from sdrt.runtime.samplers.registry import titles

    return list(titles())


def schedulers(args: argparse.Namespace) -> None:
    """Every sampler with its names and what a step costs."""
    from sdrt.runtime.samplers.registry import SAMPLERS, SCHEDULES, supports_schedule, titles

    listed: list[dict[str, Any]] = []
    for name, sampler in SAMPLERS.items():
        named = [title for title, (class_name, _) in titles().items() if class_name == name]
        laws = [label for label in SCHEDULES if supports_schedule(named[0], label)]
        listed.append(
            {
                "name": name,
                "also": named,
                "with": laws,
                "evaluations_per_step": sampler.evaluations_per_step,
                "fresh_noise": sampler.adds_noise,
            }
        )
    if args.json:
        print(json.dumps(listed, indent=2))
        return
    rows = [("NAME", "ALSO", "UNET CALLS", "NOISE", "SCHEDULES")]
    for entry in listed:
        every = len(entry["with"]) == len(SCHEDULES)
        rows.append(
            (
                entry["name"],
                ", ".join(entry["also"]),
                f"{entry['evaluations_per_step']} a step",
                "every step" if entry["fresh_noise"] else "",
                "any" if every else ", ".join(entry["with"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, last in rows:
        columns = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)]
        print("  ".join([*columns, last]).rstrip())
    print(
        "\nAny name works with --scheduler; append a schedule of the last column to it, as in "
        f'"DPM++ 2M Karras". Schedules: {", ".join(SCHEDULES)}.',
        file=sys.stderr,
    )
