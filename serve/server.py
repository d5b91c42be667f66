"""The server process: uvicorn, model loading, signals and graceful shutdown."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sdrt.errors import DeviceLostError, UsageError
from sdrt.runtime.process_memory import limit_arenas, trim_heap

from .app import create_app
from .gallery import open_gallery
from .job_store import open_job_store
from .middleware import SecurityMiddleware
from .model_manager import ModelSource
from .routes.jobs import RunningJobs
from .settings import Settings

log = logging.getLogger("sdrt.serve")

MAX_OPEN_FILES = 65_536
CLOSE_SECONDS = 5
KEEP_ALIVE_SECONDS = 75
# Of uvicorn, ten a second: the C heap keeps free pages between those in use, ever more of them.
TRIM_TICKS = 100
ARENAS = 2  # heaps of the C library that the server's threads share


def serve(sources: Mapping[str, ModelSource], settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain running requests; a second signal stops at once.

    Args:
        sources: The models by name; the first is the default.
        settings: The configuration.

    Raises:
        UsageError: The address cannot be bound.
        DeviceLostError: A GPU failed for good, so that the server stopped.
        SdrtError: A model failed to load.
    """
    raise_open_file_limit()
    limit_arenas(ARENAS)
    server = Server(sources, settings)
    try:
        server.run()
    finally:
        server.close()
        settings.tracing.close()
    if error := server.models.load_error or server.device_error:
        raise error


class Server(uvicorn.Server):
    """A uvicorn server that loads its models in the background and drains before it exits."""

    def __init__(self, sources: Mapping[str, ModelSource], settings: Settings) -> None:
        self.jobs = RunningJobs(open_job_store(settings), settings.webhooks)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.gallery = open_gallery(settings)
        app, self.models = create_app(sources, settings, self.jobs, self.gallery)
        super().__init__(_uvicorn_config(app, settings))
        self.socket = _bind_socket(settings)
        self.port: int = self.socket.getsockname()[1]
        host = f"[{settings.host}]" if settings.host.count(":") > 1 else settings.host
        self.address = f"http://{host}:{self.port}"
        self.shutting_down = False
        self.device_error: DeviceLostError | None = None

    async def on_tick(self, counter: int) -> bool:
        """Stop once a GPU is lost: the exit code tells the supervisor to start another process.
        Returns free memory to the system now and then.
        """
        if self.device_error is None and (error := self.models.device_error):
            self.device_error = error
            log.error("%s", error)
            self.shut_down()
        if counter % TRIM_TICKS == 0:
            await asyncio.to_thread(trim_heap)
        return await super().on_tick(counter)

    def close(self) -> None:
        """Release the models, and the folders that other processes may then use."""
        self.models.close()
        self.jobs.close()
        if self.gallery is not None:
            self.gallery.close()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets or [self.socket])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.jobs.start()
        names = ", ".join(self.models.sources)
        log.info("Listening on %s; loading %s; not ready yet", self.address, names)
        threading.Thread(target=self._load_models, name="sdrt-load", daemon=True).start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Shut down with exit code 0; uvicorn would raise the signal again."""
        loop = asyncio.get_running_loop()
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if main else ()
        before = {
            number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(self.shut_down))
            for number in signals
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _load_models(self) -> None:
        started = time.monotonic()
        self.models.load_all()
        if self.models.load_error:
            self.should_exit = True
        elif not self.shutting_down:
            log.info("Ready on %s after %.1f s", self.address, time.monotonic() - started)

    def shut_down(self) -> None:
        """Drain, then exit; if called again, exit at once."""
        if self.shutting_down:
            self.should_exit = self.force_exit = True
            return
        self.shutting_down = True
        log.info(
            "Shutting down; draining requests for up to %g s", self.models.settings.drain_seconds
        )
        threading.Thread(target=self._drain, name="sdrt-drain", daemon=True).start()

    def _drain(self) -> None:
        if not self.models.drain():
            log.warning("Drain timeout reached; remaining requests were cancelled")
        self.models.close()
        if self.loop is not None:
            stored = asyncio.run_coroutine_threadsafe(self.jobs.finish(CLOSE_SECONDS), self.loop)
            stored.result()
        self.should_exit = True


def _bind_socket(settings: Settings) -> socket.socket:
    """A socket bound to host and port; port 0 selects a free one."""
    try:
        addresses = socket.getaddrinfo(
            settings.host.strip("[]"), settings.port, type=socket.SOCK_STREAM
        )
        family, kind, protocol, _, address = addresses[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
            hint="choose another --host or --port",
        ) from error
    return bound


def _uvicorn_config(app: SecurityMiddleware, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=build_protocol(settings),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )


def build_protocol(settings: Settings) -> type[H11Protocol]:
    """uvicorn's h11 protocol with two more timeouts: for receiving the headers of a request, and
    for a client that does not read its response.
    """

    class TimeoutProtocol(H11Protocol):
        _read_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._read_timer = _cancel_timer(self._read_timer)
            elif self._read_timer is None and not self.transport.is_closing():
                self._read_timer = self.loop.call_later(
                    settings.header_seconds, self.transport.close
                )

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(settings.stall_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._write_timer = _cancel_timer(self._write_timer)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._read_timer = _cancel_timer(self._read_timer)
            self._write_timer = _cancel_timer(self._write_timer)

    return TimeoutProtocol


def _cancel_timer(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer; returns None, to be stored in its place."""
    if timer:
        timer.cancel()
    return None


def raise_open_file_limit() -> None:
    """Raise the limit of open files, and so of connections, as far as the system allows."""
    if sys.platform == "win32":  # which has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
