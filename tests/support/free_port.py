"""A port that nobody listens on just now."""

import socket


def free_port() -> int:
    """On the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
