"""Timing of engines, whichever way a pipeline runs them."""

import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from sdrt.bench.timing import TimedEngine, time_engine
from sdrt.bench.worker import sdrt_parts
from sdrt.engine import ProgramEngine, SamplingResult
from sdrt.engine.protocol import UnfusedAttention

PAUSE = 0.02


class StandInUnet:
    """A UNet that only runs complete programs: it pauses, and decodes nothing."""

    def __init__(self, unet):
        self.inputs, self.outputs = unet.inputs, unet.outputs
        self.received = []

    def __call__(self, feeds):
        raise AssertionError("every image is one program")

    def run_program(self, program, encoder, decoder):
        self.received += [encoder, decoder]
        time.sleep(PAUSE)
        images, _, *shape = program.history.shape
        return SamplingResult(np.zeros((images, *shape), np.float32))


def test_a_program_counts_as_the_unets_time(pipe):
    unet, seconds = StandInUnet(pipe.engines["unet"]), defaultdict(float)
    own = replace(pipe, engines={**pipe.engines, "unet": unet})
    parts = sdrt_parts(own, "64x64", [2], seconds)
    parts["picture, 2 steps"]()
    assert seconds["unet"] >= PAUSE
    assert unet.received == [pipe.engines["text_encoder"], pipe.engines["vae_decoder"]]


@pytest.mark.parametrize("is_program_engine", [False, True])
def test_a_timed_engine_has_the_engines_capabilities(pipe, is_program_engine):
    engine = pipe.engines["unet"]
    timed = time_engine(StandInUnet(engine) if is_program_engine else engine, "unet", {})
    assert isinstance(timed, TimedEngine)
    assert isinstance(timed, ProgramEngine) == is_program_engine
    keeps = isinstance(engine, UnfusedAttention) and engine.keeps_scores
    assert timed.keeps_scores == (keeps and not is_program_engine)
