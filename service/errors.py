"""What HTTP adds to the tree of refusals in `models.errors`, and the one function that renders any of them (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from starlette.responses import JSONResponse

from models.errors import ConfigInvalid, Conflict, NotFound, Problem


class RequestProblem(Problem):
    """The request could not be read.

    The root of the problems with requests: they may bring headers, and the fields that are wrong.
    """

    status: ClassVar[int] = 400
    code = "bad_request"
    title = "Bad request"

    def __init__(self, detail: str | None = None, headers: Mapping[str, str] | None = None, errors: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(detail)
        self.headers = dict(headers or {})
        self.errors = list(errors)


class BodyEmpty(RequestProblem):
    """The body is empty; send the image itself, or multipart with a part named `image`."""

    code = "body_empty"
    title = "Empty body"


class BodyTooLarge(RequestProblem):
    """The body is larger than this server takes."""

    status = 413
    code = "body_too_large"
    title = "Body too large"


class MediaType(RequestProblem):
    """This call does not take bodies of this type."""

    status = 415
    code = "media_type"
    title = "Media type not taken"


class ContentEncoding(RequestProblem):
    """Compressed bodies are not taken; send the bytes as they are."""

    status = 415
    code = "content_encoding"
    title = "Content encoding not taken"


class MultipartInvalid(RequestProblem):
    """The multipart body is malformed."""

    code = "multipart_invalid"
    title = "Malformed multipart body"


class ImageMissing(RequestProblem):
    """There is no file part named `image`."""

    status = 422
    code = "image_missing"
    title = "Image missing"


class OneImageOnly(RequestProblem):
    """This call judges one image; `predict-batch` takes several."""

    status = 422
    code = "one_image_only"
    title = "One image only"


class TooManyImages(RequestProblem):
    """There are more images in this request than one request may carry."""

    status = 422
    code = "too_many_images"
    title = "Too many images"


class UnexpectedField(RequestProblem):
    """The body has a part that this call does not know."""

    status = 422
    code = "unexpected_field"
    title = "Unexpected part"


class UploadMissing(RequestProblem):
    """A calibration needs the file parts `checkpoint` and `clean_set` and a `config` part with at least a name."""

    status = 422
    code = "upload_missing"
    title = "Part of the upload missing"


class JsonInvalid(RequestProblem):
    """The body is not valid JSON."""

    code = "json_invalid"
    title = "Malformed JSON"


class FieldsInvalid(RequestProblem):
    """A field is missing, unknown or out of its range."""

    status = 422
    code = "config_invalid"
    title = ConfigInvalid.title


class DeadlineInvalid(RequestProblem):
    """X-Deadline-Ms must be a whole number of milliseconds."""

    status = 422
    code = "deadline_invalid"
    title = "Deadline not valid"


class Unauthenticated(RequestProblem):
    """Send a valid token as `Authorization: Bearer <token>`."""

    status = 401
    code = "unauthenticated"
    title = "Not authenticated"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, {"WWW-Authenticate": "Bearer"})


class Forbidden(RequestProblem):
    """This token's scope does not include this call."""

    status = 403
    code = "forbidden"
    title = "Not allowed"


class MethodNotAllowed(RequestProblem):
    """This path does not take this method."""

    status = 405
    code = "method_not_allowed"
    title = "Method not allowed"


class IdempotencyConflict(RequestProblem):
    """This Idempotency-Key was used for a different upload."""

    status = 409
    code = "idempotency_conflict"
    title = "Idempotency key reused"


class RateLimited(RequestProblem):
    """Too many wrong tokens from this address; wait a minute."""

    status = 429
    code = "rate_limited"
    title = "Too many attempts"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, {"Retry-After": "60"})


class Overloaded(RequestProblem):
    """More images are waiting than can be judged in time; try again shortly."""

    status = 429
    code = "overloaded"
    title = "Overloaded"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, {"Retry-After": "1"})


class QueueFull(RequestProblem):
    """As many calibrations are waiting as may wait; try again when one has finished."""

    status = 429
    code = "queue_full"
    title = "Too many calibrations waiting"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, {"Retry-After": "60"})


class NoActiveBundle(RequestProblem):
    """This guard has no version that could be served; activate one."""

    status = 503
    code = "no_active_bundle"
    title = "No active version"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, {"Retry-After": "5"})


class Draining(RequestProblem):
    """The server is shutting down; send the request to another."""

    status = 503
    code = "draining"
    title = "Shutting down"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, {"Retry-After": "5", "Connection": "close"})


class NotReady(RequestProblem):
    """The server is not ready for traffic."""

    status = 503
    code = "not_ready"
    title = "Not ready"


class DeviceFailed(RequestProblem):
    """The device failed on this image; no prediction is given."""

    status = 503
    code = "device_failed"
    title = "Device failed"


class DeadlineExceeded(RequestProblem):
    """The image was not judged before its deadline; no prediction is given."""

    status = 504
    code = "deadline_exceeded"
    title = "Deadline exceeded"


class JobsUnavailable(RequestProblem):
    """The job database cannot be used just now; predictions are not affected."""

    status = 503
    code = "jobs_unavailable"
    title = "Jobs unavailable"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, {"Retry-After": "5"})


class ReceiveTimeout(RequestProblem):
    """The request did not arrive in time."""

    status = 408
    code = "receive_timeout"
    title = "Request timeout"


class UriTooLong(RequestProblem):
    """The request target is too long."""

    status = 414
    code = "uri_too_long"
    title = "URI too long"


class HeadersTooLarge(RequestProblem):
    """The request has too many header lines or bytes."""

    status = 431
    code = "headers_too_large"
    title = "Headers too large"


class HostHeader(RequestProblem):
    """Send exactly one valid Host header."""

    code = "host_header"
    title = "Host header"


class UpgradeRefused(RequestProblem):
    """Only HTTP/1.1 is spoken here: send the request without Upgrade."""

    code = "upgrade_refused"
    title = "Upgrade refused"


class PipelineTooDeep(RequestProblem):
    """Too many requests were sent ahead of their answers."""

    code = "pipeline_too_deep"
    title = "Pipeline too deep"


def render(problem: Problem, request_id: str) -> JSONResponse:
    """The one shape of an error: RFC 9457 with `code` and `request_id`, and `errors` where fields are wrong."""
    body: dict[str, Any] = {
        "type": f"urn:badexpert:{problem.code}",
        "title": problem.title,
        "status": problem.status,
        "code": problem.code,
        "detail": problem.detail,
        "request_id": request_id,
    }
    headers = {"X-Request-Id": request_id}
    if problem.status in (429, 503):
        headers["Retry-After"] = "5"
    if isinstance(problem, RequestProblem):
        headers |= problem.headers
        if problem.errors:
            body["errors"] = problem.errors
    return JSONResponse(body, problem.status, headers, media_type="application/problem+json")


def from_http(status: int, headers: Mapping[str, str] | None) -> Problem:
    """What Starlette's own HTTPException stands for: it raises 404 and 405 while routing, 400 for bodies it cannot read."""
    if status == 404:
        return NotFound()
    if status == 405:
        return MethodNotAllowed(None, {"Allow": (headers or {}).get("Allow", "GET")})
    if status == 413:
        return BodyTooLarge()
    if status == 409:
        return Conflict()
    return RequestProblem() if status < 500 else Problem()
