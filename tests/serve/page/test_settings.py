"""The page in a real Chromium: settings come back from files, history and masks."""

import io

import pytest
from browsing import downloaded, drop, expect, finished, generate, png
from PIL import Image
from serving import PROMPT

pytestmark = [pytest.mark.browser, pytest.mark.slow]


TEXT = """a "quoted" (circle:1.2)
on a green background
Negative prompt: text, blurry
Steps: 33, Sampler: DPM++ 2M Karras, CFG scale: 4.5, Seed: 18446744073709551615, Size: 64x64, \
Model: shapes, Denoising strength: 0.35, RNG: CPU, Version: sdrt 0.1.0"""


FIELDS = {
    "prompt": "",
    "negative_prompt": "text, blurry",
    "num_inference_steps": "33",
    "scheduler": "DPM++ 2M Karras",
    "guidance_scale": "4.5",
    "seed": str(2**64 - 1),
    "size": "64x64",
    "strength": "0.35",
}


@pytest.mark.parametrize(
    ("text", "add"),
    [
        (TEXT, lambda info, text: info.add_text("parameters", text)),
        (TEXT, lambda info, text: info.add_text("parameters", text, zip=True)),
        (TEXT.replace("circle", "cercle né"), lambda info, text: info.add_itxt("parameters", text)),
        ("圆 " + TEXT, lambda info, text: info.add_itxt("parameters", text, zip=True)),
    ],
    ids=["tEXt", "zTXt", "iTXt", "zipped iTXt"],
)
def test_a_dropped_png_brings_its_settings_back(page, text, add):
    drop(page, "circle.png", png(lambda info: (info.add_text("Software", "x"), add(info, text))))
    expect(page.locator("#message")).to_have_text("Settings read from circle.png.")
    read = {name: page.input_value(f"#{name}") for name in FIELDS}
    assert read == FIELDS | {"prompt": text.split("\nNegative")[0]}
    slider = page.get_by_role("slider", name="Steps")
    assert slider.input_value() == "33"


def test_a_png_of_others_is_read_as_far_as_this_server_has_it(page):
    other = "a cat\nSteps: 8, Sampler: Restart, Size: 512x512, Model: elsewhere"
    file = {"name": "cat.png", "mimeType": "image/png"}
    file["buffer"] = png(lambda info: info.add_text("parameters", other))
    page.set_input_files("#settings-file", file)
    expect(page.locator("#message")).to_contain_text("elsewhere, 512x512, Restart")
    assert page.input_value("#num_inference_steps") == "8"
    assert page.input_value("#size") == "64x64"


def test_the_dropped_file_that_is_no_picture_is_told(page):
    drop(page, "notes.txt", b"hello", kind="text/plain")
    expect(page.locator("#error")).to_have_text("notes.txt has no settings.")
    drop(page, "cut.png", png(lambda info: info.add_text("parameters", TEXT))[:60])
    expect(page.locator("#message")).to_contain_text("cut.png has no settings")


def test_history_outlives_a_reload_and_restores_settings(page):
    page.select_option("#scheduler", "Euler a")
    generate(page, num_inference_steps=3, guidance_scale=2.5, seed=11, negative_prompt="blurry")
    finished(page)
    page.select_option("#scheduler", "DDIM")
    generate(page, "a white cross", num_inference_steps=2, guidance_scale=1, seed="")
    finished(page, 2)
    page.fill("#prompt", "not yet asked for")
    page.reload()
    finished(page, 2)
    expect(page.locator("#prompt")).to_have_value("not yet asked for")
    page.locator(".tile").nth(1).click()
    expect(page.locator("#caption-settings")).to_contain_text("seed 11")
    page.click("#restore")
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    for name, value in {"negative_prompt": "blurry", "seed": "11", "scheduler": "Euler a"}.items():
        assert page.input_value(f"#{name}") == value
    assert page.input_value("#guidance_scale") == "2.5"
    before = downloaded(page).tobytes()
    page.click("#generate")
    finished(page, 3)
    assert downloaded(page).tobytes() == before


def test_a_seed_is_reused_and_let_go(page):
    generate(page, num_inference_steps=2)
    finished(page)
    page.click("#reuse-seed")
    assert page.input_value("#seed") in page.locator("#caption-settings").inner_text()
    page.click("#random-seed")
    assert page.input_value("#seed") == ""


def test_a_picture_starts_from_a_picture(page, pipe):
    start = pipe("a yellow square", seed=1, num_inference_steps=8).images[0]
    file = io.BytesIO()
    start.save(file, "PNG")
    expect(page.locator("#strength")).to_be_hidden()
    drop(page, "start.png", file.getvalue(), onto="#start")
    expect(page.locator("#start-image")).to_be_visible()
    generate(page, num_inference_steps=10, seed=2, strength=0.5)
    finished(page)
    alone = pipe(PROMPT, seed=2, num_inference_steps=10, image=start, strength=0.5)
    assert downloaded(page).tobytes() == alone.images[0].tobytes()
    page.reload()
    page.click("#restore")
    expect(page.locator("#start-image")).to_be_visible()
    page.click("#start-remove")
    expect(page.locator("#strength")).to_be_hidden()


def test_only_what_is_painted_changes(page, pipe):
    start = pipe("a yellow square", seed=1, num_inference_steps=8).images[0]
    file = io.BytesIO()
    start.save(file, "PNG")
    drop(page, "start.png", file.getvalue(), onto="#start")
    page.click("#mask-open")
    page.fill("#mask-brush", "50")
    box = page.locator("#mask-paint").bounding_box()
    page.mouse.move(box["x"], box["y"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"], box["y"], steps=4)
    page.mouse.up()
    page.keyboard.press("Escape")  # leaves all as it was
    expect(page.locator("#mask-state")).to_be_empty()
    page.click("#mask-open")
    expect(page.locator("#mask-paint")).to_be_focused()
    for key in ("ArrowUp", "ArrowUp", "ArrowLeft", "ArrowLeft", *["Shift+ArrowRight"] * 4):
        page.keyboard.press(key)
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#mask-state")).to_have_text("Mask set.")
    generate(page, "a white cross", num_inference_steps=10, seed=2, strength=1)
    finished(page)
    alpha = kept_mask(page).getchannel("A")
    assert alpha.size == (64, 64)
    assert [alpha.getpixel(at) for at in ((0, 4), (60, 4), (32, 40))] == [0, 0, 255]
    light = alpha.point(lambda value: 255 if value == 0 else 0)
    options = {"seed": 2, "num_inference_steps": 10, "image": start, "strength": 1.0}
    alone = pipe("a white cross", mask_image=light, **options).images[0]
    assert downloaded(page).tobytes() == alone.tobytes()
    page.reload()
    page.click("#restore")
    expect(page.locator("#mask-state")).not_to_be_empty()
    page.click("#mask-open")
    page.click("#mask-clear")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#mask-state")).to_be_empty()


def kept_mask(page):
    """Of the newest picture, as the browser keeps it."""
    data = page.evaluate(
        """async () => {
            const asked = (request) => new Promise((done) => {
                request.onsuccess = () => done(request.result);
            });
            const database = await asked(indexedDB.open("sdrt"));
            const store = database.transaction("pictures").objectStore("pictures");
            const { settings } = (await asked(store.getAll())).at(-1);
            return [...new Uint8Array(await settings.mask.arrayBuffer())];
        }"""
    )
    return Image.open(io.BytesIO(bytes(data)))
