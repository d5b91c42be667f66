"""The embedded IP-Adapter: what it is trained on, that it fits its model, and that it works."""

import numpy as np
from PIL.Image import fromarray
from shapes_likeness import DESCRIPTION, describe, lone_scene, vary
from shapes_reader import verdict
from shapes_scenes import caption, draw

import sdrt
from sdrt.bundle import open_bundle


def scenes(count):
    rng = np.random.default_rng(2032)
    return [lone_scene(rng) for _ in range(count)]


def shows_colours(output, scene):
    read = verdict(np.asarray(output.images[0]), scene)
    return read.background and read.colour


def test_scenes_of_one_caption_differ():
    rng = np.random.default_rng(1)
    for scene in scenes(30):
        other = vary(scene, rng)
        assert caption(other) == caption(scene) and other != scene
        assert verdict(draw(other, 64), scene).shape


def test_a_description_tells_colours_and_shapes_apart():
    described = [describe(scene, draw(scene, 32)) for scene in scenes(30)]
    assert {d.shape for d in described} == {(DESCRIPTION,)}
    assert len({d[:10].tobytes() for d in described}) > 20
    assert np.abs(described).max() < 2.5


def test_it_fits_the_model(shapes):
    unet = open_bundle(shapes).manifest.components["unet_control"]
    (reads,) = (spec for spec in unet.inputs if spec.name == "ip_adapter_kv")
    (gives,) = open_bundle("likeness").manifest.components["ip_adapter"].outputs
    assert gives.name == reads.name and gives.shape[-1] == reads.shape[-1]


def test_an_empty_prompt_and_an_image_give_the_images_colours(shapes):
    right, free = 0, 0
    with sdrt.load(shapes, backend="onnxruntime", ip_adapter="likeness") as pipe:
        for seed, scene in enumerate(scenes(4)):
            options = {"num_inference_steps": 10, "seed": seed}
            example = fromarray(draw(scene, 64))
            right += shows_colours(pipe("", ip_adapter_image=example, **options), scene)
            free += shows_colours(pipe("", **options), scene)
    assert right >= 3 and free <= 1  # it is right on 97 of 100 images
