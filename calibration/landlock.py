"""No hand in other processes: not in their memory, environment or descriptors, and no signals to them.

Whoever shares a user with another process may look into it by way of /proc, whatever system calls are refused. Two things of Linux stop that. A Landlock
domain (5.19) may reach only what it started itself. And without capabilities nothing can be seen of a process that has made itself undumpable, as those
that start ours do (service/unseen.py), where a kernel has no Landlock.
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_ASK_VERSION, _BENEATH = 1, 1
_MAKE_CHARACTER_DEVICE, _MAKE_BLOCK_DEVICE, _REFER = 1 << 6, 1 << 11, 1 << 13
_NO_ABSTRACT_SOCKETS, _NO_SIGNALS = 1 << 0, 1 << 1
_CAPABILITIES_VERSION = 0x20080522
_FILE_RIGHTS = 0b1111  # CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER: a service of root keeps its way to the operator's files


def seclude(libc: ctypes.CDLL) -> None:
    """Shut the calling thread, and what it starts, in. It must have given up new privileges (PR_SET_NO_NEW_PRIVS). Never fails where a kernel cannot."""
    _drop_capabilities(libc)
    version = _call(libc, _CREATE_RULESET, None, 0, _ASK_VERSION)
    if version < 2:  # the first one knows no REFER, and so would let no file be moved from one folder to another, as publishing does
        return
    rights = _MAKE_CHARACTER_DEVICE | _MAKE_BLOCK_DEVICE | _REFER  # a domain must refuse something: nobody here makes devices
    scopes = _NO_ABSTRACT_SOCKETS | _NO_SIGNALS
    attributes = struct.pack("=QQQ", rights, 0, scopes) if version >= 6 else struct.pack("=Q", rights)
    ruleset = _call(libc, _CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return
    with suppress(OSError):
        root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        if _call(libc, _ADD_RULE, ruleset, _BENEATH, struct.pack("=Qi", _REFER, root), 0) == 0:  # files may be moved everywhere
            _call(libc, _RESTRICT_SELF, ruleset, 0)
        os.close(root)
    os.close(ruleset)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """All but those over files, which is what root has more than others; for others there is nothing to drop."""
    header, data = struct.pack("=Ii", _CAPABILITIES_VERSION, 0), ctypes.create_string_buffer(24)
    if libc.capget(header, data) == 0:
        effective, permitted, _, *_ = struct.unpack("=6I", data.raw)
        libc.capset(header, struct.pack("=6I", effective & _FILE_RIGHTS, permitted & _FILE_RIGHTS, 0, 0, 0, 0))


def _call(libc: ctypes.CDLL, number: int, *arguments: int | bytes | None) -> int:
    return int(libc.syscall(ctypes.c_long(number), *arguments))
