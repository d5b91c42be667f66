"""The page's X/Y plot: what its cells contain, and the grid as one image."""

import io
from pathlib import Path

import pytest
from browsing import download_image, expect
from PIL import Image
from serving import PROMPT

pytestmark = pytest.mark.browser


def choose(page, side, name, values):
    page.select_option(f"#plot-{side}", name)
    page.fill(f"#plot-{side}-values", values)


def test_a_grid_varies_two_settings(page, pipe):
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "7")
    page.click("#plot-summary")
    choose(page, "x", "Sampler", "euler a, DDIM")
    choose(page, "y", "Steps", "2, 4")
    page.click("#plot-generate")
    expect(page.locator("#plot-state")).to_have_text("4 of 4 images")
    heads = page.locator("#plot-table th").all_inner_texts()
    assert heads == ["Sampler: Euler a", "Sampler: DDIM", "Steps: 2", "Steps: 4"]
    with page.expect_download() as download:
        page.click("#plot-download")
    grid = Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
    page.locator("#plot-table button").nth(3).click()  # DDIM, 4 steps
    expect(page.locator("#plot-dialog")).to_be_hidden()
    alone = pipe.with_scheduler("DDIM")(PROMPT, num_inference_steps=4, guidance_scale=7.5, seed=7)
    assert download_image(page).tobytes() == alone.images[0].tobytes()
    cell = grid.crop((grid.width - 200, grid.height - 228, grid.width - 8, grid.height - 36))
    small = cell.convert("RGB").resize((64, 64), Image.Resampling.NEAREST)
    assert small.tobytes() == alone.images[0].tobytes()
    page.click("#plot-open")
    expect(page.locator("#plot-dialog")).to_be_visible()


def test_one_axis_replaces_words_of_the_prompt(page):
    page.fill("#prompt", "a red circle")
    page.fill("#num_inference_steps", "2")
    page.click("#plot-summary")
    choose(page, "x", "Prompt S/R", "red, blue")
    page.locator("#plot-x-values").press("Enter")
    expect(page.locator("#plot-state")).to_have_text("2 of 2 images")
    page.locator("#plot-table button").nth(1).click()
    expect(page.locator("#caption-prompt")).to_have_text("a blue circle")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("", "1", "Choose what an axis of the grid changes."),
        ("Steps", "", "Steps: enter values, separated by commas."),
        ("Steps", "5, 2.5", "2.5: expected a whole number from 1 to 1000."),
        ("Sampler", "Nonsense", "Unknown sampler Nonsense."),
        ("Seed", "-1", "-1: expected a seed from 0 to"),
        ("LoRA weight", "1", "LoRA weight: the prompt names no LoRA."),
        ("Prompt S/R", "cat, dog", "Prompt S/R: “cat” is not in the prompt."),
        ("Steps", "1, " * 17, "Steps: 17 values; expected at most 16."),
    ],
)
@pytest.mark.sample(3)
def test_values_that_do_not_fit_are_reported(page, name, values, message):
    page.fill("#prompt", PROMPT)
    page.click("#plot-summary")
    choose(page, "x", name, values)
    page.click("#plot-generate")
    expect(page.locator("#error")).to_contain_text(message)
    expect(page.locator("#tiles li")).to_have_count(0)
