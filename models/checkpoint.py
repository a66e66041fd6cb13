"""Untrusted bytes -> plain tensors, never running anything that is in them. Owns what a checkpoint may be and where in it the weights are.

Takes safetensors and torch zip archives (`torch.save`), told apart by content; every tensor is a view of a private map of the file, so
the file must not be cut short or overwritten while they live. Refuses everything else with a sentence on how to convert it, and weights
that cannot be those of a trained network.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from models import torch_zip
from models.errors import (
    CheckpointDegenerate,
    CheckpointDtype,
    CheckpointFormat,
    CheckpointInvalid,
    CheckpointMismatch,
    CheckpointNotFinite,
)
from models.torch_pickle import Dead, TensorRef, interpret

HUGE = 1e30  # no trained weight is so large, and its square overflows float32
_TINY = torch.finfo(torch.float32).tiny

# Where training scripts keep the weights, in the order of preference: weights as trained before their moving average.
WEIGHT_KEYS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "net_state_dict", "network", "module", "weights", "params"),
    *("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "params_ema"),
)
NOT_WEIGHTS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim", "scheduler", "lr_scheduler", "scaler")
# Names that wrap a whole network; `_orig_mod` (torch.compile) is no name of a layer anywhere and goes wherever it stands.
WRAPPERS = ("module", "model", "_model", "net", "network", "backbone", "ema_model")


@dataclass(frozen=True)
class Limits:
    """What one file may cost. The defaults hold a hostile file to some seconds and about 0.5 GB beside what it inflates to."""

    file_bytes: int = 4 << 30
    header_bytes: int = 1 << 20  # of safetensors; 10,000 tensors fit
    tensors: int = 10_000  # of the state dict
    weight_bytes: int = 8 << 30  # all tensors of the state dict written out, shared ones once for each name
    pickle_bytes: int = 512 << 20  # pixels inside the pickle are passed over unread, so this may be large
    pickle_opcodes: int = 4_000_000
    zip_entries: int = 100_000
    name_length: int = 512
    expansion: int = 8  # inflated and shared bytes, as multiples of the file, where they are more than `expansion_floor`
    expansion_floor: int = 16 << 20


@dataclass(frozen=True)
class Checkpoint:
    format: str  # "safetensors" or "torch-zip"
    tensors: dict[str, Tensor]  # the state dict, on the CPU, bit for bit; wrapper prefixes are gone from the names
    source: str  # path of the state dict in the file, such as "model"; empty for the top
    notes: tuple[str, ...]  # what was chosen, stripped or left out, in plain sentences
    hints: dict[str, str | int] = field(default_factory=dict)  # model_name, num_classes, img_size, as far as the file states them


def read_checkpoint(path: Path, limits: Limits = Limits()) -> Checkpoint:
    """Raises a subclass of CheckpointProblem for every fault of the file; OSError where it cannot be opened at all."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size > limits.file_bytes:
            raise CheckpointInvalid(f"The checkpoint is larger than {limits.file_bytes:,} bytes.")
        if size < 8:
            raise CheckpointInvalid("The checkpoint is empty or cut short.")
        # Copy on write: tensors over a read-only map would crash the process when somebody writes to one.
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    if _sniff(view) == "torch-zip":
        return _read_torch(view, limits)
    return _finish("safetensors", _read_safetensors(view, limits), "", [], {}, limits)


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Floating weights as float32, int64 and int32 buffers as they are; they may share memory with the checkpoint's and with each other.

    Raises CheckpointDtype, CheckpointNotFinite or CheckpointDegenerate.
    """
    floats = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.dtype in _FLOATS}
    if wrong := [name for name, tensor in checkpoint.tensors.items() if tensor.dtype not in (*_FLOATS, *_INTEGERS)]:
        kinds = ", ".join(sorted({str(checkpoint.tensors[name].dtype).removeprefix("torch.") for name in wrong}))
        raise CheckpointDtype(f"Weights of type {kinds} are not taken: {_names(wrong)}. Save them as float32, float64, float16 or bfloat16.")
    bounds = {name: [bound.item() for bound in tensor.aminmax()] for name, tensor in floats.items() if tensor.numel()}
    if wrong := [name for name, pair in bounds.items() if not all(map(math.isfinite, pair))]:  # aminmax hands NaN on
        raise CheckpointNotFinite(f"These weights hold NaN or infinity: {_names(wrong)}. Nothing can be scored with them.")
    peaks = {name: max(-low, high) for name, (low, high) in bounds.items()}
    if wrong := [name for name, peak in peaks.items() if peak >= HUGE]:
        raise CheckpointDegenerate(f"These weights are as large as {HUGE:.0e} or larger: {_names(wrong)}.")
    # Single layers may be zero (a last normalisation often starts so), and so may every bias; not every matrix and kernel.
    judged = [peak for name, peak in peaks.items() if floats[name].dim() > 1] or list(peaks.values())
    if max(judged, default=0.0) < _TINY:
        raise CheckpointDegenerate("All weights are zero, or too small to be normal float32 numbers.")
    # One channel of variance 0 is a dead one, which trained networks have; a layer of them, or a negative one, is damage.
    if wrong := [name for name, (low, high) in bounds.items() if name.endswith("running_var") and (low < 0 or high <= 0)]:
        raise CheckpointDegenerate(f"These running variances are negative, or zero in every channel: {_names(wrong)}.")
    return {name: tensor.float() if name in floats else tensor for name, tensor in checkpoint.tensors.items()}


def clean_name(name: str) -> str:
    """A name from the file, fit for a message, a log and a page: at most 60 plain characters."""
    return re.sub(r"[^A-Za-z0-9_.:/-]", "?", name[:60])


def _names(names: list[str]) -> str:
    return ", ".join(clean_name(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- which format it is


def _sniff(view: memoryview) -> str:
    if view[:4] == torch_zip.MAGIC:
        return "torch-zip"
    head, last = bytes(view[:512]), bytes(view[-1:])
    fits = int.from_bytes(head[:8], "little") <= len(view) - 8
    foreign = next((name for name, matches in _FOREIGN if matches(head, last)), "")
    # The brace decides before the foreign signs: a header of 640 bytes starts as a pickle does. A length that fits is seldom chance: the
    # file is then taken for safetensors with a damaged header, which is the more helpful thing to say.
    if (head[8:9] == b"{" and fits) or ((head[8:9] == b"{" or fits) and not foreign):
        return "safetensors"
    raise CheckpointFormat(
        f"The file is {foreign or 'neither safetensors nor a torch zip archive'}. Load it where it was made and save the weights alone: "
        "`safetensors.torch.save_file(model.state_dict(), 'model.safetensors')`."
    )


_PICKLE = "a bare pickle, which cannot be read without running it"
_FOREIGN: tuple[tuple[str, Callable[[bytes, bytes], bool]], ...] = (
    ("a torch file of the old format, from before torch 1.6", lambda head, _: head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")),
    (_PICKLE, lambda head, _: head[0] == 0x80 and 0 < head[1] < 6),
    (_PICKLE, lambda head, last: head[0] in b"(c]})li" and last == b"."),
    ("an HDF5 file (Keras?)", lambda head, _: head.startswith(b"\x89HDF\r\n\x1a\n")),
    ("a GGUF file", lambda head, _: head.startswith(b"GGUF")),
    ("an ONNX model", lambda head, _: head[0] == 8 and 0 < head[1] < 32 and head[2] in b"\x12\x1a\x22\x2a\x32\x3a\x42"),
    ("a tar archive", lambda head, _: head[257:262] == b"ustar"),
    ("compressed", lambda head, _: head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd"))),
    ("a numpy file", lambda head, _: head.startswith(b"\x93NUMPY")),
)


# ---- safetensors

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"C64": torch.complex64, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
_SMALL = ("F4", "F6_E2M3", "F6_E3M2")  # less than a byte: known to the format, and nothing that torch computes with
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)


def _read_safetensors(view: memoryview, limits: Limits) -> dict[str, Tensor]:
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
        raw = torch_zip.bytes_tensor(data[start:stop], dtype.itemsize)
        tensors[name] = raw.view(dtype).view(shape)
    if end != len(data):
        raise CheckpointInvalid("The safetensors file has bytes behind its last tensor.")
    return {name: tensors[name] for name, *_ in claims}  # the order of the header, not of the offsets


_Claim = tuple[str, torch.dtype, list[int], list[int]]


def _header(text: bytes, limits: Limits) -> list[_Claim]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
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
            if not sane or len(shape) > torch_zip.MOST_DIMENSIONS or math.prod(max(n, 1) for n in shape) > limits.file_bytes:
                raise CheckpointInvalid("The safetensors header states an impossible shape or offset.")
            if kind in _SMALL:
                raise CheckpointDtype
            if kind not in _DTYPES:
                raise CheckpointInvalid("The safetensors header names an unknown dtype.")
            return name, _DTYPES[kind], shape, offsets
    raise CheckpointInvalid("The safetensors header describes a tensor by other than dtype, shape and data_offsets.")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(made := dict(pairs)) != len(pairs):
        raise ValueError("a name twice")
    return made


def _constant(_: str) -> object:
    raise ValueError("NaN or infinity")


# ---- torch zip archives


def _read_torch(view: memoryview, limits: Limits) -> Checkpoint:
    room = min(limits.weight_bytes, max(limits.expansion_floor, limits.expansion * len(view)))
    archive = torch_zip.open_archive(view, limits.zip_entries, room)
    pickled = interpret(archive.read("data.pkl", limits.pickle_bytes), limits.pickle_opcodes)
    found = _locate(pickled.root)
    if found is None and (pickled.tensors or not isinstance(pickled.root, dict)):
        raise CheckpointFormat(
            "The file holds a whole pickled module or other object, not a state dict. Load it where it was made and save "
            "`model.state_dict()` with `torch.save` or `safetensors.torch.save_file`."
        )
    if found is None:
        raise CheckpointMismatch("The checkpoint holds no tensors.")
    path, state, notes = found
    if packed := [name for name, value in state.items() if _is_rebuilt(value) and isinstance(value, Dead)]:
        raise CheckpointDtype(f"These tensors are quantised, sparse or otherwise not plain: {_names(packed)}. Save dense floating tensors.")
    claims = {name: value for name, value in state.items() if isinstance(value, TensorRef)}
    if len(claims) > limits.tensors:
        raise CheckpointInvalid(f"The checkpoint has more than {limits.tensors:,} tensors.")
    if others := [name for name in state if name not in claims]:
        notes.append(f"Entries that are no tensors were left out: {_names(others)}.")
    tensors: dict[str, Tensor] = {}
    for name, claim in claims.items():
        tensors[name] = archive.tensor(claim)
        room -= tensors[name].nbytes
        if room < 0:
            raise CheckpointInvalid("The tensors share storages so often that they would be many times larger than the file.")
    hints = _hints(pickled.root) if isinstance(pickled.root, dict) else {}
    return _finish("torch-zip", tensors, ".".join(map(clean_name, path)), notes, hints, limits)


def _is_rebuilt(value: object) -> bool:
    return isinstance(value, TensorRef) or (isinstance(value, Dead) and value.name.startswith("torch._utils._rebuild_"))


_Path = tuple[str, ...]


def _locate(root: object) -> tuple[_Path, dict[str, object], list[str]] | None:
    """The path of the dict that holds the weights, that dict, and notes.

    The dict of the first usual name that holds more tensors than the top holds itself; where there is none, the largest.
    """
    found = {path: (node, count) for path, node in _dicts(root) if (count := sum(map(_is_rebuilt, node.values())))}
    if not found:
        return None
    at_top = found.get((), ({}, 0))[1]
    usual = [path for path, (_, count) in found.items() if path and set(path) <= set(WEIGHT_KEYS) and count > at_top]
    chosen = min(usual, key=lambda path: [WEIGHT_KEYS.index(key) for key in path]) if usual else max(found, key=lambda path: found[path][1])
    notes = []
    if chosen:
        why = "" if usual else ", the largest dict of tensors, since none has a usual name"
        notes.append(f"The weights were taken from {clean_name('.'.join(chosen))}{why}.")
    if others := [".".join(path) or "(top)" for path in found if path != chosen]:
        notes.append(f"Other tensors were left aside, in: {_names(others)}.")
    return chosen, found[chosen][0], notes


def _dicts(root: object) -> Iterator[tuple[_Path, dict[str, object]]]:
    """The dicts at the top and at most two levels down, each once: linear however often they contain one another."""
    queue: list[tuple[_Path, dict[str, object]]] = [((), root)] if isinstance(root, dict) else []
    seen = {id(root)}
    for path, node in queue:
        yield path, node
        for key in (*WEIGHT_KEYS, *node) if len(path) < 2 else ():  # the usual names first, so that they name a dict that has two names
            if isinstance(value := node.get(key), dict) and id(value) not in seen and key not in NOT_WEIGHTS:
                seen.add(id(value))
                queue.append(((*path, key), value))


def _hints(root: dict[str, object]) -> dict[str, str | int]:
    """What BackdoorBench and the usual training scripts say of the model. Only a hint: nothing is believed that the tensors contradict."""
    hints: dict[str, str | int] = {}
    for key, name in (("arch", "model_name"), ("model_name", "model_name")):
        if isinstance(value := root.get(key), str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", value):
            hints[name] = value
    for key in ("num_classes", "img_size"):
        value = root.get(key)
        if key == "img_size" and isinstance(value, (tuple, list)) and len(value) > 1 and value[0] == value[1]:
            value = value[0]  # (height, width, channels)
        if type(value) is int and 0 < value <= 100_000:
            hints[key] = value
    return hints


# ---- both


def _finish(kind: str, tensors: dict[str, Tensor], source: str, notes: list[str], hints: dict[str, str | int], limits: Limits) -> Checkpoint:
    if not tensors:
        raise CheckpointMismatch("The checkpoint holds no tensors.")
    if any(len(name) > limits.name_length or not name.isprintable() for name in tensors):
        raise CheckpointInvalid(f"A tensor has a name of more than {limits.name_length} characters or of unprintable ones.")
    if sum(tensor.nbytes for tensor in tensors.values()) > limits.weight_bytes:
        raise CheckpointInvalid(f"The weights are larger than {limits.weight_bytes:,} bytes.")
    return Checkpoint(kind, _strip(tensors, notes), source, tuple(notes), hints)


def _strip(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Removes the names of wrappers that all keys share. They may nest; one number may be among them (Sequential(Resize, network))."""
    if "n_averaged" in tensors and all(name.startswith("module.") for name in tensors if name != "n_averaged"):
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}  # the counter of torch's AveragedModel
        notes.append("The counter n_averaged was left out.")
    names = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in tensors]
    removed = ["_orig_mod"] if names != list(tensors) else []
    while len(heads := {name.partition(".")[0] for name in names}) == 1 and all(rests := [name.partition(".")[2] for name in names]):
        (head,) = heads
        # A plain Sequential with weights in one layer ("1.weight", "1.bias") is left alone: a wrapped network has names of its own.
        number = head.isdecimal() and not any(part.isdecimal() for part in removed) and any("." in rest for rest in rests)
        if head not in WRAPPERS and not number:
            break
        names, removed = rests, [*removed, head]
    if removed:
        notes.append(f"Wrapper prefixes were stripped from the names: {_names(removed)}.")
    if len(set(names)) != len(names):
        raise CheckpointInvalid("Two tensors have the same name once wrapper prefixes are stripped.")
    return dict(zip(names, tensors.values(), strict=True))
