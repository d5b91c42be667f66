"""Untrusted metadata in image files."""

from pathlib import Path

import pytest
from growth import LINEAR, growth

from sdrt.errors import UsageError
from sdrt.runtime.images import image_from_bytes, image_to_array, parse_parameters, read_parameters


@pytest.mark.parametrize("letters", ["a", " ", "a:", 'a: "b', ",", '\\"', 'a:"\\'])
def test_a_text_is_parsed_in_linear_time(letters):
    def parse(size):
        parse_parameters("a cat\n" + letters * (size // len(letters)))

    assert growth(parse, 5_000) < LINEAR


def test_settings_are_reported_apart_by_commas_outside_of_quotes():
    text = 'a cat: grey\nSteps: 20, Size: 64x64, Note: "a, b: \\"c\\"", Hires-fix: 2, Empty: '
    assert parse_parameters(text) == {
        **{"Prompt": "a cat: grey", "Negative prompt": "", "Steps": "20", "Size": "64x64"},
        **{"Note": '"a, b: \\"c\\""', "Hires-fix": "2", "Empty": ""},
    }


def test_damaged_exif_is_no_failure():
    data = (Path(__file__).parent.parent / "corpus" / "image" / "damaged_exif.webp").read_bytes()
    assert read_parameters(image_from_bytes(data, 64)) == ""
    with pytest.raises(UsageError, match="failed to decode"):
        image_to_array(image_from_bytes(data, 64), (8, 8))
