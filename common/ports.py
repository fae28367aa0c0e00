"""TCP ports of this node."""

import os
import socket


def bind_error(port: int) -> str | None:
    """Why a TCP port cannot be opened, or None where it can."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return None
