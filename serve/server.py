"""A server process: uvicorn around the application, from loading to the last answer."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Mapping

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sdrt.errors import UsageError

from .app import application
from .middleware import Guard
from .model_manager import Source
from .settings import Settings

log = logging.getLogger("sdrt.serve")

MAX_FILES = 65_536
LAST_ANSWERS_SECONDS = 5
KEEP_ALIVE_SECONDS = 75


def serve(sources: Mapping[str, Source], settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then let what runs end within `settings.drain` seconds; a
    second signal ends at once. Raises UsageError if it cannot listen there, and what loading a
    model raised.
    """
    allow_connections()
    server = Server(sources, settings)
    try:
        server.run()
    finally:
        server.models.close()
    if server.models.failed:
        raise server.models.failed


class Server(uvicorn.Server):
    """Answers from the first moment, not ready while it loads; drains before it ends."""

    def __init__(self, sources: Mapping[str, Source], settings: Settings) -> None:
        app, self.models = application(sources, settings)
        super().__init__(_config(app, settings))
        self.socket = _listening(settings)
        self.port: int = self.socket.getsockname()[1]
        self.ending = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets or [self.socket])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log.info("listening on http://%s:%d", self.models.settings.host, self.port)
        threading.Thread(target=self._load, name="sdrt-load", daemon=True).start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would end by the signal it was sent; this ends with exit code 0."""
        loop = asyncio.get_running_loop()
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if main else ()
        before = {
            number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(self.end))
            for number in signals
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _load(self) -> None:
        self.models.load()
        if self.models.failed:
            self.should_exit = True

    def end(self) -> None:
        """Drain, then stop; called again, stop at once."""
        if self.ending:
            self.should_exit = self.force_exit = True
            return
        self.ending = True
        log.info("ending; what runs has %g s", self.models.settings.drain)
        threading.Thread(target=self._drain, name="sdrt-drain", daemon=True).start()

    def _drain(self) -> None:
        if not self.models.drain():
            log.warning("not all was finished in time; the rest was cancelled")
        self.models.close()
        self.should_exit = True


def _listening(settings: Settings) -> socket.socket:
    """A socket bound to host and port, any free one for 0."""
    try:
        found = socket.getaddrinfo(
            settings.host.strip("[]"), settings.port, type=socket.SOCK_STREAM
        )
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
            "name another --host or --port"
        ) from error
    return made


def _config(app: Guard, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=patient_protocol(settings),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
    )


def patient_protocol(settings: Settings) -> type[H11Protocol]:
    """HTTP over h11 that waits only so long for a request's head and for a client that does not
    read.
    """

    class Patient(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._head = _stop(self._head)
            elif self._head is None and not self.transport.is_closing():
                self._head = self.loop.call_later(settings.head_seconds, self.transport.close)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(settings.stalled_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stalled = _stop(self._stalled)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._head, self._stalled = _stop(self._head), _stop(self._stalled)

    return Patient


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer, in the place of one that is not to ring."""
    if timer:
        timer.cancel()
    return None


def allow_connections() -> None:
    """As many open files, and so connections, as the system lets this process have."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
