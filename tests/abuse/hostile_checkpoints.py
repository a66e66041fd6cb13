"""Hostile checkpoint files: rows B1 to B8 of the catalogue of bad inputs, and the pieces that they are made of."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def weights() -> dict[str, Tensor]:
    return {"stem.weight": torch.ones(4, 3), "stem.bias": torch.zeros(4)}


def packed(data: bytes, storages: dict[str, bytes] | None = None, extra: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip archive around a pickle of one's own."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", method) as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in {**{f"data/{key}": value for key, value in (storages or {}).items()}, **(extra or {})}.items():
            archive.writestr(f"a/{name}", content)
    return buffer.getvalue()


def tensors_pickle(*claims: tuple[str, int, int, tuple[Any, ...], tuple[Any, ...]], kind: str = "FloatStorage") -> bytes:
    """A dict of tensors t0, t1, ... of (storage key, storage elements, offset, size, stride), whether possible or not."""
    text = b"\x80\x02}("
    for index, (key, elements, offset, size, stride) in enumerate(claims):
        storage = b"(" + value("storage") + b"ctorch\n" + kind.encode() + b"\n" + value(key) + value("cpu") + value(elements) + b"tQ"
        rest = value(offset) + value(size) + value(stride) + b"\x89}"
        text += value(f"t{index}") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"
    return text + b"u."


def value(thing: Any) -> bytes:
    return pickle.dumps(thing, 2)[2:-1].replace(b"q\x00", b"") if not isinstance(thing, tuple) else b"(" + b"".join(map(value, thing)) + b"t"


class Payload:
    """Pickles as a call that makes the canary file."""

    def __init__(self, canary: Path, function: Callable[..., Any] = os.system) -> None:
        self.canary, self.function = canary, function

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (f"touch {self.canary}",)


# ---- B1: other formats


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(path))


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), str(path) + ".pt2")
    Path(str(path) + ".pt2").rename(path)


def numpy_archive(path: Path) -> None:
    np.savez(buffer := io.BytesIO(), weight=np.ones(3))
    path.write_bytes(buffer.getvalue())


B1: dict[str, Callable[[Path], Any]] = {
    "TorchScript": torchscript,
    "exported program": exported,
    "old format": lambda path: torch.save(weights(), path, _use_new_zipfile_serialization=False),
    "old format of a module": lambda path: torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False),
    "bare pickle, protocol 0": lambda path: path.write_bytes(pickle.dumps({"a": 1}, 0)),
    "bare pickle, protocol 2": lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)),
    "bare pickle, protocol 5": lambda path: path.write_bytes(pickle.dumps({"a": 1}, 5)),
    "ONNX": lambda path: path.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x052.8.0:\x9e\x01" + bytes(300)),
    "HDF5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(300)),
    "GGUF": lambda path: path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(300)),
    "tar": lambda path: path.write_bytes(b"model.json".ljust(257, b"\0") + b"ustar\x0000" + bytes(300)),
    "gzip": lambda path: path.write_bytes(b"\x1f\x8b\x08\x00" + b"\x99" * 300),
    "numpy": lambda path: np.save(path.open("wb"), np.ones(3)),
    "numpy archive": numpy_archive,
    "Keras archive": lambda path: path.write_bytes(packed(b"", extra={"model.weights.h5": b""}).replace(b"data.pkl", b"conf.jsn")),
    "text": lambda path: path.write_bytes(b"Once upon a time there was a model.\n"),
    "PNG": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(300)),
}


# ---- B1a: pickles that call something


GADGETS = {
    "GLOBAL and REDUCE": b"cposix\nsystem\n(X\x05\x00\x00\x00{}tR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x05{}\x85R.",
    "INST": b"(X\x05\x00\x00\x00{}iposix\nsystem\n.",
    "NEWOBJ": b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00{}\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04cposix\nsystem\nX\x05\x00\x00\x00{}\x85}\x92.",
    "BUILD through __setstate__": b"\x80\x02cbuiltins\nobject\n)\x81}X\x0c\x00\x00\x00__setstate__cposix\nsystem\nsbX\x05\x00\x00\x00{}b.",
    "dotted names": b"\x80\x04\x8c\x05torch\x8c\x10os.path.os.popen\x93\x8c\x05{}\x85R.",
    "eval of a rebuild": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nNX\x05\x00\x00\x00{}\x85NtR.",
    "rebuild of a call": b"\x80\x02ctorch._utils\n_rebuild_parameter\n(cposix\nsystem\nX\x05\x00\x00\x00{}\x85R\x88NtR.",
}


# ---- B1a: pickles that need much time or memory


HEAVY = {
    "lists nested 100,000 deep": b"]" * 100_000 + b"a" * 99_999 + b".",
    "dicts nested 100,000 deep": b"}" + b"X\x01\x00\x00\x00a}" * 100_000 + b"s" * 100_000 + b".",
    "tuples nested 200,000 deep": b")" + b"\x85" * 200_000 + b".",
    "a tuple nested 100,000 deep as a key": b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "rebuilds nested 100,000 deep": b"N" + b"\x85ctorch._tensor\n_rebuild_from_type_v2\nq\x000h\x00NN\x87" * 10_000 + b".",
    "a doubling graph of 10,000 levels": b"}" + b"q\x00}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00u" * 10_000 + b".",
    "a dict that holds itself": b"}q\x00(" + b"".join(value(key) + b"h\x00" for key in ("model", "net", "x")) + b"u.",
    "a list that holds itself": b"]q\x00h\x00a.",
    "marks": b"(" * 500_000 + b".",
    "memo index of four billion": b"Nr\xff\xff\xff\xff.",
    "an integer of 200 kB": b"\x8b" + struct.pack("<i", 200_000) + b"\xff" * 200_000 + b".",
    "a length of 2^63": b"\x8d" + struct.pack("<Q", 2**63) + b".",
    "a negative length": b"\x8b\xff\xff\xff\xff.",
    "a name of a megabyte": b"c" + b"a" * 1_000_000 + b"\nb\n.",
    "an OrderedDict of one long list again and again": b"](" + b"NN\x86" * 10_000 + b"e\x85q\x00ccollections\nOrderedDict\nq\x01"
    + b"h\x01h\x00R0" * 20_000 + b".",
    "one long argument list called again and again": b"(" + b"N" * 50_000 + b"tq\x00ctorch._utils\n_rebuild_tensor_v2\nq\x01"
    + b"h\x01h\x00R0" * 20_000 + b".",
    "keys that cannot be hashed": b"}(]N}N)]\x85Nu.",
    "stack underflow": b"0.",
    "tuple underflow": b"N\x87.",
    "no end": b"N",
    "empty": b"",
    "an unknown opcode": b"\xff.",
    "out of band buffers": b"\x97.",
    "a persistent id of text": b"Pabc\n.",
    "an extension": b"\x82\x01.",
    "bad UTF-8": b"X\x02\x00\x00\x00\xc3\x28.",
}  # fmt: skip


FLOODS = [b"]", b"}", b"(", b"\x8f", b"N\x94", b"ca\nb\n", b"}\x8c\x01aNs", b"G" + b"\x01" * 8, b"\x8c\x011\x940"]


# ---- B1a: tensors that lie


FLOATS = np.arange(6, dtype="<f4").tobytes()
LIES = {
    "stride 0": ("0", 6, 0, (100_000, 100_000), (0, 0)),
    "overlap": ("0", 6, 0, (5, 4), (1, 0)),
    "past the end": ("0", 6, 1, (6,), (1,)),
    "far past the end": ("0", 6, 2**62, (1,), (1,)),
    "stride past the end": ("0", 6, 0, (2,), (6,)),
    "negative offset": ("0", 6, -1, (1,), (1,)),
    "negative size": ("0", 6, 0, (-1,), (1,)),
    "negative stride": ("0", 6, 5, (6,), (-1,)),
    "sizes whose product overflows": ("0", 6, 0, (2**32, 2**32), (1, 1)),
    "a zero beside sizes that overflow": ("0", 6, 0, (0, 2**62, 2**62), (1, 1, 1)),
    "a size beyond 64 bits": ("0", 6, 0, (2**100,), (1,)),
    "a size of half": ("0", 6, 0, (0.5,), (1,)),
    "a size of true": ("0", 6, 0, (True,), (1,)),
    "a nested size": ("0", 6, 0, ((1,),), (1,)),
    "fewer strides than sizes": ("0", 6, 0, (2, 3), (1,)),
    "100 dimensions": ("0", 6, 0, (1,) * 100, (1,) * 100),
    "a storage larger than its entry": ("0", 7, 0, (1,), (1,)),
    "a storage smaller than its entry": ("0", 5, 0, (1,), (1,)),
    "a negative storage": ("0", -6, 0, (1,), (1,)),
    "a storage that is not there": ("1", 6, 0, (1,), (1,)),
    "a storage outside data/": ("../data.pkl", 6, 0, (1,), (1,)),
    "a storage named by a lone surrogate": ("\ud800", 6, 0, (1,), (1,)),
}


# ---- B1a: archives that lie


def honest() -> bytes:
    torch.save(weights(), buffer := io.BytesIO())
    return buffer.getvalue()


def plain() -> bytes:
    return packed(tensors_pickle(("0", 6, 0, (6,), (1,))), {"0": FLOATS})


def patched(data: bytes, marker: bytes, at: int, layout: str, number: int, last: bool = True) -> bytes:
    """`data` with one field changed, counted from the last (or first) occurrence of a record's marker."""
    start = (data.rindex(marker) if last else data.index(marker)) + at
    return data[:start] + struct.pack(layout, number) + data[start + struct.calcsize(layout) :]


