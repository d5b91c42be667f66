"""Stored costs of calls: they are in a bundle's folder, and may be untrusted."""

import pytest

from sdrt.runtime.batching.cost_model import _costs_from_json

GOOD = {"calls": {"1": 0.5, "2": 0.7}, "bytes": {"1": 100}, "most": 2, "full": 4, "decode": 0.1}


def test_figures_are_read():
    costs = _costs_from_json({"encode": 0.1, "sizes": {"64x32": GOOD}})
    assert (
        costs.sizes[64, 32].call_seconds == {1: 0.5, 2: 0.7} and costs.sizes[64, 32].max_rows == 2
    )


@pytest.mark.parametrize(
    "change",
    [
        {"calls": {}},
        {"calls": {"1": 0.0}},
        {"calls": {"0": 1.0}},
        {"calls": {"1": -1.0}},
        {"calls": {"1": float("inf")}},
        {"calls": {"1": "1"}},
        {"bytes": {}},
        {"bytes": {"1": 10**30}},
        {"most": 0},
        {"most": 10**9},
        {"full": 0},
        {"decode": None},
    ],
)
def test_figures_that_are_none_are_refused(change):
    with pytest.raises((ValueError, KeyError, TypeError)):
        _costs_from_json({"encode": 0.1, "sizes": {"64x32": {**GOOD, **change}}})
