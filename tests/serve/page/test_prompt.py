"""The page's prompts: token counts, weights by keyboard, LoRAs and embeddings."""

import shutil

import pytest
from browsing import download_image, expect, generate, open_page, wait_until_finished
from lora_files import lora_file
from PIL import Image
from serving import PROMPT

import sdrt

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(home, embedded):
    folder = home / "loras"
    folder.mkdir()
    lora_file(folder / "style.safetensors", embedded, "kohya")
    lora_file(folder / "detail.safetensors", embedded, "kohya", seed=1)
    Image.new("RGB", (40, 40), "red").save(folder / "style.preview.png")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def page(browser, server, folder):
    with open_page(browser, server) as page:
        expect(page.locator("#networks-open")).to_be_visible()
        yield page


def test_tokens_are_counted(page, pipe):
    for field, prompt in (("prompt", PROMPT), ("negative_prompt", "a cat " * 40)):
        page.fill(f"#{field}", prompt)
        counted = pipe.count_tokens(prompt)
        text = f"{counted.tokens}/{counted.limit}"
        expect(page.locator(f"#{field}-tokens")).to_have_text(text)


WEIGHTS = [
    ("a red circle", "red", ["Up"], "a (red:1.1) circle"),
    ("a red circle on blue", "red circle ", ["Up", "Up"], "a (red circle:1.2) on blue"),
    ("a (red:1.1) circle", "red", ["Down"], "a red circle"),
    ("a (red) circle", "red", ["Up"], "a (red:1.2) circle"),
    ("a red circle", "", ["Down"], "a red (circle:0.9)"),
    ("a (red cat:1.3), dog", "cat", ["Up"], "a (red (cat:1.1):1.3), dog"),
    ("<lora:style:1>", "style", ["Up", "Up"], "<lora:style:1.1>"),
    ("a (red:0.1)", "red", ["Down", "Down"], "a (red:0)"),
]


def test_weights_are_changed_by_keyboard(page):
    for text, selected, keys, expected in WEIGHTS:
        page.fill("#prompt", text)
        start = text.index(selected) if selected else len(text)
        page.evaluate(
            "([start, end]) => document.querySelector('#prompt').setSelectionRange(start, end)",
            [start, start + len(selected)],
        )
        for key in keys:
            page.keyboard.press(f"Control+Arrow{key}")
        assert page.input_value("#prompt") == expected


def test_a_changed_weight_can_be_undone(page):
    page.fill("#prompt", "a red circle")
    page.keyboard.press("Control+ArrowUp")
    expect(page.locator("#prompt")).to_have_value("a red (circle:1.1)")
    page.keyboard.press("Control+z")
    expect(page.locator("#prompt")).to_have_value("a red circle")


def test_loras_are_inserted_weighted_and_removed(page, shapes):
    page.fill("#prompt", PROMPT)
    page.click("#networks-open")
    cards = page.locator("#networks button")
    expect(cards).to_have_count(2)
    image = page.locator("#networks li[data-name=style] img")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 40
    page.fill("#networks-search", "STY")
    expect(cards.filter(visible=True)).to_have_count(1)
    cards.filter(visible=True).click()
    expect(cards.filter(visible=True)).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Escape")
    expect(page.locator("#prompt")).to_have_value(f"{PROMPT} <lora:style:1>")
    weight = page.get_by_label("style", exact=True)
    weight.fill("0.5")
    expect(page.locator("#prompt")).to_have_value(f"{PROMPT} <lora:style:0.5>")
    options = {"num_inference_steps": 3, "guidance_scale": 5, "seed": 7}
    generate(page, page.input_value("#prompt"), **options)
    wait_until_finished(page)
    with sdrt.load(shapes, backend="onnxruntime") as pipe:
        pipe.set_lora({"style": 0.5})
        alone = pipe(PROMPT, **options)
    assert download_image(page).tobytes() == alone.images[0].tobytes()
    page.get_by_role("button", name="Remove style").click()
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    expect(page.locator("#loras li")).to_have_count(0)
