"""Opens the page in a real Chromium; fails on script errors and on requests to other hosts.

Needs playwright and a Chromium: `apt install chromium`, or `playwright install chromium`.
"""

import io
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from serving import PROMPT

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect

expect.set_options(timeout=60_000)
DESKTOP = {"viewport": {"width": 1280, "height": 800}}


@contextmanager
def chromium():
    """A browser; skips the test if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as play:
        if path is None and not Path(play.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt install chromium, or playwright install chromium")
        browser = play.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


@contextmanager
def open_page(browser, server, *, rejections=False, **options):
    """The page of a server; `rejections`: the test expects rejected requests."""
    own, errors = f"http://127.0.0.1:{server.port}/", []
    context = browser.new_context(**(DESKTOP | options))
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("request", lambda sent: is_foreign(sent.url, own) and errors.append(sent.url))
    page.goto(own)
    yield page
    context.close()
    prefix = "Failed to load resource"  # the browser's own message for an error status
    assert [line for line in errors if not (rejections and line.startswith(prefix))] == []


def wait_until_loaded(page):
    """Wait until the page knows the server's sizes."""
    expect(page.locator("#size option")).not_to_have_count(0)
    return page


def is_foreign(address, own):
    return not address.startswith((own, "blob:" + own, "data:"))


def generate(page, prompt=PROMPT, **fields):
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")


def wait_until_finished(page, count=1):
    expect(page.locator("#tiles li[data-state=done]")).to_have_count(count, timeout=60_000)
    expect(page.locator("#tiles li")).to_have_count(count)


def download_image(page):
    with page.expect_download() as download:
        page.click("#download")
    return Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))


def png_file(add):
    info, file = PngInfo(), io.BytesIO()
    add(info)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def drop(page, name, data, onto="body", kind="image/png"):
    page.locator(onto).evaluate(
        """(target, [name, data, type]) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([new Uint8Array(data)], name, { type }));
            for (const kind of ["dragover", "drop"])
                target.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true }));
        }""",
        [name, list(data), kind],
    )
