"""The earlier name of `sdrt.runtime.batching.request`; it goes with the next release."""

from .batching.request import Cancelled, Refused, Ticket

__all__ = ["Cancelled", "Refused", "Ticket"]
