"""A port that nobody listens on just now, nor is given by the kernel soon."""

from eagleray.deploy.serve.environment import free_ports


def free_port() -> int:
    return free_ports(1)[0]
