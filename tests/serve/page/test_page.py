"""The page in a real Chromium, with a real server and the embedded model: generating images."""

import re

import pytest
from browsing import (
    download_image,
    expect,
    generate,
    open_page,
    wait_until_finished,
    wait_until_loaded,
)
from lora_files import lora_file
from serving import PROMPT, api_keys, client, run_server, wait_for

import sdrt

pytestmark = pytest.mark.browser

LONG = 900  # steps: seconds
SIDEWAYS = {"viewport": {"width": 844, "height": 390}, "is_mobile": True, "has_touch": True}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def test_generated_image_equals_the_pipelines(page, pipe):
    generate(page, num_inference_steps=9, guidance_scale=5, seed=7)
    wait_until_finished(page)
    shown = page.locator("#image")
    expect(shown).to_have_attribute("alt", PROMPT)
    assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 64]
    box = shown.bounding_box()
    assert box["width"] == box["height"] > 400
    image = download_image(page)
    alone = pipe(PROMPT, num_inference_steps=9, guidance_scale=5.0, seed=7)
    assert image.tobytes() == alone.images[0].tobytes()
    assert image.text["parameters"] == alone.parameters[0]


@pytest.mark.rest
def test_previews_are_shown_while_generating(page):
    generate(page, num_inference_steps=150)
    expect(page.locator("#canvas[data-state=running] #image")).to_be_visible()
    previews = set()
    while page.locator("#canvas[data-state=running]").count() and len(previews) < 3:
        previews.add(page.locator("#image").get_attribute("src"))
        state = page.locator("#caption-state").inner_text()
        page.wait_for_timeout(50)
    assert len(previews) == 3
    assert re.fullmatch(r"Step \d+ of 15\d, \d+ (s|min) left", state)
    wait_until_finished(page)
    expect(page.locator("#progress")).to_be_hidden()


def metric(server, name):
    with client(server) as http:
        lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def running(server):
    return metric(server, "sdrt_running")


def cancelled(server):
    return metric(server, 'sdrt_pictures_total{model="shapes",state="cancelled"}')


@pytest.mark.rest
def test_queued_images_can_be_cancelled(page, server):
    before = cancelled(server)
    generate(page, num_inference_steps=LONG, count=6, seed=3)
    expect(page.locator("#tiles li")).to_have_count(6)
    expect(page.locator("#queue-count")).to_have_text("6 in progress")
    page.locator(".cancel-tile").nth(5).click()  # not yet sent
    page.locator(".cancel-tile").nth(1).click()
    expect(page.locator("#tiles li")).to_have_count(4)
    wait_for(lambda: running(server) == 4)
    page.click("#cancel-all")
    expect(page.locator("#tiles li")).to_have_count(0)
    wait_for(lambda: running(server) == 0)
    assert cancelled(server) >= before + 4  # none was finished instead


def test_images_of_one_request_have_consecutive_seeds(page):
    generate(page, num_inference_steps=2, count=6, seed=2**64 - 6)
    wait_until_finished(page, 6)
    seeds = []
    for i in range(6):
        page.locator(".tile").nth(i).click()
        seeds.append(download_image(page).text["parameters"].split("Seed: ")[1].split(",")[0])
    assert seeds == [str(2**64 - 6 + i) for i in range(6)]


def test_rejection_is_shown_and_keeps_the_form(browser, server):
    with open_page(browser, server, rejections=True) as page:
        generate(page, num_inference_steps=2)
        wait_until_finished(page)
        prompt = "a red circle " * 3000
        generate(page, prompt)
        expect(page.locator("#error")).to_contain_text("32000 characters")
        assert page.locator("#error").get_attribute("role") == "alert"
        assert page.input_value("#prompt") == prompt
        expect(page.locator("#tiles li")).to_have_count(2)
        expect(page.locator("#retry")).to_be_visible()
        generate(page)
        expect(page.locator("#error")).to_be_hidden()


def test_key_dialog_and_full_queue(browser, shapes):
    keys = api_keys("open sesame")
    with (
        run_server(shapes, keys=keys, slots=1, waiting=2) as strict,
        open_page(browser, strict, rejections=True) as page,
    ):
        page.fill("#key", "a wrong one")
        page.keyboard.press("Enter")
        expect(page.locator("#key-message")).to_have_text("The server rejected this key.")
        page.fill("#key", "open sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#size option")).not_to_have_count(0)
        page.reload()
        expect(page.locator("#size option")).not_to_have_count(0)
        page.select_option("#scheduler", "Heun")  # two evaluations a step
        generate(page, num_inference_steps=LONG)
        expect(page.locator("#tiles li[data-state=running]")).to_have_count(1)
        generate(page, count=2)
        waiting = page.locator("#tiles li[data-state=queued] .tile")
        expect(waiting).to_have_count(2)
        generate(page, count=1)
        expect(page.locator("#tiles li[data-state=failed]")).to_have_count(1)
        expect(page.locator("#error")).to_contain_text("Try again in")
        waiting.first.click(force=True)  # a busy page may not rest long enough for the checks
        expect(page.locator("#caption-state")).to_have_text(re.compile("Next in|Queued behind"))
        page.keyboard.press("Escape")
        expect(page.locator("#tiles li")).to_have_count(3)
        page.click("#cancel-all")
        expect(page.locator("#tiles li")).to_have_count(1)


