"""Exit statuses of the programs, and the two exceptions that end one with a single line instead of a traceback."""

EXIT_USER_ERROR = 2
EXIT_TERMINATED = 143  # 128 + SIGTERM: the checkpoint of this very step was saved
EXIT_RESTART = 75  # likewise, and whoever started the program means to start it again (sysexits' "try again")


class UserError(ValueError):
    """A mistake in a flag, a file or a folder; programs print it as one line `error: ...` and exit with status 2.

    The message begins with the flag or file, then says what was found, then what is allowed or what to do.

    Attributes:
      every_rank: True when all ranks of a run meet this mistake (a wrong flag), so that rank 0 alone reports it;
        False when only this rank can know (an image that does not decode).
    """

    def __init__(self, message, every_rank=True):
        super().__init__(message)
        self.every_rank = every_rank


class RunError(RuntimeError):
    """The run cannot go on though the input was right (a loss that is not finite); one line, exit status 1."""
