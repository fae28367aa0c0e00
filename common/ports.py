"""TCP ports of this machine."""

import os
import socket


def why_taken(port):
    """Why a TCP port of this machine cannot be opened, or None where it can."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return os.strerror(error.errno)
    return None