def test_unreachable_server_is_reported_and_retried(browser, server):
    with open_page(browser, server, rejections=True) as page:
        wait_until_loaded(page).context.set_offline(True)
        generate(page, num_inference_steps=2)
        expect(page.locator("#error")).to_have_text("The server cannot be reached. Is it running?")
        page.context.set_offline(False)
        page.click("#retry")
        wait_until_finished(page)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_inference_steps", "0", "Steps must be a whole number from 1 to 1000."),
        ("num_inference_steps", "2.5", "Steps must be a whole number from 1 to 1000."),
        ("guidance_scale", "", "Guidance scale must be from 1 to 100."),
        ("seed", str(2**64), f"Seed must be a whole number from 0 to {2**64 - 1}"),
        ("seed", "-1", f"Seed must be a whole number from 0 to {2**64 - 1}"),
        ("prompt", " ", "Enter a prompt"),
    ],
)
def test_form_validation(page, field, value, message):
    page.fill("#prompt", PROMPT)
    generate(page, **({"prompt": value} if field == "prompt" else {field: value}))
    expect(page.locator("#error")).to_contain_text(message)
    expect(page.locator(f"#{field}")).to_be_focused()
    expect(page.locator("#tiles li")).to_have_count(0)


TABS = [
    *("prompt", "negative_prompt", "scheduler", "size", "swap-size"),
    *("num_inference_steps", "Steps", "guidance_scale", "Guidance scale", "count", "Images"),
    *("seed", "random-seed", "start-file", "more-summary", "plot-summary", "settings-file"),
]


@pytest.mark.rest
def test_keyboard_operation(page):
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type(PROMPT)
    reached = []
    while (name := page.evaluate("document.activeElement.id")) != "generate":
        outline = page.evaluate(
            """() => {
                const focused = document.activeElement;
                const seen = focused.type === "file"
                    ? document.querySelector(`label[for=${focused.id}]`) : focused;
                return getComputedStyle(seen).outlineStyle;
            }"""
        )
        assert outline == "solid", name
        reached.append(name or page.evaluate("document.activeElement.ariaLabel"))
        page.keyboard.press("Tab")
    assert reached == TABS
    for _ in range(len(TABS) - TABS.index("Guidance scale")):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#guidance_scale") == "8"
    page.keyboard.press("Control+Enter")
    wait_until_finished(page)
    page.fill("#num_inference_steps", str(LONG))
    page.keyboard.press("Control+Enter")
    expect(page.locator("#canvas[data-state=running]")).to_be_visible()
    page.keyboard.press("Escape")
    wait_until_finished(page)
    page.locator(".tile").first.focus()
    page.fill("#num_inference_steps", "2")
    page.keyboard.press("Control+Enter")
    wait_until_finished(page, 2)
    page.locator(".tile[tabindex='0']").focus()
    page.keyboard.press("ArrowLeft" if current(page) else "ArrowRight")
    assert current(page) in (0, 1)
    expect(page.locator(".tile[tabindex='0']")).to_be_focused()


def current(page):
    return page.locator(".tile").evaluate_all(
        "tiles => tiles.findIndex(tile => tile.ariaCurrent === 'true')"
    )


def test_prompt_is_never_interpreted_as_html(page):
    prompt = '<img src="http://example.org/x.png" onerror="alert(1)">'
    generate(page, prompt, num_inference_steps=2)
    wait_until_finished(page)
    expect(page.locator("#caption-prompt")).to_have_text(prompt)
    assert page.locator("#caption img, #tiles img[onerror]").count() == 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", [PHONE, {"viewport": {"width": 320, "height": 568}}, SIDEWAYS])
def test_phone_layout_does_not_scroll_sideways(browser, server, options):
    with open_page(browser, server, **options) as page:
        width = options["viewport"]["width"]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        wait_until_loaded(page)
        if width < 821:
            bottom, top = page.evaluate(
                """() => [document.querySelector("#empty").getBoundingClientRect().bottom,
                          document.querySelector("#fields").getBoundingClientRect().top]"""
            )
            assert bottom <= top
        page.fill("#prompt", PROMPT + " " + "x" * 200)
        page.fill("#num_inference_steps", "2")
        page.fill("#count", "8")
        page.click("#generate")
        wait_until_finished(page, 8)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        expect(page.locator("#image")).to_be_in_viewport()
        expect(page.locator("#generate")).to_be_in_viewport()  # always at hand


