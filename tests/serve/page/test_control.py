"""The page's control image, on a server with `outline`, the ControlNet of the embedded model."""

import pytest
from browsing import (
    download_image,
    expect,
    generate,
    open_page,
    wait_until_finished,
    wait_until_loaded,
)
from PIL import Image, ImageDraw
from serving import PROMPT, run_server

import sdrt

pytestmark = [pytest.mark.browser, pytest.mark.integration]
FIELDS = {"num_inference_steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def server(shapes):
    with run_server(shapes, controlnet="outline") as running:
        yield running


@pytest.fixture
def edges(tmp_path):
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).ellipse((6, 6, 38, 38), outline="white")
    image.save(tmp_path / "edges.png")
    return tmp_path / "edges.png"


def test_a_control_image_steers_the_image(browser, server, shapes, edges):
    with sdrt.load(shapes, backend="onnxruntime", controlnet="outline") as pipe:
        plain = pipe(PROMPT, **FIELDS).images[0]
        control = {"control_image": edges, "controlnet_conditioning_scale": 0.8}
        steered = pipe(PROMPT, **FIELDS, **control).images[0]
    with open_page(browser, server) as page:
        wait_until_loaded(page)
        expect(page.locator("#control-field")).to_be_visible()
        for hidden in ("#adapter-field", "#control-strength"):
            expect(page.locator(hidden)).to_be_hidden()
        page.set_input_files("#control-file", edges)
        generate(page, controlnet_conditioning_scale=0.8, **FIELDS)
        wait_until_finished(page)
        assert download_image(page).tobytes() == steered.tobytes()
        page.click("#control-remove")
        expect(page.locator("#control-strength")).to_be_hidden()
        generate(page, **FIELDS)
        wait_until_finished(page, 2)
        assert download_image(page).tobytes() == plain.tobytes()
