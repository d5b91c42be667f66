"""The earlier name of `sdrt.runtime.batching.request`; it goes with the next release."""

from .batching.request import RequestCancelled as Cancelled
from .batching.request import RequestHandle as Ticket
from .batching.request import RequestRejected as Refused

__all__ = ["Cancelled", "Refused", "Ticket"]