CONTRAST = """() => {
    const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b]
        .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (element) => {
        for (; element; element = element.parentElement) {
            const colour = parse(getComputedStyle(element).backgroundColor);
            if ((colour[3] ?? 1) > 0.5) return colour;
        }
    };
    const low = [];
    for (const element of document.querySelectorAll("body *")) {
        const text = element.matches("input, textarea, select") ||
            [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!text || !element.checkVisibility() || element.matches(":disabled, option")) continue;
        const [a, b] = [parse(getComputedStyle(element).color), ground(element)].map(light);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) low.push([element.outerHTML.slice(0, 80), ratio]);
    }
    return low;
}"""


@pytest.mark.sample(1)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_accessible_names(browser, server, scheme):
    with open_page(browser, server, rejections=True, color_scheme=scheme) as page:
        assert page.evaluate(CONTRAST) == []
        generate(page, "a red circle " * 3000)
        expect(page.locator("#error")).not_to_be_empty()
        assert page.evaluate(CONTRAST) == []
        ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (int(re.search(r"\d+", ground)[0]) < 60) == (scheme == "dark")
        for control in page.locator("input, textarea, select, button, a").all():
            if control.is_visible():
                expect(control).to_have_accessible_name(re.compile(r"\w"))


@pytest.mark.rest
def test_lora_tag_in_the_prompt(browser, server, embedded, shapes, home):
    """Applied if the file exists; else the page shows the error."""
    folder = home / "loras"
    folder.mkdir(exist_ok=True)
    path = lora_file(folder / "style.safetensors", embedded, "kohya")
    options = {"num_inference_steps": 3, "guidance_scale": 5, "seed": 7}
    with open_page(browser, server, rejections=True) as page:
        wait_until_loaded(page)
        generate(page, prompt=f"{PROMPT} <lora:styl:1>", **options)
        expect(page.locator("#error")).to_contain_text("did you mean style?")
    with open_page(browser, server) as page:
        wait_until_loaded(page)
        generate(page, prompt=f"{PROMPT} <lora:style:1>", **options)
        wait_until_finished(page)
        image = download_image(page)
    with sdrt.load(shapes, backend="onnxruntime") as pipe:
        pipe.set_lora({"style": 1.0})
        alone = pipe(PROMPT, **options)
    path.unlink()
    assert image.tobytes() == alone.images[0].tobytes()
    assert image.text["parameters"] == alone.parameters[0]


def test_image_is_shown_full_screen(page):
    generate(page, num_inference_steps=2)
    wait_until_finished(page)
    page.click("#zoom-open")
    box = page.locator("#zoom-image").bounding_box()
    assert (box["x"], box["y"], box["width"], box["height"]) == (0, 0, 1280, 800)
    expect(page.locator("#zoom-image")).to_have_attribute("alt", PROMPT)
    page.keyboard.press("Escape")
    expect(page.locator("#zoom-dialog")).to_be_hidden()
    expect(page.locator("#zoom-open")).to_be_focused()
    page.click("#zoom-open")
    page.click("#zoom-image")
    expect(page.locator("#zoom-dialog")).to_be_hidden()


def test_custom_size(page):
    expect(page.locator("#custom-size")).to_be_hidden()
    page.select_option("#size", "custom")
    generate(page, num_inference_steps=2, width=96, height=70)
    expect(page.locator("#error")).to_have_text("Height must be a multiple of 16 from 16 to 8192.")
    expect(page.locator("#height")).to_be_focused()
    generate(page, num_inference_steps=2, width=96, height=64)
    wait_until_finished(page)
    assert download_image(page).size == (96, 64)
    page.reload()
    wait_until_loaded(page)
    assert [page.input_value(f"#{name}") for name in ("size", "width")] == ["custom", "96"]


def test_example_prompts_of_the_model(page):
    expect(page.locator("#description")).to_contain_text("circle, square, triangle, cross")
    example = page.locator("#examples button").first
    prompt = example.inner_text()
    example.click()
    expect(page.locator("#prompt")).to_have_value(prompt)
    expect(page.locator("#prompt")).to_be_focused()


def test_api_reference_lists_every_endpoint(browser, server):
    with open_page(browser, server) as page:
        page.goto(f"http://127.0.0.1:{server.port}/docs")
        section = page.locator("#post--v1-images-generations")
        expect(section).to_contain_text("num_inference_steps")
        expect(section).to_contain_text("integer, 1 to 1000 · default 20")
        with client(server) as http:
            paths = http.get("/openapi.json").json()["paths"]
        expect(page.locator("section")).to_have_count(sum(map(len, paths.values())))
        expect(page.locator("#error")).to_be_empty()
