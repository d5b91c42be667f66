"""The embedded ControlNet: what it is trained on, and that it fits its model."""

import numpy as np
from shapes_outlines import draw_outline, filled_outline, free_scene, outline_coverage
from shapes_reader import verdict
from shapes_scenes import caption, draw

from sdrt.bundle import open_bundle


def scenes(count=60):
    rng = np.random.default_rng(2027)
    return [free_scene(rng) for _ in range(count)]


def test_a_drawn_shape_fills_its_outline():
    for scene in scenes():
        image = draw(scene, 64)
        assert outline_coverage(image, scene) > 0.9, caption(scene)
        assert verdict(image, scene).shape


def test_captions_do_not_tell_where_shapes_are():
    """An image of the caption's shape at another place covers little of the outline."""
    first, *others = scenes()
    coverage = [outline_coverage(draw(other, 64), first) for other in others]
    assert np.mean(coverage) < 0.5
    assert len({caption(scene) for scene in (first, *others)}) > 1
    assert not any(word in caption(first) for word in (" left", " right", " top", "small", "large"))


def test_lines_are_around_what_is_filled():
    for scene in scenes(8):
        line, inside = draw_outline(scene, 64)[..., 0] > 127, filled_outline(scene, 64)
        assert (line & inside).any() and (line & ~inside).any() and (inside & ~line).any()
        assert not line[0].any() and line.mean() < 0.3


def test_its_residuals_are_those_that_the_model_reads(shapes):
    unet = open_bundle(shapes).manifest.components["unet_control"]
    reads = {spec.name: spec.shape for spec in unet.inputs if "_residual" in spec.name}
    outputs = open_bundle("outline").manifest.components["controlnet"].outputs
    assert {spec.name: spec.shape for spec in outputs} == reads
