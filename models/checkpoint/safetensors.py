"""The bytes of a safetensors file -> tensors over them. Every claim of the header is checked before it is used; the library is made for honest files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.checkpoint.limits import Limits
from models.checkpoint.strict_json import parse
from models.checkpoint.torch_zip import MOST_DIMENSIONS, bytes_tensor
from models.errors import CheckpointDtype, CheckpointInvalid

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"C64": torch.complex64, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
_SMALL = ("F4", "F6_E2M3", "F6_E3M2")  # less than a byte: known to the format, and nothing that torch computes with


def read_safetensors(view: memoryview, limits: Limits) -> dict[str, Tensor]:
    length = int.from_bytes(view[:8], "little")
    if not 2 <= length <= min(limits.header_bytes, len(view) - 8):
        raise CheckpointInvalid(f"The safetensors header is cut short, or longer than {limits.header_bytes:,} bytes.")
    data, end = view[8 + length :], 0
    tensors: dict[str, Tensor] = {}
    claims = _header(bytes(view[8 : 8 + length]), limits)
    for name, dtype, shape, (start, stop) in sorted(claims, key=lambda claim: claim[3]):
        if start != end or stop < start or stop > len(data) or math.prod(shape) * dtype.itemsize != stop - start:
            raise CheckpointInvalid("The safetensors offsets leave holes, overlap, reach past the end, or do not fit the shapes.")
        end = stop
        raw = bytes_tensor(data[start:stop], dtype.itemsize)
        tensors[name] = raw.view(dtype).view(shape)
    if end != len(data):
        raise CheckpointInvalid("The safetensors file has bytes behind its last tensor.")
    return {name: tensors[name] for name, *_ in claims}  # the order of the header, not of the offsets


_Claim = tuple[str, torch.dtype, list[int], list[int]]


def _header(text: bytes, limits: Limits) -> list[_Claim]:
    try:
        header = parse(text)
    except ValueError as error:
        raise CheckpointInvalid("The safetensors header is not strict JSON.") from error
    if not isinstance(header, dict):
        raise CheckpointInvalid("The safetensors header is not a JSON object.")
    header.pop("__metadata__", None)  # anything may stand there; it is neither used nor shown
    if len(header) > limits.tensors:
        raise CheckpointInvalid(f"The checkpoint has more than {limits.tensors:,} tensors.")
    return [_claim(name, entry, limits) for name, entry in header.items()]


def _claim(name: str, entry: object, limits: Limits) -> _Claim:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(), int()] as offsets, **rest} if not rest:
            sane = all(type(number) is int and 0 <= number <= limits.file_bytes for number in (*shape, *offsets))
            # Lengths beside a zero count too: torch overflows on strides that belong to no element.
            if not sane or len(shape) > MOST_DIMENSIONS or math.prod(max(n, 1) for n in shape) > limits.file_bytes:
                raise CheckpointInvalid("The safetensors header states an impossible shape or offset.")
            if kind in _SMALL:
                raise CheckpointDtype
            if kind not in _DTYPES:
                raise CheckpointInvalid("The safetensors header names an unknown dtype.")
            return name, _DTYPES[kind], shape, offsets
    raise CheckpointInvalid("The safetensors header describes a tensor by other than dtype, shape and data_offsets.")
