"""Finds the address and network interface by which other ranks reach this host."""

import fcntl
import socket
import struct

from torch._C._distributed_c10d import Store
from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
_REQUEST = struct.Struct("40s")  # at least a struct ifreq; the address stands behind 16 bytes of name and 4 of family
_ADDRESS = slice(20, 24)


def open_store(ip: str, size: int) -> TCPStore:
    """A store for `size` ranks that listens at this address of the host, and at no other as it would by itself.

    At all of them where `ip` is translated on its way here.
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((ip, 0))
    except OSError:
        listener.bind(("", 0))
    listener.listen(size)
    port = listener.getsockname()[1]
    return TCPStore(  # which closes the descriptor in the end
        ip, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def own_address(store: Store) -> tuple[socket.AddressFamily, str]:
    """This host's address on its way to the store's host; loopback for a store that is not a server."""
    host = getattr(store, "host", LOOPBACK)
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting a datagram socket sends nothing
        probe.connect(target)
        return family, probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, SIOCGIFADDR, _REQUEST.pack(name.encode()))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(reply[_ADDRESS]) == address:
                return name
    return None
