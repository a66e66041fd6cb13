"""mosec: a Rust front, Python workers."""

from __future__ import annotations

import os
from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found,unused-ignore]

from benchmarks.serving.peers.networks import Networks


class Inference(Worker):  # type: ignore[misc,unused-ignore]
    def __init__(self) -> None:
        self.networks = Networks()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[dict[str, Any]]:
        return self.networks.answer(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Inference, num=int(os.environ["WORKERS"]), max_batch_size=64, max_wait_time=5, start_method="spawn")
    server.run()
