"""Images of the page's history: selected, downloaded as one file, compared, zoomed, removed."""

import io
import zipfile
from pathlib import Path

import pytest
from browsing import download_image, expect, generate, wait_until_finished
from PIL import Image

pytestmark = pytest.mark.browser


@pytest.fixture
def page(page):
    generate(page, "a né circle / 圆", num_inference_steps=2, seed=5, count=3)
    wait_until_finished(page, 3)
    return page


def download_zip(page):
    with page.expect_download() as download:
        page.click("#download-zip")
    return zipfile.ZipFile(Path(download.value.path()))


def test_selected_images_are_downloaded_as_a_zip(page):
    page.locator(".tile").nth(0).click()
    expected = download_image(page)
    page.click("#select")
    expect(page.locator("#download-zip")).to_be_disabled()
    page.locator(".tile").nth(0).focus()
    page.keyboard.press("Space")
    page.locator(".tile").nth(2).click()
    expect(page.locator("#selection-count")).to_have_text("2 selected")
    with download_zip(page) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["a-né-circle-圆-5.png", "a-né-circle-圆-7.png"]
        image = Image.open(io.BytesIO(archive.read(archive.namelist()[0])))
    assert image.tobytes() == expected.tobytes()
    assert image.text == expected.text
    page.click("#remove-selected")
    expect(page.locator("#tiles li")).to_have_count(1)
    expect(page.locator("#selection")).to_be_hidden()
    page.reload()
    wait_until_finished(page, 1)
    expect(page.locator("#caption-settings")).to_contain_text("seed 6")


def test_removed_images_stay_removed_when_the_page_is_left_at_once(page):
    for i in (0, 2):
        page.locator(".tile").nth(i).click(modifiers=["Control"])
    with page.expect_event("load"):
        page.evaluate("document.querySelector('#remove-selected').click(); location.reload()")
    wait_until_finished(page, 1)
    expect(page.locator("#caption-settings")).to_contain_text("seed 6")


def test_images_of_one_name_are_numbered(page):
    generate(page, "a né circle / 圆", num_inference_steps=2, seed=5, count=1)
    wait_until_finished(page, 4)
    for i in (0, 1):
        page.locator(".tile").nth(i).click(modifiers=["Control"])
    with download_zip(page) as archive:
        assert archive.namelist() == ["a-né-circle-圆-5.png", "a-né-circle-圆-5-2.png"]


def test_two_images_are_compared(page):
    page.locator(".tile").nth(0).click(modifiers=["Control"])
    expect(page.locator("#compare")).to_be_disabled()
    page.locator(".tile").nth(1).click(modifiers=["Control"])
    page.click("#compare")
    expect(page.locator("#compare-left-text")).to_contain_text("seed 5")
    expect(page.locator("#compare-right-text")).to_contain_text("seed 6")
    page.fill("#compare-split", "25")
    clip = "image => getComputedStyle(image).clipPath"
    assert page.locator("#compare-right").evaluate(clip) == "inset(0px 0px 0px 25%)"
    page.locator("#compare-split").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#compare-right").evaluate(clip) == "inset(0px 0px 0px 25.5%)"
    page.click("#compare-in")
    expect(page.locator("#compare-out")).to_be_enabled()
    page.click("#compare-close")
    expect(page.locator("#compare-dialog")).to_be_hidden()


def test_the_full_screen_view_zooms_at_the_pointer(page):
    page.click("#zoom-open")
    image = page.locator("#zoom-image")
    page.mouse.move(640, 400)
    before = image.bounding_box()
    page.mouse.wheel(0, -100)
    expect(page.locator("#zoom-out")).to_be_enabled()
    after = image.bounding_box()
    assert after["width"] == pytest.approx(1.25 * before["width"], abs=1)
    assert after["x"] + after["width"] / 2 == pytest.approx(640, abs=2)
    page.mouse.down()
    page.mouse.move(700, 400, steps=4)
    page.mouse.up()  # the end of a pan closes nothing
    expect(page.locator("#zoom-dialog")).to_be_visible()
    assert image.bounding_box()["x"] > after["x"]
    page.keyboard.press("0")
    expect(page.locator("#zoom-out")).to_be_disabled()
    assert image.bounding_box()["width"] == before["width"]
    page.mouse.click(640, 400)
    expect(page.locator("#zoom-dialog")).to_be_hidden()
