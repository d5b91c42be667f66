"""Images and masks prepared for `img2img`, compared with scipy, Pillow and plain arithmetic."""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import correlate1d

from sdrt.serve.routes.sdapi.inpainting import (
    CROP,
    FILL,
    JUST_RESIZE,
    InpaintingSettings,
    binary_mask,
    blur_mask,
    masked_region,
    prepare_input,
    resize_image,
)

RNG = np.random.default_rng(0)
PLAIN = InpaintingSettings(blur=(0, 0), invert=False, only_masked=False, padding=0, fill=False)


def noise(width, height, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(RNG.integers(0, 256, shape, np.uint8))


def boxed(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def gaussian(values, deviation, axis):
    radius = int(2.5 * deviation + 0.5)
    weights = np.exp(-(np.arange(-radius, radius + 1.0) ** 2) / (2 * deviation**2))
    blur_mask = correlate1d(values.astype(float), weights / weights.sum(), axis, mode="mirror")
    return np.rint(blur_mask)


@pytest.mark.parametrize("blur", [(4, 4), (9, 0), (0, 3), (64, 64), (0, 0)])
def test_blur_equals_scipys(blur):
    mask = noise(50, 37, 1)
    expected = np.asarray(mask)
    for axis, deviation in ((1, blur[0]), (0, blur[1])):
        expected = gaussian(expected, deviation, axis) if deviation else expected
    assert np.abs(np.asarray(blur_mask(mask, blur), float) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_mask_from_alpha_or_luminance(mode):
    light = boxed((8, 8), (0, 0, 8, 4))
    generated = Image.new("RGB", (8, 8), "white").convert(mode)
    generated.putalpha(light.point(lambda value: 200 if value else 100))
    assert np.array_equal(binary_mask(generated, False), light)
    assert np.array_equal(binary_mask(generated, True), light.point(lambda value: 255 - value))
    opaque = light.convert(mode)
    assert np.array_equal(binary_mask(opaque, False), light)
    assert np.array_equal(binary_mask(light.convert("1"), False), light)


def test_resize_modes():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 4, 20))
    for size in ((32, 32), (64, 24), (24, 64)):
        for mode in (JUST_RESIZE, CROP, FILL):
            assert resize_image(image, size, mode).size == size
    only_masked = resize_image(image, (20, 20), CROP)
    assert np.array_equal(only_masked, image.crop((10, 0, 30, 20)))
    filled = np.asarray(resize_image(image, (40, 40), FILL))
    assert np.array_equal(filled[10:30], image)
    assert (filled[:10] == filled[10]).all() and (filled[30:] == filled[29]).all()


def test_masked_region_has_the_requested_ratio():
    mask = boxed((100, 80), (10, 60, 20, 75))
    left, top, right, bottom = masked_region(mask, 4, (64, 64))
    assert right - left == bottom - top == 23  # the taller side with its padding, cut by the edge
    assert left <= 6 and right >= 24 and top <= 56 and bottom == 79
    assert masked_region(mask, 0, (128, 64))[3] - masked_region(mask, 0, (128, 64))[1] == 15
    assert masked_region(boxed((100, 80), (95, 0, 100, 80)), 0, (64, 64)) == (20, 0, 100, 80)


def test_unmasked_area_is_unchanged():
    image, mask = noise(64, 64), boxed((64, 64), (16, 16, 48, 40))
    result = Image.new("RGB", (64, 64), "white")
    for only_masked in (False, True):
        how = InpaintingSettings((0, 0), False, only_masked, 4, fill=True)
        pasted = np.asarray(prepare_input(image, mask, (64, 64), JUST_RESIZE, how).finish(result))
        inside = np.asarray(mask) > 0
        assert (pasted[inside] == 255).all()
        assert np.array_equal(pasted[~inside], np.asarray(image)[~inside])


def test_only_masked_generates_at_full_size():
    image, mask = noise(200, 120), boxed((200, 120), (50, 40, 70, 60))
    how = InpaintingSettings((0, 0), False, True, 6, fill=False)
    prepared = prepare_input(image, mask, (64, 64), JUST_RESIZE, how)
    assert prepared.image.size == prepared.mask.size == (64, 64)
    expected = image.crop((44, 34, 76, 66)).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(prepared.image, expected)
    assert prepared.finish(Image.new("RGB", (64, 64))).size == image.size


def test_infotext_of_inpainting():
    image, mask = noise(64, 32), boxed((64, 32), (16, 16, 48, 30))
    plain = InpaintingSettings((4, 4), False, True, 8, fill=True)
    assert prepare_input(image, None, (64, 32), CROP, plain).infotext == {}
    only_masked = prepare_input(image, None, (64, 64), CROP, plain)
    assert only_masked.infotext == {"Resize mode": "Crop and resize"}
    assert prepare_input(image, mask, (64, 64), JUST_RESIZE, plain).infotext == {
        "Mask blur": "4",
        "Mask mode": "Inpaint masked",
        "Masked content": "fill",
        "Inpaint area": "Only masked",
        "Masked area padding": "8",
    }


def test_empty_mask_with_only_masked():
    image = noise(64, 64)
    how = InpaintingSettings((4, 4), False, True, 0, fill=True)
    prepared = prepare_input(image, Image.new("L", (64, 64)), (64, 64), JUST_RESIZE, how)
    assert prepared.mask is None and np.array_equal(prepared.image, image)


def test_fill_starts_from_the_surroundings():
    image = Image.new("RGB", (64, 64), (20, 200, 40))
    image.paste("red", (24, 24, 40, 40))
    mask = boxed((64, 64), (20, 20, 44, 44))
    how = InpaintingSettings((0, 0), False, False, 0, fill=True)
    start = np.asarray(prepare_input(image, mask, (64, 64), JUST_RESIZE, how).image, float)
    assert np.abs(start - (20, 200, 40)).max() <= 8  # shares of 8 bits, premultiplied
    stored = prepare_input(image, mask, (64, 64), JUST_RESIZE, PLAIN).image
    assert np.array_equal(stored, image)
