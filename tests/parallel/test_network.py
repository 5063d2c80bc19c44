"""Where other ranks find this host."""

import psutil
import pytest
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from eagleray.parallel.network import interface_of, own_address

ADDRESSES = [
    (name, address.address)
    for name, addresses in psutil.net_if_addrs().items()
    for address in addresses[:1]
    if address.family.name == "AF_INET"
]


@pytest.mark.parametrize(("interface", "address"), ADDRESSES)
def test_every_address_leads_to_its_interface(interface: str, address: str) -> None:
    assert interface_of(address) == interface


def test_nobody_has_an_address_of_the_documentation() -> None:
    assert interface_of("203.0.113.9") is None


def test_a_host_reaches_a_server_of_its_own_by_that_servers_address() -> None:
    (address,) = {address for name, address in ADDRESSES if name == "lo"}
    assert own_address(TCPStore(address, 0, is_master=True, wait_for_workers=False))[1] == address
    assert own_address(HashStore())[1] == "127.0.0.1"
