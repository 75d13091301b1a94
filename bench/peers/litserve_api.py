"""What LitServe serves, in a module of its own: its workers are spawned and import it."""

import os
from typing import Annotated, Any

import litserve
from fastapi import Depends, Request

from bench import models
from bench.peers import unpack_raw


class Pixels:
    """A body that is not written out where LitServe formats its (silent) debug lines: bytes would cost milliseconds a picture there."""

    def __init__(self, body: bytes) -> None:
        self.body = body


async def read(request: Request) -> Pixels:
    return Pixels(await request.body())


class Scores(litserve.LitAPI):  # type: ignore[misc]
    """A request is a group; groups are batched."""

    def setup(self, device: str) -> None:
        del device
        self.forward = models.load(os.environ["BENCH_MODEL"])

    def decode_request(self, request: Annotated[Any, Depends(read)]) -> list[Any]:
        return list(unpack_raw(request.body))

    def batch(self, inputs: list[list[Any]]) -> tuple[list[int], list[Any]]:
        return [len(group) for group in inputs], [image for group in inputs for image in group]

    def predict(self, x: tuple[list[int], list[Any]]) -> tuple[list[int], list[float]]:
        return x[0], self.forward(x[1])

    def unbatch(self, output: tuple[list[int], list[float]]) -> list[list[float]]:
        scores = iter(output[1])
        return [[next(scores) for _ in range(size)] for size in output[0]]

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        return {"scores": output}