CENTRAL, LOCAL, END, END64, LOCATOR = b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7"


def twice() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(buffer := io.BytesIO(plain()), "a") as archive:
        archive.writestr("a/data/0", bytes(24))
    return buffer.getvalue()


def nested() -> bytes:
    """The entry data/0 is said to be where a copy of it lies inside data/1."""
    header = plain()[plain().rindex(LOCAL) : plain().index(CENTRAL)]
    data = packed(tensors_pickle(("0", 6, 0, (6,), (1,))), {"1": header, "0": FLOATS})
    return patched(data, CENTRAL, 42, "<I", data.index(header))


def full_end(data: bytes) -> bytes:
    """The 32-bit end record hands every number over to the zip64 one."""
    start = data.rindex(END)
    return data[: start + 8] + b"\xff" * 12 + data[start + 20 :]


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "an entry twice": twice,
    "an encrypted entry": lambda: patched(plain(), CENTRAL, 8, "<H", 1),
    "an entry encrypted by its local header alone": lambda: patched(plain(), LOCAL, 6, "<H", 1),
    "an entry of method bzip2": lambda: packed(tensors_pickle(("0", 6, 0, (6,), (1,))), {"0": FLOATS}, method=zipfile.ZIP_BZIP2),
    "an entry of method lzma": lambda: packed(tensors_pickle(("0", 6, 0, (6,), (1,))), {"0": FLOATS}, method=zipfile.ZIP_LZMA),
    "an entry with two methods": lambda: patched(plain(), LOCAL, 8, "<H", 8),
    "an entry with two names": lambda: patched(plain(), LOCAL, 30, "<B", 65),
    "a stored entry of two sizes": lambda: patched(plain(), CENTRAL, 24, "<I", 28),
    "an entry whose header is another's": lambda: patched(plain(), CENTRAL, 42, "<I", 0),
    "an entry inside another": nested,
    "an entry past the end": lambda: patched(plain(), CENTRAL, 42, "<I", 2**31),
    "an entry that reaches into the directory": lambda: patched(patched(plain(), CENTRAL, 24, "<I", 60), CENTRAL, 20, "<I", 60),
    "an entry of full size without a zip64 field": lambda: patched(plain(), CENTRAL, 24, "<I", 2**32 - 1),
    "too few entries stated": lambda: patched(patched(plain(), END, 8, "<H", 1), END, 10, "<H", 1),
    "too many entries stated": lambda: patched(patched(plain(), END, 8, "<H", 9), END, 10, "<H", 9),
    "65,535 entries stated": lambda: patched(patched(plain(), END, 8, "<H", 65535), END, 10, "<H", 65535),
    "a directory elsewhere": lambda: patched(plain(), END, 16, "<I", 5),
    "a directory past the end": lambda: patched(plain(), END, 16, "<I", 2**31),
    "two disks": lambda: patched(plain(), END, 4, "<H", 1),
    "a comment": lambda: patched(plain(), END, 20, "<H", 3) + b"abc",
    "trailing bytes": lambda: plain() + b"\0",
    "leading bytes": lambda: LOCAL + plain(),
    "two archives in a row": lambda: plain() + plain(),
    "no end record": lambda: plain()[:-22],
    "only a local header": lambda: LOCAL,
    "zip64: more entries than there are": lambda: full_end(patched(patched(honest(), END64, 24, "<Q", 2**60), END64, 32, "<Q", 2**60)),
    "zip64: another directory": lambda: full_end(patched(honest(), END64, 48, "<Q", 1)),
    "zip64: end record elsewhere": lambda: patched(honest(), LOCATOR, 8, "<Q", 2**63),
    "zip64: end records that disagree": lambda: patched(patched(honest(), END, 8, "<H", 3), END, 10, "<H", 3),
    "big-endian numbers": lambda: honest().replace(b"little", b"bigbig"),
}


