"""What strangers write into pictures' files."""

import time
from pathlib import Path

import pytest

from sdrt.errors import UsageError
from sdrt.runtime.images import image_array, image_from_bytes, settings_from_text, text_of


@pytest.mark.parametrize("letters", ["a", " ", "a:", 'a: "b', ",", '\\"', 'a:"\\'])
def test_a_text_is_taken_apart_in_no_time(letters):
    began = time.monotonic()
    settings_from_text("a cat\n" + letters * (300_000 // len(letters)))
    assert time.monotonic() - began < 1.0  # letters alone took five minutes


def test_settings_are_told_apart_by_commas_outside_of_quotes():
    text = 'a cat: grey\nSteps: 20, Size: 64x64, Note: "a, b: \\"c\\"", Hires-fix: 2, Empty: '
    assert settings_from_text(text) == {
        **{"Prompt": "a cat: grey", "Negative prompt": "", "Steps": "20", "Size": "64x64"},
        **{"Note": '"a, b: \\"c\\""', "Hires-fix": "2", "Empty": ""},
    }


def test_damaged_exif_is_no_failure():
    data = (Path(__file__).parent.parent / "corpus" / "image" / "damaged_exif.webp").read_bytes()
    assert text_of(image_from_bytes(data, 64)) == ""
    with pytest.raises(UsageError, match="cannot be decoded"):
        image_array(image_from_bytes(data, 64), (8, 8))
