"""How far a build is, on standard error, and stopping it. Knows TensorRT's progress monitor."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class Progress:
    """TensorRT's phases as one bar on standard error, drawn on a terminal only. May be called from
    several threads. Its steps tell TensorRT to stop once `stopped` is set.
    """

    def __init__(self, title: str, shown: bool) -> None:
        self.stopped = False
        self._lock = threading.Lock()
        self._left: dict[str, int] = {}
        self._bar = tqdm(desc=title, total=0, leave=False, disable=not shown)

    def start(self, phase: str, steps: int) -> None:
        with self._lock:
            self._left[phase] = steps
            self._bar.total += steps
            self._bar.set_postfix_str(phase)

    def step(self, phase: str) -> bool:
        with self._lock:
            self._left[phase] = self._left.get(phase, 1) - 1
            self._bar.update()
        return not self.stopped

    def finish(self, phase: str) -> None:
        with self._lock:
            self._bar.update(max(0, self._left.pop(phase, 0)))

    def close(self) -> None:
        self._bar.close()


def create_monitor(trt: Any, progress: Progress) -> Any:
    """What TensorRT calls with its progress."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            progress.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


@contextlib.contextmanager
def interruptible(progress: Progress) -> Iterator[None]:
    """Ctrl-C stops the build at its next step instead of being lost inside TensorRT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        progress.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if progress.stopped:
        raise KeyboardInterrupt