# ---- B3 to B8: safetensors


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def described(data: bytes = bytes(8), **tensors: Any) -> bytes:
    entries = {name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True)) for name, entry in tensors.items()}
    return framed(json.dumps(entries).encode(), data)


GOOD = ("F32", [2], [0, 8])
SAFETENSORS = {
    "B3 empty": b"",
    "B3 seven bytes": b"\x02\0\0\0\0\0\0",
    "B4 header of 2^63": framed(b"{}", length=2**63),
    "B4 header of 2^64 - 1": framed(b"{}", length=2**64 - 1),
    "B4 header longer than the file": framed(b"{}", length=3),
    "B4 header of 101 MB": framed(b"{}", length=101_000_000),
    "B4 header of 1 MiB and a byte": framed(b"{" + b" " * 2**20),
    "B4 header of nothing": bytes(100),
    "B5 not JSON": framed(b"{not json at all}"),
    "B5 not JSON, no brace": framed(b"nonsense, nonsense"),
    "B5 not an object": framed(b"[1, 2]"),
    "B5 bad UTF-8": framed(b'{"\xff\xfe": 1}'),
    "B5 100,000 lists deep": framed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "B5 100,000 objects deep": framed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "B5 a name twice": described(a=GOOD).replace(b"}}", b'},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "B5 a field twice": framed(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "B5 NaN": framed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "B5 integer of 5,000 digits": framed(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,8]}}', bytes(8)),
    "B5 a field too many": framed(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}', bytes(8)),
    "B5 a field too few": framed(b'{"a":{"dtype":"F32","shape":[2]}}', bytes(8)),
    "B5 no tensor": framed(b'{"a":7}'),
    "B6 overlap": described(a=GOOD, b=("F32", [1], [4, 8])),
    "B6 one range twice": described(a=GOOD, b=GOOD),
    "B6 hole": described(bytes(16), a=GOOD, b=("F32", [1], [12, 16])),
    "B6 hole at the start": described(a=("F32", [1], [4, 8])),
    "B6 past the end": described(a=("F32", [4], [0, 16])),
    "B6 backwards": described(a=("F32", [2], [8, 0])),
    "B6 negative offset": described(a=("F32", [2], [-8, 0])),
    "B6 three offsets": described(a=("F32", [2], [0, 4, 8])),
    "B6 offset of true": described(a=("U8", [1], [False, True]), data=bytes(1)),
    "B6 cut by one": described(a=GOOD)[:-1],
    "B6 trailing byte": described(a=GOOD) + b"\0",
    "B6 a zip archive behind": described(a=GOOD) + plain(),
    "B7 product overflows to the right size": described(a=("F32", [2**62, 2**62], [0, 8])),
    "B7 zero beside an overflow": described(a=("F32", [0, 2**62, 2**62], [0, 0]), b=GOOD),
    "B7 negative": described(a=("F32", [-2], [0, 8])),
    "B7 two negatives": described(a=("F32", [-1, -2], [0, 8])),
    "B7 half": described(a=("F32", [2.0], [0, 8])),
    "B7 true": described(a=("F64", [True], [0, 8])),
    "B7 9 dimensions": described(a=("F32", [2, *[1] * 8], [0, 8])),
    "B7 200,000 dimensions": described(a=("F32", [1] * 200_000, [0, 4])),
    "B7 unknown dtype": described(a=("F33", [2], [0, 8])),
    "B7 shape of another size": described(a=("F32", [3], [0, 8])),
    "B8 100,000 empty tensors": described(b"", **{f"t{i}": ("F32", [0], [0, 0]) for i in range(100_000)}),
    "B8 10,001 tiny tensors": described(b"", **{f"{i:x}": ("U8", [0], [0, 0]) for i in range(10_001)}),
    "B8 100,000 entries that are no tensors": framed(json.dumps({f"{i:x}": 0 for i in range(90_000)}, separators=(",", ":")).encode()),
}  # fmt: skip
