"""Presets: options by name."""

from typing import get_args

import pytest

from sdrt.cli.arguments.sampling import PRESETS as TYPED
from sdrt.errors import UsageError
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.options import GenerationOptions
from sdrt.runtime.presets import PRESETS


def test_a_preset_is_its_options():
    for name, options in PRESETS.items():
        assert parse_options({"preset": name}) == GenerationOptions(**options)
    fast = parse_options({"preset": "fast"})
    assert fast.output_reuse == 5


def test_options_that_are_passed_go_first():
    chosen = parse_options({"preset": "fast", "output_reuse": 2, "num_inference_steps": None})
    assert chosen.output_reuse == 2
    other = parse_options({"preset": "fast", "feature_reuse": 2})
    assert (other.feature_reuse, other.output_reuse) == (2, 1)


@pytest.mark.parametrize("wrong", ["quick", 1, ["fast"]])
def test_an_unknown_preset_is_refused(wrong):
    with pytest.raises(UsageError, match="expected exact, balanced, fast"):
        parse_options({"preset": wrong})


def test_command_line_and_server_know_the_same():
    from sdrt.serve.schemas import GenerationRequest

    (sent, _) = get_args(GenerationRequest.model_fields["preset"].annotation)
    assert tuple(PRESETS) == TYPED == get_args(sent)
