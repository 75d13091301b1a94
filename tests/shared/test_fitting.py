"""The client of refits, against a service that counts."""

import httpx
import msgspec
import numpy as np

from shared.fit_wire import MOST_PICTURES
from shared.fitting import FitClient
from shared.image import MAX_REQUEST_PIXELS


def test_pictures_are_sent_in_pieces_that_a_service_takes() -> None:
    """Those that compress well are limited by their pixels, small ones by their number."""
    pieces: list[list[dict[str, int]]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/lease"):
            return httpx.Response(200, json={"reward": "linear", "lease": "a", "seconds": 60, "version": 1})
        pieces.append([item["image"] for item in msgspec.msgpack.decode(request.content)["items"]])
        return httpx.Response(200, json={"real": sum(map(len, pieces)), "generated": 0})

    with FitClient("http://s", "key", reward="linear", encoding="png", transport=httpx.MockTransport(answer)) as fits:
        told = fits.add("real", [np.zeros((1024, 1024, 3), np.uint8)] * 70)
        assert told is not None and told.real == 70 and len(pieces) == 2
        assert all(sum(one["height"] * one["width"] for one in piece) <= MAX_REQUEST_PIXELS for piece in pieces)
        pieces.clear()
        fits.add("real", [np.zeros((16, 16, 3), np.uint8)] * 300)
        assert [len(piece) for piece in pieces] == [MOST_PICTURES, 300 - MOST_PICTURES]
        assert fits.add("real", []) is None
