"""The earlier name of `sdrt.runtime.batching.engine`; it goes with the next release."""

from .batching.engine import InflightBatcher as InFlight

__all__ = ["InFlight"]
