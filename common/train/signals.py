"""Being asked to stop."""

import multiprocessing
import os
import signal
import threading

from common.distributed import RESTART_SIGNAL

_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupt:
    """Remembers SIGTERM, SIGUSR1, a first SIGINT or RESTART_SIGNAL until the trainer looks.

    A second SIGINT ends the process at once.
    A thread listens, because Python runs a signal handler between two instructions of the main thread only: one that
    waits for another rank would not hear the second SIGINT.

    Attributes:
      signal: the number that came, or None; a request to stop is not replaced by one to start again.
    """

    def __init__(self):
        self.signal = None
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in (*_STOP, RESTART_SIGNAL)}
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        self._thread.start()

    def _listen(self, reader):
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1)[0]:
                self._note(number)

    def _note(self, number):
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            leave_now(130)
        if number in _STOP or (number == RESTART_SIGNAL and self.signal is None):
            self.signal = signal.Signals(number)

    def __bool__(self):
        return self.signal is not None

    def close(self):
        """Give the signals back to those who had them before."""
        if self._before:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.write(self._writer, b"\0")  # no signal: the end
            self._thread.join()
            os.close(self._writer)
            self._before = {}


def leave_now(status):
    """End this process and its loader processes without waiting for anything."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
