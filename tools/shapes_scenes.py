"""The world of the `shapes` model: scenes of one or two flat shapes, captions, images.

Knows numpy only. A scene is drawn from a seeded generator; `caption` says what is in it, `draw`
renders it with anti-aliased edges.
"""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 70, 220),
    "yellow": (245, 220, 40),
    "orange": (250, 135, 20),
    "purple": (140, 40, 180),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross")
RADII = {"small": (0.15, 0.19), "": (0.19, 0.25), "large": (0.25, 0.31)}
# The centre of a lone object, as shares of the image's width and height.
PLACES = {
    "": (0.5, 0.5),
    "on the left": (0.28, 0.5),
    "on the right": (0.72, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
}
# Where two objects are, by the words between them.
RELATIONS = {
    "and": ((0.27, 0.5), (0.73, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its words, and where it is in shares of the image's side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two things on a background; `words` is the place of one or the relation of two."""

    things: tuple[Thing, ...]
    background: str
    words: str


def scene_from_random(rng: np.random.Generator) -> Scene:
    """A scene whose neighbouring colours differ."""
    count = 1 if rng.random() < 0.7 else 2
    names = list(COLOURS)
    background = names[rng.integers(len(names))]
    others = [name for name in names if name != background]
    if count == 1:
        words = list(PLACES)[rng.integers(len(PLACES))] if rng.random() < 0.5 else ""
        centres = (PLACES[words],)
    else:
        words = list(RELATIONS)[rng.integers(len(RELATIONS))]
        centres = RELATIONS[words]
    things = []
    for centre in centres:
        sizes = ("", "small", "large") if count == 1 else ("", "small")
        size = sizes[rng.integers(len(sizes))]
        low, high = RADII[size] if count == 1 or size else (0.17, 0.21)
        jitter = rng.uniform(-0.03, 0.03, 2)
        things.append(
            Thing(
                shape=SHAPES[rng.integers(len(SHAPES))],
                colour=others[rng.integers(len(others))],
                size=size,
                x=centre[0] + jitter[0],
                y=centre[1] + jitter[1],
                radius=rng.uniform(low, high),
            )
        )
    return Scene(tuple(things), background, words)


def noun_phrase(*words: str) -> str:
    """`a` or `an` and the words: "an orange circle"."""
    phrase = " ".join(word for word in words if word)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def caption(scene: Scene) -> str:
    """ "a small red circle on the left on a blue background" and the like."""
    phrases = [noun_phrase(thing.size, thing.colour, thing.shape) for thing in scene.things]
    subject = f" {scene.words} ".join(phrases) if len(phrases) == 2 else phrases[0]
    place = f" {scene.words}" if len(phrases) == 1 and scene.words else ""
    return f"{subject}{place} on {noun_phrase(scene.background, 'background')}"


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline, negative inside; x to the right and y downwards from the centre."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    if shape == "triangle":
        slope = np.hypot(1.0, 0.5)
        side = (np.abs(x) - 0.5 * (y + radius)) / slope
        return np.maximum(side, y - radius) if radius else side
    arm = 0.3 * radius
    bar = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
    post = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
    return np.minimum(bar, post)


def draw(scene: Scene, side: int) -> np.ndarray:
    """The image, uint8 [side, side, 3]."""
    axis = np.arange(side, dtype=np.float32) + 0.5
    image = np.empty((side, side, 3), np.float32)
    image[:] = COLOURS[scene.background]
    for thing in scene.things:
        x, y = axis[None, :] - thing.x * side, axis[:, None] - thing.y * side
        distance = signed_distance(thing.shape, x, y, thing.radius * side)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        image += cover * (np.asarray(COLOURS[thing.colour], np.float32) - image)
    return np.round(image).astype(np.uint8)
