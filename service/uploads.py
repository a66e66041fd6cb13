"""Uploads of several files beside a JSON configuration: streamed into a folder under caps, hashed on the way."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fastapi import Request
from pydantic import BaseModel

from models.claims import claimed
from models.durable import storage_errors
from service.bodies import Capped, Sink, media_type, parse_model, read_multipart
from service.errors import BodyTooLarge, MediaType, UnexpectedField, UploadMissing

M = TypeVar("M", bound=BaseModel)
# Part -> file name in the folder. A checkpoint finds the config.json that lies beside it.
FILES = {"checkpoint": "checkpoint", "checkpoint_config": "config.json", "clean_set": "clean_set", "validation_set": "validation_set"}


@dataclass(frozen=True)
class Form:
    """The parts that a call takes; `config` is one more, JSON of the given model."""

    required: Sequence[str]
    optional: Sequence[str]
    config_required: bool

    @property
    def needed(self) -> list[str]:
        """The parts that have to be there."""
        return [*(["config"] if self.config_required else []), *self.required]

    @property
    def files(self) -> list[str]:
        return [name for name in FILES if name in (*self.required, *self.optional)]

    def openapi(self, model: type[BaseModel]) -> dict[str, Any]:
        """The request body, for the API's description."""
        properties = {"config": model.model_json_schema(), **{name: {"type": "string", "format": "binary"} for name in self.files}}
        schema = {"type": "object", "properties": properties, "required": self.needed}
        content = {"schema": schema, "encoding": {"config": {"contentType": "application/json"}}}
        return {"requestBody": {"required": True, "content": {"multipart/form-data": content}}}


CALIBRATION = Form(("checkpoint", "clean_set"), ("checkpoint_config", "validation_set"), config_required=True)
INSPECTION = Form(("checkpoint",), ("checkpoint_config", "clean_set"), config_required=False)


class _HashedFile:
    """Writes a part to disk under a cap and hashes it on the way."""

    def __init__(self, stream: BinaryIO, digest: Any, cap: int) -> None:
        self._stream, self._digest, self._left, self._cap = stream, digest, cap, cap

    def write(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise BodyTooLarge(f"A file of this upload is larger than the {self._cap:,} bytes that are taken.")
        self._digest.update(data)
        self._stream.write(data)


class _Text:
    """A part that should be a file. Empty, it is a form's way to say that there is none."""

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, data: bytes) -> None:
        if data:
            raise UploadMissing(f"The part `{self._name}` is text; send it as a file (curl: -F {self._name}=@path).")


async def new_folder(parent: Path, held: ExitStack) -> Path:
    """A folder for one upload, under a name that nobody guesses. Until `held` is closed, no server takes it for one that a crash left behind."""

    def make() -> Path:
        folder = parent / secrets.token_hex(12)
        folder.mkdir(parents=True)
        return folder

    with storage_errors():
        return await asyncio.to_thread(held.enter_context, claimed(make))


async def receive(request: Request, form: Form, model: type[M], folder: Path, *, upload_bytes: int, json_bytes: int) -> tuple[M, str]:
    """Stream the parts of an upload into a folder; returns the configuration and a digest of everything. Raises a Problem."""
    parts = f"`config`, {', '.join(f'`{name}`' for name in form.files)}"
    if media_type(request) != "multipart/form-data":
        raise MediaType(f"Send multipart/form-data with the parts {parts}; needed are {', '.join(form.needed)}.")
    digests, text = {name: hashlib.sha256() for name in form.files}, Capped("config", json_bytes)
    seen: set[str] = set()
    with storage_errors(), ExitStack() as files:  # closing a file writes what was still buffered

        def open_part(name: str, is_file: bool) -> Sink:
            if name not in ("config", *form.files) or name in seen:
                raise UnexpectedField(f"An upload has the parts {parts}, once each.")
            if name != "config" and not is_file:
                return _Text(name)
            seen.add(name)
            if name == "config":
                return text
            return _HashedFile(files.enter_context(open(folder / FILES[name], "xb")), digests[name], upload_bytes)

        cap = len(form.files) * upload_bytes + json_bytes + 65536
        await read_multipart(request, open_part, cap=cap, parts=len(form.files) + 1, blocking=True)
    missing = [name for name in form.needed if name not in seen]
    if missing:
        raise UploadMissing(f"The upload lacks {', '.join(f'`{name}`' for name in missing)}.")
    config = parse_model(model, text.getvalue() if "config" in seen else b"{}")
    whole = hashlib.sha256(config.model_dump_json().encode())
    for name in form.files:
        whole.update(digests[name].digest())
    return config, whole.hexdigest()
