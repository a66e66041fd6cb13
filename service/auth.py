"""Who may call what: three bearer tokens, three scopes. Decided from the head of a request, before its body is read.

With no token set (allowed on loopback only, see settings) everybody on this machine may do everything. But a browser on it runs pages of strangers: they
can send forms here, and under a name of theirs that is made to mean 127.0.0.1 read the answers, too. Such requests do not administer anything. The admin
scope includes the other two.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

from starlette.requests import Request

from service.errors import Forbidden, RateLimited, Unauthenticated

Scope = Literal["predict", "admin", "metrics"]
EVERYTHING: frozenset[Scope] = frozenset(("predict", "admin", "metrics"))
STRANGERS_PAGE = (
    "With no token set this call is taken under an IP address or a name without a dot only, such as localhost, and of a web page only if it came from here. "
    "Set tokens to call it in another way."
)
WRONG_PER_MINUTE, PEERS_REMEMBERED, HOSTS_REMEMBERED = 20, 10_000, 100


class Authenticator:
    """Compares tokens in constant time, and refuses to hear more than 20 wrong ones a minute from one peer."""

    def __init__(self, tokens: Mapping[Scope, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._digests = {scope: _digest(token.encode("utf-8", "surrogateescape")) for scope, token in tokens.items()}
        self._clock = clock
        self._wrong: dict[str, deque[float]] = {}

    @property
    def open(self) -> bool:
        """Whether no token is set."""
        return not self._digests

    def scopes(self, request: Request) -> frozenset[Scope]:
        """What the caller of this request may do. Raises Unauthenticated or RateLimited."""
        if self.open:
            return EVERYTHING - {"admin"} if _of_a_strangers_page(request) else EVERYTHING
        headers = request.headers.getlist("authorization")
        peer = request.client.host if request.client else ""
        if len(headers) == 1 and headers[0][:7].lower() == "bearer " and len(headers[0]) < 4096:
            given = _digest(headers[0][7:].strip(" ").encode("latin-1"))  # the bytes as they came
            # All are compared, whichever matches: the time tells nothing about which or how nearly.
            matches = [scope for scope, digest in self._digests.items() if hmac.compare_digest(given, digest)]
            if matches:
                return EVERYTHING if "admin" in matches else frozenset(matches)
        if headers:
            self._count_wrong(peer)
        raise Unauthenticated

    def require(self, request: Request, scope: Scope) -> frozenset[Scope]:
        """The caller's scopes, which include `scope`. Raises Forbidden otherwise."""
        scopes = self.scopes(request)
        if scope not in scopes:
            raise Forbidden(STRANGERS_PAGE if self.open else None)
        return scopes

    def _count_wrong(self, peer: str) -> None:
        now = self._clock()
        recent = self._wrong.setdefault(peer, deque(maxlen=WRONG_PER_MINUTE))
        limited = len(recent) == WRONG_PER_MINUTE and now - recent[0] < 60
        recent.append(now)
        if len(self._wrong) > PEERS_REMEMBERED:
            self._wrong.pop(next(iter(self._wrong)))
        if limited:
            raise RateLimited


def _of_a_strangers_page(request: Request) -> bool:
    """Whether a browser may have been made to send this: the host is a domain, which its owner could point here, or the page is of another origin."""
    host, origin = request.headers.get("host"), request.headers.get("origin")
    if host is None:  # no browser
        return False
    return _is_domain(host) or origin not in (None, f"{request.scope['scheme']}://{host}")


@lru_cache(HOSTS_REMEMBERED)  # asked about every image
def _is_domain(host: str) -> bool:
    """Not so are addresses, and names of this machine or of this network, which have no dot."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if "." not in name.rstrip(".") or name.lower().endswith(".localhost"):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return True
    return False


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
