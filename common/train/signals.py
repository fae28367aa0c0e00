"""Signals that ask a run to save and end."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from common.distributed import RESTART_SIGNAL
from common.errors import Interrupted

_STOP = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


class Interrupt:
    """Records SIGTERM, SIGHUP, SIGUSR1, a first SIGINT or RESTART_SIGNAL; true once one has arrived.

    A second SIGINT ends the process at once. A SIGHUP that nohup ignores stays ignored. A thread reads the signals from
    a pipe, because Python runs handlers in the main thread only: while that waits in a collective, a handler would not
    run.

    Attributes:
      signal: the signal that arrived, or None; a request to stop is not replaced by one to restart.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._has_arrived = self._is_waiting = False  # of the main thread
        ignored = {number for number in (signal.SIGHUP,) if signal.getsignal(number) is signal.SIG_IGN}
        numbers = [number for number in (*_STOP, RESTART_SIGNAL) if number not in ignored]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read_signals, args=(reader,), name="signals", daemon=True)
        self._thread.start()

    def _handle(self, *_: object) -> None:
        self._has_arrived = True
        if self._is_waiting:
            raise Interrupted

    @contextlib.contextmanager
    def ends_wait(self) -> Iterator[None]:
        """Raise Interrupted in this block when a signal arrives, or has arrived. For the main thread."""
        try:
            self._is_waiting = True
            if self._has_arrived:
                raise Interrupted
            yield
        except Interrupted:
            while not self:  # until the thread has recorded it
                time.sleep(0.001)
            raise
        finally:
            self._is_waiting = False

    def _read_signals(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1)[0]:
                self._record(number)

    def _record(self, number: int) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            exit_immediately(130)
        if number in _STOP or (number == RESTART_SIGNAL and self.signal is None):
            self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None

    def close(self) -> None:
        """Restore the previous signal handlers."""
        if self._before:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.write(self._writer, b"\0")  # ends the thread
            self._thread.join()
            os.close(self._writer)
            self._before = {}


def exit_immediately(status: int) -> NoReturn:
    """End this process and its loader processes without waiting for anything."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
