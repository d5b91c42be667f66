"""What each API key has used of its limits: requests in the last minute, images in flight, and the
work of the day.

The counts are those of this process: a restart begins them again.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from .api_keys import ApiKey
from .errors import ApiError

MINUTE, DAY = 60.0, 86_400
IN_FLIGHT_RETRY_SECONDS = 1.0


class KeyUsage:
    """The usage of one key; its methods may be called from every thread.

    Attributes:
        requests: All requests for images that were accepted.
        images: All images of requests that were accepted.
        total_pixel_steps: Their work.
        refused: Requests that were refused, by the limit that they exceeded.
    """

    def __init__(
        self,
        key: ApiKey,
        monotonic: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.key, self._limits = key, key.limits
        self._monotonic, self._wall_clock = monotonic, wall_clock
        self.requests = self.images = self.total_pixel_steps = 0
        self.refused = {"requests": 0, "images": 0, "pixel_steps": 0}
        self._lock = threading.Lock()
        self._times: deque[float] = deque()
        self._in_flight = 0
        self._day, self._pixel_steps = 0, 0

    def count_request(self) -> None:
        """Count a request for images; raises ApiError 429 for one too many a minute."""
        with self._lock:
            if limit := self._limits.requests_per_minute:
                self._forget_times()
                if len(self._times) >= limit:
                    seconds = self._times[0] + MINUTE - self._monotonic()
                    raise self._refuse("requests", f"{limit} requests per minute", seconds)
                self._times.append(self._monotonic())
            self.requests += 1

    def reserve(self, images: int, pixel_steps: int) -> None:
        """Count the work of a request before it is submitted.

        Raises:
            ApiError: 429 if it exceeds what is left; 400 if it can never be accepted.
        """
        with self._lock:
            in_flight, quota = self._limits.images_in_flight, self._limits.pixel_steps_per_day
            self._begin_day()
            if in_flight and images > in_flight:
                raise self._refuse_size(f"{images} images; its limit is {in_flight} in flight")
            if quota and pixel_steps > quota:
                raise self._refuse_size(f"{pixel_steps} pixel-steps; its limit is {quota} per day")
            if in_flight and self._in_flight + images > in_flight:
                reason = f"{in_flight} images in flight, of which {self._in_flight} are unfinished"
                raise self._refuse("images", reason, IN_FLIGHT_RETRY_SECONDS)
            if quota and self._pixel_steps + pixel_steps > quota:
                reason = f"{quota} pixel-steps per day, of which {self._pixel_steps} are used"
                raise self._refuse("pixel_steps", reason, self._seconds_left())
            self._in_flight += images
            self._pixel_steps += pixel_steps
            self.images += images
            self.total_pixel_steps += pixel_steps

    def refund(self, images: int, pixel_steps: int) -> None:
        """Give back what a request that was not accepted had reserved."""
        with self._lock:
            self._in_flight -= images
            self._pixel_steps = max(0, self._pixel_steps - pixel_steps)
            self.images -= images
            self.total_pixel_steps -= pixel_steps

    def finish_image(self, _: "Future[Any] | None" = None) -> None:
        """Count one image in flight less; a callback of its future."""
        with self._lock:
            self._in_flight -= 1

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The `x-ratelimit-*` headers of the limits that the key has, in OpenAI's format."""
        limits = self._limits
        with self._lock:
            self._begin_day()
            self._forget_times()
            values: dict[str, object] = {}
            if requests := limits.requests_per_minute:
                reset = self._times[-1] + MINUTE - self._monotonic() if self._times else 0.0
                values |= {"limit-requests": requests}
                values |= {"remaining-requests": requests - len(self._times)}
                values |= {"reset-requests": f"{math.ceil(reset)}s"}
            if images := limits.images_in_flight:
                values |= {"limit-images": images, "remaining-images": images - self._in_flight}
            if quota := limits.pixel_steps_per_day:
                values |= {"limit-pixel-steps": quota}
                values |= {"remaining-pixel-steps": quota - self._pixel_steps}
                values |= {"reset-pixel-steps": f"{math.ceil(self._seconds_left())}s"}
        return [(f"x-ratelimit-{k}".encode(), str(v).encode()) for k, v in values.items()]

    def _forget_times(self) -> None:
        """Leave the times of the last minute."""
        began = self._monotonic() - MINUTE
        while self._times and self._times[0] <= began:
            self._times.popleft()

    def _begin_day(self) -> None:
        day = int(self._wall_clock() // DAY)
        if day != self._day:
            self._day, self._pixel_steps = day, 0

    def _seconds_left(self) -> float:
        """Until midnight, UTC."""
        return DAY - self._wall_clock() % DAY

    def _refuse(self, limit: str, reason: str, seconds: float) -> ApiError:
        self.refused[limit] += 1
        code = "insufficient_quota" if limit == "pixel_steps" else "rate_limit_exceeded"
        message = f"API key {self.key.name} is limited to {reason}"
        return ApiError(429, message, code=code, retry_after=seconds)

    def _refuse_size(self, reason: str) -> ApiError:
        message = f"the request of API key {self.key.name} asks for {reason}"
        return ApiError(400, message, code="too_much_work")


class RateLimiter:
    """The usage of every key of a server. usages: in the order of its keys"""

    def __init__(self, keys: Sequence[ApiKey] | None) -> None:
        self.usages = [KeyUsage(key) for key in keys or ()]
        self._by_owner = {usage.key.digest.hex(): usage for usage in self.usages}

    def find(self, owner: str) -> KeyUsage | None:
        """The usage of the key with this digest, None without keys."""
        return self._by_owner.get(owner)
