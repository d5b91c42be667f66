"""How well the embedded model follows 200 captions, at several guidance scales.

    python benchmarks/shapes_quality.py [--sheet FILE] [--save]

`--sheet` writes a contact sheet of the first captions at guidance 7.5.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from results import save

import sdrt
from sdrt.runtime.images import make_grid

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from shapes_reader import verdict
from shapes_scenes import caption, scene_from_random


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    rng = np.random.default_rng(2026)
    scenes = [scene_from_random(rng) for _ in range(200)]
    fractions: dict[str, dict[str, float]] = {}
    with sdrt.load("shapes") as pipe:
        for guidance in (1.0, 3.0, 5.0, 7.5, 10.0):
            out = pipe([caption(s) for s in scenes], guidance_scale=guidance, seed=0)
            read = [verdict(np.asarray(i), s) for i, s in zip(out.images, scenes, strict=True)]
            values = {
                name: np.mean([getattr(v, name) for v in read])
                for name in ("background", "colour", "shape")
            }
            text = "  ".join(f"{name} {100 * value:5.1f} %" for name, value in values.items())
            print(f"guidance {guidance:4}: {text}")
            fractions[str(guidance)] = {name: float(value) for name, value in values.items()}
            if guidance == 7.5 and args.sheet:
                make_grid(out.images[:32], columns=8).save(args.sheet)
    if args.save:
        at = " %, ".join(f"{name} {100 * value:.1f}" for name, value in fractions["7.5"].items())
        claim = "`shapes` at guidance 7.5, 200 captions: correct"
        save("shapes_quality", {claim: f"{at} %"}, {"shares": fractions})


if __name__ == "__main__":
    main()
