"""Images as they come, before a decoder sees them: what keeps it busy for long, for few bytes, is refused, and a JPEG's metadata are left out.

Pillow reads the head of a file in Python, step by step, and a progressive JPEG may go over all of its pixels as often as it likes, for 42 bytes each time.
Here all is counted, in steps that are few or that C takes, and never less than what the decoder would come upon.
"""

from __future__ import annotations

import re

from models.errors import ImageTooComplex, ImageUndecodable

# Encoders write about 10 scans, and 18 where there are four colours; one over 25 megapixels takes up to an eighth of a second of a core.
MOST_SCANS, MOST_SCANNED_PIXELS = 100, 24 * 25_000_000
MOST_SEGMENTS, MOST_HEAD_BYTES = 1024, 256 * 1024  # of a JPEG; one has 64 KiB, so that this is six times what metadata of 10 MiB need
MOST_CHUNKS, MOST_PROFILES = 20_000, 4  # of a PNG; libpng's own of 8 KiB are 1,280 in 10 MiB, and of colour profiles there is to be one
_SOS, _EOI = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff]")  # whatever stands before one is padding
_MARKER_AMONG_PIXELS = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # where those of restarts are none
_ALONE = range(0xD0, 0xDA)  # markers without a segment: restarts, start and end
_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # APP1 to APP15, but for 14, which says what the colours are, and comments
_UNKNOWN = {*range(0xC0), 0xC8, *range(0xF0, 0xFE)}  # to libjpeg


def bare_jpeg(data: bytes) -> bytes:
    """A JPEG without padding and metadata before its first scan, which no pixel depends on. Raises ImageTooComplex or ImageUndecodable."""
    kept, at = [data[:2]], 2
    for _ in range(MOST_SEGMENTS):
        marker = _MARKER.search(data, at)
        if marker is None or data[marker.end() - 1] in _UNKNOWN:
            raise ImageUndecodable
        begin, code = marker.start(), data[marker.end() - 1]
        if code == _SOS:
            if sum(map(len, kept)) > MOST_HEAD_BYTES:
                break
            return b"".join([*kept, data[begin:]])
        at = _end(data, marker.end(), code)
        if code not in _METADATA:
            kept.append(data[begin:at])
    raise ImageTooComplex(f"The JPEG has more than {MOST_SEGMENTS:,} segments, or tables of more than {MOST_HEAD_BYTES:,} bytes; save it anew.")


def check_scans(jpeg: bytes, width: int, height: int) -> None:
    """Raises ImageTooComplex for a bare JPEG that goes too often over its pixels."""
    most = min(MOST_SCANS, MOST_SCANNED_PIXELS // (width * height))
    if jpeg.count(b"\xff\xda") > most and _scans(jpeg, most) > most:  # counted alike, but for what stands behind the image
        raise ImageTooComplex(f"The JPEG has more than {most} scans of {width}x{height} pixels; save it anew, with the usual scans or without progression.")


def check_chunks(png: bytes) -> None:
    """Raises ImageTooComplex for a PNG of too many chunks, or of too many that unpack to a thousand times their size and more."""
    if png.count(b"iCCP") > MOST_PROFILES:
        raise ImageTooComplex("The PNG has several colour profiles; save it anew, with one or none.")
    if len(png) <= 12 * MOST_CHUNKS:  # 12 bytes is the least that a chunk has
        return
    at = 8
    for _ in range(MOST_CHUNKS + 1):
        if png[at + 4 : at + 8] in (b"", b"IEND"):
            return
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    raise ImageTooComplex(f"The PNG has more than {MOST_CHUNKS:,} chunks; save it anew.")


def _end(data: bytes, at: int, code: int) -> int:
    """Of the segment whose marker ends here."""
    return at if code in _ALONE else at + max(2, int.from_bytes(data[at : at + 2], "big"))


def _scans(jpeg: bytes, most: int) -> int:
    """How many there are before the end of the image; for one with more than `most`, or with very many segments, some number above that."""
    scans, at = 0, 2
    for _ in range(2 * MOST_SEGMENTS):
        marker = _MARKER_AMONG_PIXELS.search(jpeg, at)
        code = _EOI if marker is None else jpeg[marker.end() - 1]
        if marker is None or code == _EOI or scans > most:
            return scans
        scans += code == _SOS
        # libjpeg looks for the next marker behind one that it does not know, as if it had no segment
        at = marker.end() if code in _UNKNOWN else _end(jpeg, marker.end(), code)
    return most + 1
