"""What once failed, or led somewhere new, does not fail; nor do a few thousand inputs near it.

`make fuzz` makes ten million, led by what they reach.
"""

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fuzz_targets
import pytest
from mutating import mutated

pytestmark = pytest.mark.integration

CORPUS = Path(__file__).parent.parent / "corpus"
RUNS = 600
HANG = 5.0  # seconds on the processor, where milliseconds are usual
MEMORY = 64e6  # bytes above twice the input


@pytest.fixture(scope="module")
def alone():
    """A process in which nothing else runs: what it grows by, the inputs took."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def inputs(name):
    """The kept ones, then others near them."""
    rng = random.Random(name)
    cached = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    yield from cached
    longest = fuzz_targets.TARGETS[name][2]
    for _ in range(RUNS):
        data = rng.choice(cached)
        for _ in range(rng.randint(1, 4)):
            data = mutated(data, rng, longest)
        yield data


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_nothing_sent_is_a_crash(name, alone):
    replay = alone.submit(fuzz_targets.replayed, name, list(inputs(name)))
    seconds, data, grown = replay.result()
    assert seconds < HANG, data
    assert grown < 2 * fuzz_targets.TARGETS[name][2] + MEMORY


def test_every_folder_of_the_corpus_has_its_target():
    assert {path.name for path in CORPUS.iterdir()} == set(fuzz_targets.TARGETS)
