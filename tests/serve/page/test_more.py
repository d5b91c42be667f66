"""The page's section of more settings, what it says they cost, and its list of sizes."""

import io

import pytest
from browsing import download_image, drop, expect, generate, wait_until_finished
from serving import PROMPT

pytestmark = pytest.mark.browser

FIELDS = {
    "guidance_start": "0.2",
    "guidance_end": "0.8",
    "guidance_rescale": "0.5",
    "feature_reuse": "2",
    "feature_reuse_order": "1",
    "hires_scale": "1.5",
    "hires_steps": "4",
    "hires_strength": "0.6",
}
OPTIONS = {
    "guidance_interval": (0.2, 0.8),
    "guidance_rescale": 0.5,
    "feature_reuse": 2,
    "feature_reuse_order": 1,
    "hires_scale": 1.5,
    "hires_steps": 4,
    "hires_strength": 0.6,
    "hires_upscaler": "Lanczos",
}


def test_settings_reach_the_image_and_come_back(page, pipe):
    page.select_option("#scheduler", "Euler")
    page.click("#more-summary")
    expect(page.locator("#hires-settings")).to_be_hidden()
    for name, value in FIELDS.items():
        page.fill(f"#{name}", value)
    page.select_option("#hires_upscaler", "Lanczos")
    expect(page.locator("#more-changed")).to_have_text("8 changed")
    generate(page, num_inference_steps=6, seed=4)
    wait_until_finished(page)
    image = download_image(page)
    euler = pipe.with_scheduler("Euler")
    alone = euler(PROMPT, num_inference_steps=6, guidance_scale=7.5, seed=4, **OPTIONS)
    assert image.text["parameters"] == alone.parameters[0]
    assert image.tobytes() == alone.images[0].tobytes()
    page.click("#reset-more")
    expect(page.locator("#more-changed")).to_be_empty()
    page.click("#restore")
    assert {name: page.input_value(f"#{name}") for name in FIELDS} == FIELDS
    page.click("#reset-more")
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=_text(image))
    drop(page, "again.png", file.getvalue())
    expect(page.locator("#message")).to_have_text("Settings read from again.png.")
    assert {name: page.input_value(f"#{name}") for name in FIELDS} == FIELDS
    assert page.input_value("#hires_upscaler") == "Lanczos"


def _text(image):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", image.text["parameters"])
    return info


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_presets_are_those_of_the_server(page, pipe, preset):
    page.select_option("#scheduler", "Euler")
    page.click("#more-summary")
    expect(page.locator("#feature-reuse-order-field")).to_be_hidden()
    page.select_option("#preset", preset)
    generate(page, num_inference_steps=6, seed=4)
    wait_until_finished(page)
    alone = pipe.with_scheduler("Euler")(
        PROMPT, num_inference_steps=6, guidance_scale=7.5, seed=4, preset=preset
    )
    image = download_image(page)
    assert image.tobytes() == alone.images[0].tobytes()
    page.fill("#output_reuse", "4")
    expect(page.locator("#preset")).to_have_value("")
    page.click("#reset-more")
    expect(page.locator("#preset")).to_have_value("exact")


def test_the_cost_follows_the_settings(page):
    page.select_option("#scheduler", "Euler")
    page.fill("#num_inference_steps", "10")
    cost = page.locator("#cost")
    expect(cost).to_contain_text("10\u00a0evaluations · 20\u00a0rows")
    page.click("#more-summary")
    page.fill("#guidance_end", "0.5")
    expect(cost).to_contain_text("10\u00a0evaluations · 15\u00a0rows")
    page.fill("#feature_reuse", "5")
    expect(cost).to_contain_text("shallow")
    page.fill("#guidance_end", "7")
    expect(cost).to_be_empty()
    page.click("#more-summary")
    generate(page)
    expect(page.locator("#error")).to_have_text("Guidance until must be from 0 to 1.")
    expect(page.locator("#guidance_end")).to_be_focused()


def test_an_edit_has_no_second_pass(page, pipe):
    start = pipe(PROMPT, num_inference_steps=2, seed=1).images[0]
    file = io.BytesIO()
    start.save(file, "PNG")
    page.click("#more-summary")
    page.fill("#hires_scale", "2")
    page.fill("#guidance_end", "0.5")
    drop(page, "start.png", file.getvalue(), onto="#start")
    expect(page.locator("#hires-field")).to_be_hidden()
    generate(page, num_inference_steps=6, seed=2, strength=0.5)
    wait_until_finished(page)
    options = {"num_inference_steps": 6, "guidance_scale": 7.5, "seed": 2, "strength": 0.5}
    alone = pipe(PROMPT, image=start, guidance_interval=(0.0, 0.5), **options)
    assert download_image(page).tobytes() == alone.images[0].tobytes()


def test_aspect_ratios_are_listed_and_swapped(page):
    assert page.locator("#size option").evaluate_all("list => list.map(({ value }) => value)") == [
        *("64x64", "80x48", "48x80", "96x48", "48x96", "custom")
    ]
    page.select_option("#size", "80x48")
    page.click("#swap-size")
    assert page.input_value("#size") == "48x80"
    generate(page, num_inference_steps=2)
    wait_until_finished(page)
    assert download_image(page).size == (48, 80)


def test_the_model_line_names_backend_and_precision(page):
    expect(page.locator("#engine")).to_have_text("onnxruntime on cpu · fp32")
