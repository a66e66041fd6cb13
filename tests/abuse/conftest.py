"""A service that hostile requests are sent to; after each of them it judges a good image as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.abuse.calls import state
from tests.support import Client, make_service, serving


@pytest.fixture(scope="module")
def module_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(make_service(tmp_path_factory.mktemp("data"), upload_bytes=1024 * 1024)) as client:
        yield client


@pytest.fixture
def client(module_client: Client) -> Iterator[Client]:
    before = state(module_client)
    yield module_client
    module_client.assert_serves()
    assert state(module_client) == before, "a refused request has changed something"
