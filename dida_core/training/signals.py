"""
How a process ends when SIGTERM (kill, Docker, SLURM), SIGUSR1 (SLURM) or SIGINT (Ctrl-C) asks it to.

A handler only sets a flag. Training, evaluation and prediction look at it where nothing is half done, and
raise Preempted. A second signal ends the process at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..errors import Preempted

EXIT_CODE = Preempted.exit_code
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# torchrun passes on to its processes what the whole group, such as a terminal's, may have got already.
_SECONDS_OF_ONE_REQUEST = 5.0


class _Request:
    """The first signal that was received."""

    name: str | None = None
    time = 0.0


def stop_requested() -> bool:
    """Return whether a signal has asked this process to end."""
    return _Request.name is not None


def raise_if_stop_requested() -> None:
    """Raise Preempted if a signal has asked to end. Call it where nothing is half done."""
    if _Request.name is not None:
        raise Preempted(f"{_Request.name} was received")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Have signals set the flag, and restore their handlers at the end. Only in the main thread."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) is _set_flag:
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    _Request.name = None
    install_handlers()
    try:
        yield
    finally:
        _Request.name = None
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def install_handlers() -> None:
    """Set the handlers, also again where a library has put in its own. Only in the main thread."""
    if threading.current_thread() is threading.main_thread():
        for signum in _SIGNALS:
            signal.signal(signum, _set_flag)


def ignore_signals() -> None:
    """Ignore the signals in a process that loads data: its main process decides when it ends."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Hold the signals back, and for good in processes that are started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_flag(signum: int, _frame: Any) -> None:
    name, now = signal.Signals(signum).name, time.monotonic()
    if _Request.name is None:
        _Request.name, _Request.time = name, now
        if int(os.environ.get("RANK", "0")) == 0:
            text = f"\n{name}: saving what is done. A second signal ends it at once.\n"
            os.write(2, text.encode())  # print is not safe in a handler
    elif "TORCHELASTIC_RUN_ID" in os.environ and now - _Request.time < _SECONDS_OF_ONE_REQUEST:
        return
    elif signum == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
