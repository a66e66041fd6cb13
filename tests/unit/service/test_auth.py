"""Who may call what, and how many guesses a peer has. The clock is the test's."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from service.auth import PEERS_REMEMBERED, WRONG_PER_MINUTE, Authenticator, Scope
from service.errors import Forbidden, RateLimited, Unauthenticated

TOKENS: dict[Scope, str] = {"predict": "predict-secret", "admin": "admin-secret", "metrics": "metrics-secret"}
EVERYTHING = {"predict", "admin", "metrics"}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def request(*authorization: str | bytes, peer: str | None = "10.0.0.1", query: bytes = b"", **others: str) -> Request:
    values = [value.encode("latin-1") if isinstance(value, str) else value for value in authorization]
    headers = [(b"authorization", value) for value in values] + [(name.encode(), value.encode()) for name, value in others.items()]
    return Request({"type": "http", "scheme": "http", "path": "/", "headers": headers, "query_string": query, "client": (peer, 1) if peer else None})


def test_without_tokens_everybody_may_do_everything() -> None:
    assert Authenticator({}).scopes(request()) == EVERYTHING


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8080", "guard:8080", "guard.localhost:8080", "127.0.0.1:8080", "127.3.2.1", "[::1]:8080", "[::1]", "10.0.0.7:8080"]
)
def test_without_tokens_whoever_names_this_machine_may_do_everything(host: str) -> None:
    assert Authenticator({}).scopes(request(host=host)) == EVERYTHING
    assert Authenticator({}).scopes(request(host=host, origin=f"http://{host}")) == EVERYTHING


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"host": "evil.example:8080"}, id="a name that was made to mean this machine"),
        pytest.param({"host": "127.0.0.1.evil.example"}, id="one that looks like an address"),
        pytest.param({"host": "localhost.evil.example"}, id="one that looks like localhost"),
        pytest.param({"host": "evil.example.:8080"}, id="one that is written out"),
        pytest.param({"host": "notlocalhost.example"}, id="one that is not of this machine"),
        pytest.param({"host": "localhost:8080", "origin": "https://evil.example"}, id="a form of another page"),
        pytest.param({"host": "localhost:8080", "origin": "null"}, id="a form of a page without an origin"),
        pytest.param({"host": "localhost:8080", "origin": "http://localhost:3000"}, id="a page of another service of this machine"),
    ],
)
def test_without_tokens_pages_of_strangers_administer_nothing(headers: dict[str, str]) -> None:
    assert Authenticator({}).scopes(request(**headers)) == EVERYTHING - {"admin"}
    with pytest.raises(Forbidden, match="an IP address or a name without a dot only"):
        Authenticator({}).require(request(**headers), "admin")
    assert Authenticator(TOKENS).scopes(request("Bearer admin-secret", **headers)) == EVERYTHING  # which no page of a stranger has


@pytest.mark.parametrize(
    ("token", "scopes"),
    [
        pytest.param("predict-secret", {"predict"}, id="the predict token may predict"),
        pytest.param("metrics-secret", {"metrics"}, id="the metrics token may read metrics"),
        pytest.param("admin-secret", EVERYTHING, id="the admin token may do everything"),
    ],
)
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
def test_a_token_gives_its_scopes(token: str, scopes: set[str], scheme: str) -> None:
    assert Authenticator(TOKENS).scopes(request(scheme + token)) == scopes


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param([], id="F1: no token"),
        pytest.param(["Basic cHJlZGljdC1zZWNyZXQ="], id="F1: Basic"),
        pytest.param(["Bearer"], id="F1: Bearer alone"),
        pytest.param(["Bearer "], id="F1: an empty token"),
        pytest.param(["predict-secret"], id="F1: a token without its scheme"),
        pytest.param(["Bearer predict-secret", "Bearer predict-secret"], id="F1: two headers"),
        pytest.param(["Bearer Predict-secret"], id="F2: a wrong token of the right length"),
        pytest.param(["Bearer predict-secre"], id="F2: a prefix of the token"),
        pytest.param(["Bearer predict-secret\0"], id="F2: the token and a NUL"),
        pytest.param(["Bearer predict-secret, Bearer predict-secret"], id="F2: the token twice"),
        pytest.param(["Bearer " + "a" * 2**20], id="F2: a token of 1 MB"),
        pytest.param([b"Bearer \xff\xfe"], id="F2: a token that is no text"),
    ],
)
def test_nothing_else_is_a_token(authorization: list[str | bytes]) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        Authenticator(TOKENS).scopes(request(*authorization))
    assert refusal.value.headers == {"WWW-Authenticate": "Bearer"}


def test_f5_a_token_in_the_query_is_none() -> None:
    with pytest.raises(Unauthenticated):
        Authenticator(TOKENS).scopes(request(query=b"token=admin-secret&access_token=admin-secret"))


def test_a_token_may_hold_any_letters() -> None:
    authenticator = Authenticator({"admin": "schlüsselwörter"})
    assert authenticator.scopes(request("Bearer schlüsselwörter".encode())) == EVERYTHING


@pytest.mark.parametrize(("token", "scope"), [("predict-secret", "admin"), ("predict-secret", "metrics"), ("metrics-secret", "predict")])
def test_f3_a_scope_does_not_include_another(token: str, scope: Scope) -> None:
    with pytest.raises(Forbidden):
        Authenticator(TOKENS).require(request(f"Bearer {token}"), scope)


def guess(authenticator: Authenticator, times: int, peer: str = "10.0.0.1") -> list[type[Exception]]:
    found: list[type[Exception]] = []
    for _ in range(times):
        with pytest.raises((Unauthenticated, RateLimited)) as refusal:
            authenticator.scopes(request("Bearer wrong-guess", peer=peer))
        found.append(type(refusal.value))
    return found


def test_f7_after_20_wrong_tokens_a_minute_no_more_are_heard() -> None:
    clock = Clock()
    authenticator = Authenticator(TOKENS, clock)
    assert guess(authenticator, WRONG_PER_MINUTE + 2) == [Unauthenticated] * WRONG_PER_MINUTE + [RateLimited] * 2
    clock.now += 59.9
    assert guess(authenticator, 1) == [RateLimited]
    clock.now += 60.1
    assert guess(authenticator, 1) == [Unauthenticated]


def test_f7_the_right_token_is_served_all_the_same() -> None:
    authenticator = Authenticator(TOKENS, Clock())
    guess(authenticator, 100)
    assert authenticator.scopes(request("Bearer predict-secret")) == {"predict"}


def test_f7_another_peer_has_its_own_guesses() -> None:
    authenticator = Authenticator(TOKENS, Clock())
    guess(authenticator, 100)
    assert guess(authenticator, 1, peer="10.0.0.2") == [Unauthenticated]


def test_f7_to_forget_the_token_is_no_guess() -> None:
    authenticator = Authenticator(TOKENS, Clock())
    for _ in range(100):
        with pytest.raises(Unauthenticated):
            authenticator.scopes(request())


def test_p5_only_so_many_peers_are_remembered() -> None:
    authenticator = Authenticator(TOKENS, Clock())
    for number in range(PEERS_REMEMBERED + 100):
        guess(authenticator, 1, peer=f"peer {number}")
    assert len(authenticator._wrong) == PEERS_REMEMBERED


def test_a_request_without_a_peer_can_be_judged() -> None:
    with pytest.raises(Unauthenticated):
        Authenticator(TOKENS).scopes(request("Bearer wrong-guess", peer=None))
