"""What Linux knows of a TCP connection: whether the peer is still there, and since when it waits for us. Elsewhere nothing is known, and nobody waits."""

from __future__ import annotations

import socket
import struct
import sys
from typing import NamedTuple, Protocol

_INFO = struct.Struct("B43xI4xI")  # of struct tcp_info (linux/tcp.h): tcpi_state, tcpi_last_data_sent, tcpi_last_data_recv, both in milliseconds
_ESTABLISHED = 1


class Known(NamedTuple):
    """Of one connection. Times in seconds, to the kernel's tick of a few milliseconds."""

    open: bool  # neither side has ended it
    since_sent: float  # since something was sent to the peer; where nothing was yet, since the connection was made
    since_received: float  # since the kernel got the peer's last bytes, whether or not they were read


UNKNOWN = Known(True, 0.0, 0.0)


class Connection(Protocol):
    """A socket, or asyncio's view of one."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def known(connection: Connection) -> Known:
    """One system call, about a microsecond."""
    if sys.platform != "linux":
        return UNKNOWN
    try:
        state, sent, received = _INFO.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
    except (OSError, struct.error):  # a sandbox that forbids the call, or imitates it in part: nobody is to be turned away for that
        return UNKNOWN
    return Known(state == _ESTABLISHED, sent / 1000, received / 1000)
