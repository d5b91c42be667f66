"""How well the embedded IP-Adapter makes images like 100 images that it was not trained on.

    python benchmarks/likeness.py [--sheet FILE] [--save]

The prompt is empty, or the caption of another image. `--sheet` writes the first images that are
prompts, under them those with an empty prompt, and those of the same seeds without.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image, fromarray
from results import save

import sdrt
from sdrt.runtime.images import make_grid

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from shapes_likeness import lone_scene
from shapes_reader import mask_of_object, verdict
from shapes_scenes import COLOURS, Scene, caption, draw

COUNT, SEED = 100, 2031
STEPS = 20


def colour_errors(image: np.ndarray, scene: Scene) -> tuple[float, float]:
    """Distances in RGB of an image's background and object from the scene's colours."""
    pixels = image.astype(np.float32)
    mask = mask_of_object(pixels)
    pairs = ((~mask, scene.background), (mask, scene.things[0].colour))
    back, thing = (float(np.linalg.norm(pixels[at].mean(0) - COLOURS[name])) for at, name in pairs)
    return back, thing


def overlap(image: np.ndarray, example: np.ndarray) -> float:
    """Intersection over union of the objects of two images."""
    one, other = (mask_of_object(pixels.astype(np.float32)) for pixels in (image, example))
    return float((one & other).sum() / (one | other).sum())


def score(images: Sequence[Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """Means over images, each against the scene of its image prompt."""
    arrays = [np.asarray(image) for image in images]
    read = [verdict(*pair) for pair in zip(arrays, scenes, strict=True)]
    errors = np.array([colour_errors(*pair) for pair in zip(arrays, scenes, strict=True)])
    overlaps = [overlap(a, draw(s, len(a))) for a, s in zip(arrays, scenes, strict=True)]
    return {
        "background distance": float(errors[:, 0].mean()),
        "object distance": float(errors[:, 1].mean()),
        "background": float(np.mean([v.background for v in read])),
        "colour": float(np.mean([v.colour for v in read])),
        "shape": float(np.mean([v.shape for v in read])),
        "overlap": float(np.mean(overlaps)),
    }


def generate(scenes: Sequence[Scene], prompts: Sequence[str], scale: float) -> list[Image]:
    """An image for each image prompt and text; a scale of 0 is without the image prompt."""
    with sdrt.load("shapes", ip_adapter="likeness") as pipe:
        return [
            pipe(
                prompt,
                ip_adapter_image=fromarray(draw(scene, 64)),
                ip_adapter_scale=scale,
                num_inference_steps=STEPS,
                seed=seed,
            ).images[0]
            for seed, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True))
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    scenes = [lone_scene(rng) for _ in range(args.count)]
    others = [lone_scene(rng) for _ in range(args.count)]
    empty, captions = [""] * args.count, [caption(other) for other in others]
    cases = {
        "empty prompt": (empty, 1.0),
        "empty prompt, without": (empty, 0.0),
        "another prompt": (captions, 1.0),
        "another prompt, without": (captions, 0.0),
    }
    figures, images = {}, {}
    for name, (prompts, scale) in cases.items():
        images[name] = generate(scenes, prompts, scale)
        figures[name] = score(images[name], scenes)
        print(name, {key: round(value, 3) for key, value in figures[name].items()})
    if args.sheet:
        rows = [fromarray(draw(scene, 64)) for scene in scenes[:8]]
        rows += [image for name in list(cases)[:2] for image in images[name][:8]]
        make_grid(rows, columns=8).save(args.sheet)
    if args.save:
        subject = f"`likeness`, {args.count} images, {{}}: background, colour and shape as shown"
        claims = {
            subject.format(name): ", ".join(
                f"{100 * of[key]:.0f} %" for key in ("background", "colour", "shape")
            )
            for name, of in figures.items()
        }
        save("likeness", claims, {"means": figures})


if __name__ == "__main__":
    main()
