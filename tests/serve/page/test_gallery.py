"""The page's view of the server's gallery."""

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
from serving import api_keys, run_server

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    with run_server(shapes, gallery_folder=folder, keys=api_keys("key")) as running:
        yield running


@pytest.fixture
def page(browser, server):
    with open_page(browser, server, rejections=True) as page:
        page.fill("#key", "key")
        page.keyboard.press("Enter")
        expect(page.locator("#stored-open")).to_be_visible()
        yield page


def test_stored_images_are_searched_opened_and_deleted(page):
    for prompt, seed in (("a red circle", 1), ("a blue square", 2)):
        generate(page, prompt, num_inference_steps=2, seed=seed, guidance_scale=4)
        wait_until_finished(page, seed)
    page.locator(".tile").nth(1).click()
    expected = download_image(page)
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#clear")
    expect(page.locator("#tiles li")).to_have_count(0)
    page.click("#stored-open")
    cards = page.locator("#stored li")
    expect(cards).to_have_count(2)
    thumbnail = cards.first.locator("img")
    expect(thumbnail).to_have_attribute("src", re.compile("^blob:"))
    page.fill("#stored-search", "CIRCLE")
    expect(cards).to_have_count(1)
    cards.locator(".tile").click()
    expect(page.locator("#stored-dialog")).to_be_hidden()
    expect(page.locator("#caption-prompt")).to_have_text("a red circle")
    image = download_image(page)
    assert (image.tobytes(), image.text) == (expected.tobytes(), expected.text)
    page.click("#restore")
    assert page.input_value("#seed") == "1"
    assert page.input_value("#guidance_scale") == "4"
    page.click("#stored-open")
    expect(cards).to_have_count(2)
    page.once("dialog", lambda dialog: dialog.accept())
    cards.first.get_by_role("button", name="Delete: a blue square").click()
    expect(cards).to_have_count(1)
    page.fill("#stored-search", "square")
    expect(page.locator("#stored-state")).to_have_text("No images")


def test_a_server_without_a_gallery_offers_none(browser, shapes):
    with run_server(shapes) as plain, open_page(browser, plain) as page:
        wait_until_loaded(page)
        expect(page.locator("#cost")).not_to_be_empty()
        expect(page.locator("#stored-open")).to_be_hidden()
