"""Being asked to stop."""

import signal


class Interrupt:
    """Remembers SIGTERM, SIGUSR1 or a first SIGINT until the trainer looks; a second SIGINT ends the process."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, _frame):
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self):
        return self.signal is not None
