"""Signals and Ray: what its start would change for this process, and what its daemons should not hear."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def own_answers() -> Iterator[None]:
    """Around `ray.init`: SIGTERM stays with whoever answers it now. Ray's own answer is to exit at once.

    While Ray connects, its C++ hears the signal first: it prints where it was, and sets an alarm that aborts in 3 s.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as ended:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, before)
        if isinstance(ended, SystemExit) and ended.code == signal.SIGTERM:  # that was Ray's
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def daemons_apart() -> Iterator[None]:
    """What is started meanwhile is in a process group of its own, where `timeout` or `kill -- -GROUP` does not end it.

    Such a signal is for the run, which needs Ray to write its checkpoint. Not done where this process leads its group
    already, as in an interactive shell, or in a terminal's foreground, where it would not hear Ctrl-C meanwhile.
    """
    group = os.getpgrp()
    if group == os.getpid() or _in_foreground(group):
        yield
        return
    os.setpgid(0, 0)
    try:
        yield
    finally:
        with suppress(PermissionError):  # whoever was in the old group is gone
            os.setpgid(0, group)


def _in_foreground(group: int) -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # there is none
        return False
    try:
        return os.tcgetpgrp(terminal) == group
    except OSError:
        return False
    finally:
        os.close(terminal)
