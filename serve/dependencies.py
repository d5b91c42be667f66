"""State that all endpoints share, and the submission of requests to the engine."""

import asyncio
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from sdrt.bundle import parse_size
from sdrt.errors import UsageError
from sdrt.runtime import GenerationOptions
from sdrt.runtime.batching.request import GeneratedImage, RequestHandle
from sdrt.runtime.hires import parse_hires_sizes

from .errors import ApiError
from .gallery import Gallery
from .job import ImageJob
from .metrics import Metrics
from .model_manager import LoadedModel, ModelManager
from .rate_limits import RateLimiter
from .settings import Settings

log = logging.getLogger("sdrt.serve")

T = TypeVar("T")
UPSCALER_NAME = re.compile(r"([^\W_][\w. ()-]*)?")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A validated request for images; `options` are `GenerationOptions` by name."""

    model: LoadedModel
    prompt: str
    options: Mapping[str, Any]
    scheduler: str | Mapping[str, Any] | None = None
    priority: int = 0
    deadline: float | None = None
    loras: Mapping[str, float] | None = None

    @property
    def size(self) -> str:
        return self.options["size"] or self.model.sizes[0]

    @property
    def hires_size(self) -> tuple[int, int] | None:
        """(width, height) of the second pass, if any; raises UsageError for an unsupported one."""
        named = ("hires_scale", "hires_size")
        asked = {name: self.options[name] for name in named if self.options.get(name) is not None}
        if not asked:
            return None
        first = parse_size(normalize_size(self.size))
        return parse_hires_sizes(GenerationOptions(**asked), first, self.model.pipe.manifest)[1]

    @property
    def num_images(self) -> int:
        count: int = self.options["num_images_per_prompt"]
        return count

    @property
    def equivalent_steps(self) -> int:
        """Steps of an image; those of a second pass as steps of the first size that take as long.

        Raises:
            ApiError, UsageError: For an unsupported size.
        """
        steps: int = self.options["num_inference_steps"]
        if second := self.hires_size:
            width, height = parse_size(normalize_size(self.size))
            area = second[0] * second[1] / (width * height)
            steps += math.ceil((self.options.get("hires_steps") or steps) * area)
        return steps

    @property
    def pixel_steps(self) -> int:
        """Images × pixels × steps."""
        width, height = parse_size(normalize_size(self.size))
        return self.num_images * width * height * self.equivalent_steps

    @property
    def output_size(self) -> str:
        """Of the images."""
        return "{}x{}".format(*self.hires_size) if self.hires_size else self.size


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The state of one server. `pool` runs what would block the event loop: image files, sampler
    tables. `gallery`: None where nothing is stored.
    """

    settings: Settings
    models: ModelManager
    metrics: Metrics
    limiter: RateLimiter
    gallery: Gallery | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "sdrt-serve"))

    async def run_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    async def encode_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `run_in_thread`, for what writes image files."""
        with self.settings.tracing.start_encode():
            return await self.run_in_thread(function, *arguments)

    async def submit(
        self, request: EngineRequest, *, owner: str = "", steps: bool = False
    ) -> ImageJob:
        """Submit a request to its engine and follow it. A gallery stores what it generates.

        Args:
            request: What to generate.
            owner: Of the request, by `get_owner`.
            steps: Whether the job also reports every step.

        Raises:
            ApiError, UsageError, RequestRejected: The engine does not accept the request, or it
                exceeds the limits of the owner's API key.
        """
        self.check_work(request)
        if self.settings.log_prompts:
            log.info("prompt: %r", request.prompt)
        job = ImageJob()
        handles = await self._submit_within_limits(request, owner, job if steps else None)
        steps = request.options["num_inference_steps"]
        self.settings.tracing.follow_images(  # first: before the response ends
            request.model.name, request.output_size, steps, handles
        )
        job.attach(handles)
        self.models.hold(request.model, handles)
        if self.gallery is not None:
            for handle in job.handles:
                handle.future.add_done_callback(partial(_store, self.gallery, owner))
        return job

    async def _submit_within_limits(
        self, request: EngineRequest, owner: str, job: ImageJob | None
    ) -> Sequence[RequestHandle]:
        """Submit a request and count it for its API key, if it is accepted."""
        usage = self.limiter.find(owner)
        if usage is None:
            return await self.run_in_thread(self._submit_blocking, request, job)
        work = request.num_images, request.pixel_steps
        usage.reserve(*work)
        try:
            handles = await self.run_in_thread(self._submit_blocking, request, job)
        except BaseException:
            usage.refund(*work)
            raise
        for handle in handles:
            handle.future.add_done_callback(usage.finish_image)
        return handles

    def _submit_blocking(
        self, request: EngineRequest, job: ImageJob | None
    ) -> Sequence[RequestHandle]:
        return request.model.engine.submit(
            request.prompt,
            request.options,
            scheduler=request.scheduler,
            priority=request.priority,
            deadline=request.deadline,
            on_step=job.on_step if job else None,
            loras=request.loras,
        )

    def check_work(self, request: EngineRequest) -> None:
        """Raise ApiError 400 for an unsupported size or for more work than one request may need."""
        upscaler = request.options.get("hires_upscaler") or ""
        if not UPSCALER_NAME.fullmatch(upscaler):  # a client names no folder of this machine
            raise ApiError(400, f"unknown upscaler {upscaler!r}", "hires_upscaler", "invalid_value")
        width, height = parse_size(normalize_size(request.size))
        multiple = request.model.pipe.manifest.multiple
        if request.size not in request.model.sizes and (width % multiple or height % multiple):
            sizes = ", ".join(request.model.sizes)
            raise ApiError(
                400,
                f"size {request.size}; {request.model.name} supports {sizes} and multiples of "
                f"{multiple}",
                "size",
                "invalid_value",
            )
        self._check_size(request, (width, height))
        if request.hires_size:
            self._check_size(request, request.hires_size)
        count, steps = request.num_images, request.equivalent_steps
        limit = self.settings.max_work // (width * height)
        if count * steps > limit:
            raise ApiError(
                400,
                f"{count} images of {request.size} with {steps} steps; images times steps may be "
                f"at most {limit} at this size",
                code="too_much_work",
            )

    def _check_size(self, request: EngineRequest, size: tuple[int, int]) -> None:
        """Raise ApiError 400 for an image of more pixels than this server generates."""
        sizes = request.model.pipe.manifest.sizes
        width, height = self.settings.max_size or (
            2 * side for side in max(sizes, key=lambda sides: sides[0] * sides[1])
        )
        if size[0] * size[1] > width * height:
            raise ApiError(
                400,
                f"size {size[0]}x{size[1]}; this server generates images of at most as many pixels "
                f"as {width}x{height} for {request.model.name} (`sdrt serve --max-size`)",
                "size",
                "invalid_value",
            )


def get_context(request: Request) -> ServerContext:
    context: ServerContext = request.app.state.context
    return context


def get_owner(request: Request) -> str:
    """The digest of the request's API key; empty without keys."""
    keys, index = get_context(request).settings.keys, request.state.owner
    return keys[index].digest.hex() if keys and index is not None else ""


def _store(gallery: Gallery, owner: str, future: "Future[GeneratedImage]") -> None:
    """Called in an engine's thread when an image has ended."""
    if not future.cancelled() and future.exception() is None:
        result = future.result()
        gallery.add_later(owner, result.image, result.parameters)


def normalize_size(text: str) -> str:
    """`WIDTHxHEIGHT` without leading zeros; raises ApiError 400."""
    try:
        width, height = parse_size(text)
    except UsageError as error:
        raise ApiError(400, str(error), "size", "invalid_value") from None
    return f"{width}x{height}"
