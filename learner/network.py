"""Where the learner's processes find each other."""

import socket


def free_port() -> int:
    """A TCP port that was free a moment ago on this host."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
