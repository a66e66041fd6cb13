"""All settings of the server, read once at the entry point from options and from environment variables that begin with BADEXPERT_."""

from __future__ import annotations

import difflib
import ipaddress
import os
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MiB = 1024 * 1024
SCOPES = {"predict": "send images", "metrics": "read metrics"}


class Settings(BaseSettings):
    """Each field is documented in docs/reference/settings.md; a test walks that table."""

    model_config = SettingsConfigDict(env_prefix="BADEXPERT_", extra="forbid", frozen=True, hide_input_in_errors=True)

    data_dir: Path = Field(Path("var"), description="where guards, jobs and uploads are kept")
    host: str = Field("127.0.0.1", description="address to listen on; any but loopback needs tokens")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    threads: int | None = Field(None, ge=1, description="CPU threads of a forward; by default one a core, and one for small networks")

    architectures: str = Field("", description="architectures of your own, as package.module:factory, separated by commas")

    predict_token: SecretStr | None = Field(None, description="bearer token of the predict scope")
    admin_token: SecretStr | None = Field(None, description="bearer token of the admin scope, which includes the other two")
    metrics_token: SecretStr | None = Field(None, description="bearer token of the metrics scope")
    predict_token_file: Path | None = Field(None, description="file with the predict token; surrounding white space is trimmed")
    admin_token_file: Path | None = Field(None, description="file with the admin token")
    metrics_token_file: Path | None = Field(None, description="file with the metrics token")

    image_bytes: int = Field(10 * MiB, ge=1024, description="largest image body")
    batch_images: int = Field(64, ge=1, le=1024, description="most images in one predict-batch request")
    body_bytes: int = Field(1024 * MiB, ge=1024, description="images that may be in memory at a time, in bytes as they were sent; more are refused with 429")
    upload_bytes: int = Field(4096 * MiB, ge=MiB, description="largest file in a calibration upload")
    json_bytes: int = Field(64 * 1024, ge=1024, le=120 * 1024, description="largest JSON body, at most 122880")

    queue_images: int = Field(512, ge=1, description="images that may wait for the device; more are refused with 429")
    max_batch: int = Field(64, ge=1, le=4096, description="most images in one forward pass; fewer where that would take over 2 s")
    deadline_seconds: float = Field(10.0, gt=0, le=600, description="an image not judged by then is answered 504; X-Deadline-Ms can only shorten it")
    drain_seconds: float = Field(20.0, ge=0, le=600, description="time for requests in flight after SIGTERM")
    queued_jobs: int = Field(8, ge=1, description="calibrations that may wait")
    docs: bool = Field(True, description="serve /docs and /openapi.json")

    @field_validator("port", mode="before")
    @classmethod
    def _not_of_kubernetes(cls, value: object) -> object:
        """Kubernetes tells all pods of a service named badexpert its address, tcp://10.0.0.1:8080, as BADEXPERT_PORT."""
        made_up = isinstance(value, str) and value.startswith(("tcp://", "udp://", "sctp://"))
        return cls.model_fields["port"].default if made_up else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_names()
        batch = self.image_bytes * self.batch_images
        if self.body_bytes < batch:
            raise ValueError(f"one predict-batch request may have {batch} bytes of images: make body_bytes no less, or lower image_bytes or batch_images")
        tokens = {scope: self.token(scope) for scope in ("predict", "admin", "metrics")}
        for scope in ("predict", "metrics"):
            if tokens["admin"] is not None and tokens[scope] == tokens["admin"]:
                raise ValueError(f"the {scope} token is the admin token, too: who may {SCOPES[scope]} could administer; make it another one")
        if not self.is_loopback and not (self.token("predict") and self.token("admin")):
            raise ValueError(f"listening on {self.host} needs tokens: set BADEXPERT_PREDICT_TOKEN_FILE and BADEXPERT_ADMIN_TOKEN_FILE, or listen on 127.0.0.1")
        return self

    def _check_names(self) -> None:
        """A token under a misspelt name would protect nothing. Names that resemble none are nobody's business: Kubernetes makes some up for each service."""
        prefix = "BADEXPERT_"
        names = [f"{prefix}{field.upper()}" for field in type(self).model_fields]
        for name in sorted(map(str.upper, os.environ)):
            if not name.startswith(prefix) or name in names:
                continue
            secret = any(word in name for word in ("TOKEN", "SECRET", "PASSWORD"))
            if meant := difflib.get_close_matches(name, names, 1, 0.0 if secret else 0.9):
                raise ValueError(f"there is no setting {name}; {meant[0]} is one")

    @property
    def own_architectures(self) -> tuple[str, ...]:
        """The references in `architectures`."""
        return own_architectures(self.architectures)

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def token(self, scope: str) -> str | None:
        """The token of a scope, from the variable or the file; None where neither is set. Raises ValueError for an empty or unreadable one."""
        value: SecretStr | None = getattr(self, f"{scope}_token")
        file: Path | None = getattr(self, f"{scope}_token_file")
        if value is None and file is None:
            return None
        if value is not None and file is not None:
            raise ValueError(f"set either the {scope} token or its file, not both")
        try:
            text = (value.get_secret_value() if value is not None else file.read_text() if file is not None else "").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the {scope} token file cannot be read: {error}") from error
        if len(text) < 8:
            raise ValueError(f"the {scope} token is shorter than 8 characters")
        return text


def own_architectures(names: str) -> tuple[str, ...]:
    """References to architectures of the operator's, package.module:factory, separated by commas."""
    return tuple(name for part in names.split(",") if (name := part.strip()))
