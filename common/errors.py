"""Exit statuses of the programs, and the exceptions that end one with a single line instead of a traceback."""

EXIT_USER_ERROR = 2
EXIT_TERMINATED = 143  # 128 + SIGTERM: the checkpoint of this very step was saved
EXIT_RESTART = 75  # as 143, and the launcher starts the ranks again (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """A mistake in a flag, a file or a folder: one line `error: ...` and exit status 2.

    The message begins with the flag or file, then says what was found, then what is allowed or what to do.

    Attributes:
      every_rank: whether all ranks of a run raise it (a wrong flag), so that rank 0 alone prints it; otherwise the rank
        that raises it prints it (an image that does not decode).
    """

    def __init__(self, message: str, every_rank: bool = True) -> None:
        super().__init__(message)
        self.every_rank = every_rank


class RunError(RuntimeError):
    """A failure of a run whose input is right (a loss that is not finite): one line, exit status 1."""
