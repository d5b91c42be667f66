"""The page in a real Chromium, held to this: no errors of its own, no requests to other hosts.

Wants playwright and a Chromium: `apt install chromium`, or `playwright install chromium`.
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

expect.set_options(timeout=20_000)
DESKTOP = {"viewport": {"width": 1280, "height": 800}}


@contextmanager
def chromium():
    """A browser; skips the test where there is none."""
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
def opened(browser, server, *, refusals=False, **options):
    """The page of a server. refusals: whether requests of this test are refused on purpose."""
    own, wrong = f"http://127.0.0.1:{server.port}/", []
    context = browser.new_context(**(DESKTOP | options))
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.on("request", lambda sent: foreign(sent.url, own) and wrong.append(sent.url))
    page.goto(own)
    yield page
    context.close()
    told = "Failed to load resource"  # the browser's own line for a refusal
    assert [line for line in wrong if not (refusals and line.startswith(told))] == []


def loaded(page):
    """Once the page knows what the server has."""
    expect(page.locator("#size option")).not_to_have_count(0)
    return page


def foreign(address, own):
    return not address.startswith((own, "blob:" + own, "data:"))


def generate(page, prompt=PROMPT, **fields):
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")


def finished(page, count=1):
    expect(page.locator("#tiles li[data-state=done]")).to_have_count(count, timeout=60_000)
    expect(page.locator("#tiles li")).to_have_count(count)


def downloaded(page):
    with page.expect_download() as download:
        page.click("#download")
    return Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))


def png(add):
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
