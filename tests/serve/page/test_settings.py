"""The page in a real Chromium: settings from files and history, input images, masks."""

import io

import pytest
from browsing import download_image, drop, expect, generate, png_file, wait_until_finished
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
def test_dropped_png_restores_its_settings(page, text, add):
    drop(
        page, "circle.png", png_file(lambda info: (info.add_text("Software", "x"), add(info, text)))
    )
    expect(page.locator("#message")).to_have_text("Settings read from circle.png.")
    read = {name: page.input_value(f"#{name}") for name in FIELDS}
    assert read == FIELDS | {"prompt": text.split("\nNegative")[0]}
    slider = page.get_by_role("slider", name="Steps")
    assert slider.input_value() == "33"


def test_png_of_another_server_restores_available_settings(page):
    other = "a cat\nSteps: 8, Sampler: Restart, Size: 512x512, Model: elsewhere"
    file = {"name": "cat.png", "mimeType": "image/png"}
    file["buffer"] = png_file(lambda info: info.add_text("parameters", other))
    page.set_input_files("#settings-file", file)
    expect(page.locator("#message")).to_contain_text("elsewhere, Restart")
    assert page.input_value("#num_inference_steps") == "8"
    custom = [page.input_value(f"#{name}") for name in ("size", "width", "height")]
    assert custom == ["custom", "512", "512"]


def test_dropped_file_without_settings_is_reported(page):
    drop(page, "notes.txt", b"hello", kind="text/plain")
    expect(page.locator("#error")).to_have_text("notes.txt has no settings.")
    drop(page, "cut.png", png_file(lambda info: info.add_text("parameters", TEXT))[:60])
    expect(page.locator("#message")).to_contain_text("cut.png has no settings")


def test_history_survives_a_reload(page):
    page.select_option("#scheduler", "Euler a")
    generate(page, num_inference_steps=3, guidance_scale=2.5, seed=11, negative_prompt="blurry")
    wait_until_finished(page)
    page.select_option("#scheduler", "DDIM")
    generate(page, "a white cross", num_inference_steps=2, guidance_scale=1, seed="")
    wait_until_finished(page, 2)
    page.fill("#prompt", "not yet asked for")
    page.reload()
    wait_until_finished(page, 2)
    expect(page.locator("#prompt")).to_have_value("not yet asked for")
    page.locator(".tile").nth(1).click()
    expect(page.locator("#caption-settings")).to_contain_text("seed 11")
    page.click("#restore")
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    for name, value in {"negative_prompt": "blurry", "seed": "11", "scheduler": "Euler a"}.items():
        assert page.input_value(f"#{name}") == value
    assert page.input_value("#guidance_scale") == "2.5"
    before = download_image(page).tobytes()
    page.click("#generate")
    wait_until_finished(page, 3)
    assert download_image(page).tobytes() == before


def test_seed_reuse_and_random(page):
    generate(page, num_inference_steps=2)
    wait_until_finished(page)
    page.click("#reuse-seed")
    assert page.input_value("#seed") in page.locator("#caption-settings").inner_text()
    page.click("#random-seed")
    assert page.input_value("#seed") == ""


def test_image_to_image(page, pipe):
    start = pipe("a yellow square", seed=1, num_inference_steps=8).images[0]
    file = io.BytesIO()
    start.save(file, "PNG")
    expect(page.locator("#strength")).to_be_hidden()
    drop(page, "start.png", file.getvalue(), onto="#start")
    expect(page.locator("#start-image")).to_be_visible()
    generate(page, num_inference_steps=10, seed=2, strength=0.5)
    wait_until_finished(page)
    alone = pipe(PROMPT, seed=2, num_inference_steps=10, image=start, strength=0.5)
    assert download_image(page).tobytes() == alone.images[0].tobytes()
    page.reload()
    page.click("#restore")
    expect(page.locator("#start-image")).to_be_visible()
    page.click("#start-remove")
    expect(page.locator("#strength")).to_be_hidden()


def test_only_the_masked_area_changes(page, pipe):
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
    wait_until_finished(page)
    alpha = stored_mask(page).getchannel("A")
    assert alpha.size == (64, 64)
    assert [alpha.getpixel(at) for at in ((0, 4), (60, 4), (32, 40))] == [0, 0, 255]
    light = alpha.point(lambda value: 255 if value == 0 else 0)
    options = {"seed": 2, "num_inference_steps": 10, "image": start, "strength": 1.0}
    alone = pipe("a white cross", mask_image=light, **options).images[0]
    assert download_image(page).tobytes() == alone.tobytes()
    page.reload()
    page.click("#restore")
    expect(page.locator("#mask-state")).not_to_be_empty()
    page.click("#mask-open")
    page.click("#mask-clear")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#mask-state")).to_be_empty()


def stored_mask(page):
    """The mask of the newest image, as stored in the browser."""
    data = page.evaluate(
        """async () => {
            const asked = (request) => new Promise((done) => {
                request.onsuccess = () => done(request.result);
            });
            const database = await asked(indexedDB.open("sdrt"));
            const [name] = database.objectStoreNames;
            const store = database.transaction(name).objectStore(name);
            const { settings } = (await asked(store.getAll())).at(-1);
            return [...new Uint8Array(await settings.mask.arrayBuffer())];
        }"""
    )
    return Image.open(io.BytesIO(bytes(data)))
