"""Engines opened by threads of their own, so that the caller can be interrupted and logs progress.

Knows the engine protocol; not what opens an engine.
"""

import threading
from collections.abc import Callable, Mapping

from sdrt.engine import Engine
from sdrt.process_exit import start_workers
from sdrt.progress import log_progress

Opener = Callable[[], Engine]


class _ConcurrentOpener:
    """Opens engines, by component."""

    def __init__(self, openers: Mapping[str, Opener]) -> None:
        self._openers = openers
        self._pending = dict.fromkeys(openers)
        self._engines: dict[str, Engine] = {}
        self._errors: list[BaseException] = []
        self._abandoned = False
        self._changed = threading.Condition()

    def open_all(self) -> dict[str, Engine]:
        """All engines; after an error none stays open."""
        start_workers(
            [
                threading.Thread(target=self._open, args=(name,), name=f"sdrt-{name}", daemon=True)
                for name in self._openers
            ]
        )
        try:
            with log_progress(self._text), self._changed:
                self._changed.wait_for(lambda: not self._pending)
            if self._errors:
                raise self._errors[0]
        except BaseException:
            with self._changed:
                self._abandoned = True
            for engine in self._engines.values():
                engine.close()
            raise
        return {name: self._engines[name] for name in self._openers}

    def _open(self, name: str) -> None:
        engine, error = None, None
        try:
            engine = self._openers[name]()
        except BaseException as caught:
            error = caught
        with self._changed:
            del self._pending[name]
            if error is not None:
                self._errors.append(error)
            elif engine is not None and self._abandoned:
                engine.close()
            elif engine is not None:
                self._engines[name] = engine
            self._changed.notify_all()

    def _text(self) -> str:
        return f"loading {', '.join(tuple(self._pending))}"


def open_concurrently(openers: Mapping[str, Opener]) -> dict[str, Engine]:
    """Open engines in other threads at the same time.

    KeyboardInterrupt returns at once; an engine that is still being opened is closed then.

    Args:
        openers: By component.

    Returns:
        Engines by component.

    Raises:
        BaseException: The first error, once all threads are done; no engine stays open.
    """
    return _ConcurrentOpener(openers).open_all()
