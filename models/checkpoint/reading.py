"""Untrusted bytes -> plain tensors, never running anything that is in them. Owns what a checkpoint may be.

Takes safetensors and torch zip archives (`torch.save`), told apart by content, alone or in a folder or zip with the JSON files that timm and
transformers write beside them. Tensors are views of a private map of the file, which must not be cut short or overwritten while they
live. Refuses everything else with a sentence on how to convert it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from models.checkpoint import package, torch_zip
from models.checkpoint.limits import Limits, clean_name, listed
from models.checkpoint.mapping import map_file
from models.checkpoint.safetensors import read_safetensors
from models.checkpoint.sidecar import Sidecar, read_sidecar
from models.checkpoint.state_dict import hints_of, is_rebuilt, locate, strip, suspicious
from models.checkpoint.torch_pickle import Dead, TensorRef, interpret
from models.errors import CheckpointDtype, CheckpointFormat, CheckpointInvalid, CheckpointMismatch


@dataclass(frozen=True)
class Checkpoint:
    """What one upload holds."""

    format: str  # "safetensors" or "torch-zip"
    tensors: dict[str, Tensor]  # the state dict, on the CPU, bit for bit; wrapper prefixes are gone from the names
    source: str  # path of the state dict in the file, such as "model"; empty for the top
    notes: tuple[str, ...]  # what was chosen, stripped or left out, in plain sentences
    hints: dict[str, str | int] = field(default_factory=dict)  # model_name, num_classes, img_size, as far as the file states them
    named: tuple[str, ...] = ()  # code that the pickle asks for and no weights need; it was not run
    sidecar: Sidecar | None = None  # what a config.json beside the weights claims


def read_checkpoint(path: Path, limits: Limits = Limits()) -> Checkpoint:  # noqa: B008  # frozen
    """A file, a zip of a folder, or a folder; a config.json beside a file belongs to it.

    Raises a subclass of CheckpointProblem for every fault of what is there; OSError where it cannot be opened at all.
    """
    if path.is_dir():
        return _read_package(package.from_folder(path, limits), limits)
    view = map_file(path, limits.file_bytes)
    if _sniff(view) == "torch-zip":
        room = _room(view, limits)
        entries = torch_zip.open_zip(view, limits.zip_entries, room)
        if not torch_zip.is_torch(entries) and package.holds_weights(entries.names()):
            return _read_package(package.from_zip(entries, limits), limits)
        return _with_config(_read_torch(entries, room, limits), package.beside(path), None)
    return _with_config(_read(view, limits), package.beside(path), None)


def _read_package(files: package.Package, limits: Limits) -> Checkpoint:
    read = [_read(content(limits.file_bytes), limits) for content in files.weights.values()]
    whole = read[0]
    for part in read[1:]:
        if part.tensors.keys() & whole.tensors.keys():
            raise CheckpointInvalid("Two parts of the weights hold a tensor of the same name.")
        whole = replace(whole, tensors={**whole.tensors, **part.tensors})
    name = ", ".join(map(clean_name, files.weights)) if len(read) < 4 else f"{len(read)} parts"
    note = f"The weights were taken from {name}."
    return _with_config(replace(whole, notes=(note, *whole.notes)), files.config, files.preprocessor)


def _with_config(checkpoint: Checkpoint, config: bytes | None, preprocessor: bytes | None) -> Checkpoint:
    sidecar = None if config is None else read_sidecar(config, preprocessor)
    return checkpoint if sidecar is None else replace(checkpoint, sidecar=sidecar, notes=(*checkpoint.notes, *sidecar.notes))


def _read(view: memoryview, limits: Limits) -> Checkpoint:
    """A file of weights, alone or out of a package."""
    if _sniff(view) == "torch-zip":
        room = _room(view, limits)
        return _read_torch(torch_zip.open_zip(view, limits.zip_entries, room), room, limits)
    return _finish("safetensors", read_safetensors(view, limits), "", [], {}, limits)


def _room(view: memoryview, limits: Limits) -> int:
    return min(limits.weight_bytes, max(limits.expansion_floor, limits.expansion * len(view)))


# ---- which format it is


def _sniff(view: memoryview) -> str:
    if len(view) < 8:
        raise CheckpointInvalid("The checkpoint is empty or cut short.")
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


# ---- torch zip archives


def _read_torch(entries: torch_zip.Entries, room: int, limits: Limits) -> Checkpoint:
    archive = torch_zip.open_archive(entries)
    pickled = interpret(archive.pickle(limits.pickle_bytes), limits.pickle_opcodes)
    found = locate(pickled.root)
    if found is None and (pickled.tensors or not isinstance(pickled.root, dict)):
        raise CheckpointFormat(
            "The file holds a whole pickled module or other object, not a state dict. Load it where it was made and save "
            "`model.state_dict()` with `torch.save` or `safetensors.torch.save_file`."
        )
    if found is None:
        raise CheckpointMismatch("The checkpoint holds no tensors.")
    path, state, notes = found
    if packed := [name for name, value in state.items() if is_rebuilt(value) and isinstance(value, Dead)]:
        raise CheckpointDtype(f"These tensors are quantised, sparse or otherwise not plain: {listed(packed)}. Save dense floating tensors.")
    claims = {name: value for name, value in state.items() if isinstance(value, TensorRef)}
    if len(claims) > limits.tensors:
        raise CheckpointInvalid(f"The checkpoint has more than {limits.tensors:,} tensors.")
    if others := [name for name in state if name not in claims]:
        notes.append(f"Entries that are no tensors were left out: {listed(others)}.")
    tensors: dict[str, Tensor] = {}
    for name, claim in claims.items():
        tensors[name] = archive.tensor(claim)
        room -= tensors[name].nbytes
        if room < 0:
            raise CheckpointInvalid("The tensors share storages so often that they would be many times larger than the file.")
    hints = hints_of(pickled.root) if isinstance(pickled.root, dict) else {}
    return replace(_finish("torch-zip", tensors, ".".join(map(clean_name, path)), notes, hints, limits), named=suspicious(pickled.names))


def _finish(kind: str, tensors: dict[str, Tensor], source: str, notes: list[str], hints: dict[str, str | int], limits: Limits) -> Checkpoint:
    if not tensors:
        raise CheckpointMismatch("The checkpoint holds no tensors.")
    if any(len(name) > limits.name_length or not name.isprintable() for name in tensors):
        raise CheckpointInvalid(f"A tensor has a name of more than {limits.name_length} characters or of unprintable ones.")
    if sum(tensor.nbytes for tensor in tensors.values()) > limits.weight_bytes:
        raise CheckpointInvalid(f"The weights are larger than {limits.weight_bytes:,} bytes.")
    return Checkpoint(kind, strip(tensors, notes), source, tuple(notes), hints)
