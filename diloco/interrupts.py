"""Ctrl-C: the first asks for a checkpoint and a stop, the second breaks off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from diloco.runtime.base import Backend


@contextmanager
def interruptible(backend: Backend, say: Callable[[str], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for a checkpoint and a stop; a second SIGINT breaks off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        say("interrupted: writing a checkpoint after the present segment; Ctrl-C again breaks off without one")
        backend.interrupt()

    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
