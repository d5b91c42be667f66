"""Engines opened by threads of their own, so that whoever waits can be interrupted and reports what
is waited for. Knows the engine protocol; not what opens one.
"""

import threading
from collections.abc import Callable, Mapping

from sdrt.engine import Engine
from sdrt.process_exit import start_workers
from sdrt.progress import reported

Open = Callable[[], Engine]


class _ConcurrentOpener:
    """Engines on their way, by component."""

    def __init__(self, opens: Mapping[str, Open]) -> None:
        self._opens = opens
        self._waiting = dict.fromkeys(opens)
        self._engines: dict[str, Engine] = {}
        self._errors: list[BaseException] = []
        self._abandoned = False
        self._changed = threading.Condition()

    def all(self) -> dict[str, Engine]:
        """All of them, or none stays open."""
        start_workers(
            [
                threading.Thread(target=self._open, args=(name,), name=f"sdrt-{name}", daemon=True)
                for name in self._opens
            ]
        )
        try:
            with reported(self._text), self._changed:
                self._changed.wait_for(lambda: not self._waiting)
            if self._errors:
                raise self._errors[0]
        except BaseException:
            with self._changed:
                self._abandoned = True
            for engine in self._engines.values():
                engine.close()
            raise
        return {name: self._engines[name] for name in self._opens}

    def _open(self, name: str) -> None:
        engine, error = None, None
        try:
            engine = self._opens[name]()
        except BaseException as caught:
            error = caught
        with self._changed:
            del self._waiting[name]
            if error is not None:
                self._errors.append(error)
            elif engine is not None and self._abandoned:
                engine.close()
            elif engine is not None:
                self._engines[name] = engine
            self._changed.notify_all()

    def _text(self) -> str:
        return f"loading {', '.join(tuple(self._waiting))}"


def open_concurrently(opens: Mapping[str, Open]) -> dict[str, Engine]:
    """Engines by component, opened side by side in other threads; all, or none stays open.

    Raises what the first one to fail raises, once the others are done. KeyboardInterrupt leaves at
    once, and what is still being opened is closed when it is.
    """
    return _ConcurrentOpener(opens).all()
