"""Mending what was mutated: checksums would keep the fuzzer at the door."""

from __future__ import annotations

import gzip
import re
import struct
import zlib


def mend_tar(data: bytes) -> bytes:
    """Every block that says ustar gets the checksum that fits it."""
    whole = bytearray(data)
    for at in range(0, len(whole) - 511, 512):
        if whole[at + 257 : at + 262] == b"ustar":
            whole[at + 148 : at + 156] = b" " * 8
            whole[at + 148 : at + 156] = b"%06o\0 " % sum(whole[at : at + 512])
    return bytes(whole)


def mend_tar_gz(data: bytes) -> bytes:
    return gzip.compress(mend_tar(data), 1, mtime=0)


def gunzip(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return data


def mend_png(data: bytes) -> bytes:
    """Every chunk that is where its predecessor ends gets the checksum that fits it; IEND stays at the end."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    whole, at = bytearray(data), 8
    while at + 12 <= len(whole):
        (length,) = struct.unpack_from(">I", whole, at)
        if at + 12 + length > len(whole):
            break
        struct.pack_into(">I", whole, at + 8 + length, zlib.crc32(whole[at + 4 : at + 8 + length]))
        at += 12 + length
    end = b"\0\0\0\0IEND\xaeB`\x82"
    return bytes(whole) if whole.endswith(end) else bytes(whole) + end


def mend_zip(data: bytes) -> bytes:
    """Stored members get the checksum that fits them, in their own header and in the directory."""
    whole = bytearray(data)
    for found in re.finditer(b"PK\\x01\\x02", data):
        at = found.start()
        if at + 46 > len(whole):
            continue
        method, packed, begin = *struct.unpack_from("<H", whole, at + 10), *struct.unpack_from("<I", whole, at + 20), *struct.unpack_from("<I", whole, at + 42)
        if method == 0 and whole[begin : begin + 4] == b"PK\3\4" and begin + 30 <= len(whole):
            start = begin + 30 + sum(struct.unpack_from("<HH", whole, begin + 26))
            crc = zlib.crc32(whole[start : start + packed])
            struct.pack_into("<I", whole, at + 16, crc)
            struct.pack_into("<I", whole, begin + 14, crc)
    return bytes(whole)
