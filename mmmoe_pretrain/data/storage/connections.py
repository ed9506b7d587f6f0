"""What ``http.py`` asks of Python's client beyond its own: addresses are checked before they are connected to, and an
answer has a deadline however slowly its bytes come.
"""

from __future__ import annotations

import io
import ipaddress
import socket
import time
from http.client import HTTPResponse
from typing import Any

from mmmoe_pretrain.urls import StorageError

MOST_ADDRESSES = 4  # of a host that are tried
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 4 bytes (RFC 6052)


class PrivateAddressError(StorageError):
    """A host that the Internet does not reach, at a URL that the user did not write."""


def connect_public(address: tuple[str, int], timeout: float, source: object = None) -> socket.socket:
    """``socket.create_connection`` to a host all of whose addresses are public. The host is resolved once: a name may
    resolve to another address each time."""
    host, end = address[0], time.monotonic() + timeout
    places = [found[4][:2] for found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)]
    for place in places:
        if not is_public(str(place[0])):
            raise PrivateAddressError(f"{host} is at the private address {place[0]}")
    failure: OSError = TimeoutError("timed out")
    for place in places[:MOST_ADDRESSES]:
        if (left := end - time.monotonic()) > 0:
            try:
                return socket.create_connection((str(place[0]), int(place[1])), left)
            except OSError as error:
                failure = error
    raise failure


def is_public(address: str) -> bool:
    """Whether an IP address is one of the Internet, also where IPv6 embeds one of IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(found.packed[-4:]) if found in _NAT64 else None
        found = found.ipv4_mapped or found.sixtofour or nat64 or found
    return found.is_global and not found.is_multicast


class TimedResponse(HTTPResponse):
    """An answer whose reads end by a deadline. Python's own time limit is for each ``recv``, so a server that sends a
    byte now and then would hold it for ever."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._timed = _Timed(sock, self.fp.detach(), deadline)
        self.fp = io.BufferedReader(self._timed)

    def end_by(self, deadline: float) -> None:
        """Reads from now on end by ``deadline`` (``time.monotonic``)."""
        self._timed.deadline = deadline


class _Timed(io.RawIOBase):
    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: float) -> None:
        self._sock, self._raw, self.deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
