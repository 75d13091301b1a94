"""Bodies within limits, read into memory that is used again, never while somebody still sees it."""

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st

from services.http import Buffers, CallerLeft, read_body
from shared.errors import BadRequest, TooLarge


def request(parts: Sequence[bytes | None], declared: int | None = None) -> Request:
    """As a server hands it over: `parts` as they come, None for a caller who leaves; after the last part nothing comes."""
    messages: list[dict[str, Any]] = [
        {"type": "http.disconnect"}
        if part is None
        else {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    headers = [] if declared is None else [(b"content-length", str(declared).encode())]
    return Request({"type": "http", "method": "POST", "path": "/score", "headers": headers}, receive)


def read(
    parts: Sequence[bytes | None], declared: int | None = None, limit: int = 1 << 20, buffers: Buffers | None = None
) -> memoryview:
    return asyncio.run(read_body(request(parts, declared), limit, 5.0, buffers))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=400), min_size=1, max_size=12), st.sampled_from(["none", "right", "short", "long"]))
def test_a_body_is_its_parts_whatever_was_declared(parts: list[bytes], told: str) -> None:
    whole, buffers = b"".join(parts), Buffers(10_000)
    declared = {"none": None, "right": len(whole), "short": len(whole) // 2, "long": 2 * len(whole)}[told]
    assert [bytes(read(parts, declared, buffers=buffers)) for _ in range(3)] == [whole] * 3


def test_the_limit_holds_for_what_is_declared_and_for_what_comes() -> None:
    with pytest.raises(TooLarge):
        read([b"a"], declared=11, limit=10)
    for declared in (None, 5):
        with pytest.raises(TooLarge):
            read([b"abcdef", b"ghijkl"], declared, limit=10)
    with pytest.raises(CallerLeft):
        read([b"abc", None])


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(10)
        raise AssertionError

    asked = Request({"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"9")]}, receive)
    with pytest.raises(BadRequest, match="did not arrive within 0.05 s"):
        asyncio.run(read_body(asked, 100, 0.05))


def test_declared_bytes_take_memory_only_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    make = Buffers.make
    monkeypatch.setattr(Buffers, "make", lambda self, size: (sizes.append(size), make(self, size))[1])
    with pytest.raises(CallerLeft):
        read([bytes(1000), None], declared=1 << 20, buffers=Buffers(1 << 30))
    assert sizes == [], "a promise of a megabyte gets no megabyte"
    read([bytes(1 << 19), bytes(1 << 19)], declared=1 << 20, buffers=Buffers(1 << 30))
    assert sizes == [1 << 20]


def test_memory_is_used_again_once_nobody_sees_it() -> None:
    buffers, parts = Buffers(10_000), [bytes([1]) * 1000, bytes([2]) * 1000]
    first = read(parts, 2000, buffers=buffers)
    view = np.frombuffer(first[500:600], np.uint8)
    del first
    second = read([b"\x03" * 1000] * 2, 2000, buffers=buffers)
    assert (view == 1).all(), "what is still seen is not written over"
    address = np.frombuffer(second, np.uint8).ctypes.data
    del second
    gc.collect()
    third = np.frombuffer(read(parts, 2000, buffers=buffers), np.uint8)
    assert third.ctypes.data == address


def test_no_more_than_so_much_is_kept() -> None:
    buffers = Buffers(5000)
    held = [buffers.make(2000) for _ in range(4)]
    assert len(buffers._kept) == 2 and all(len(one) == 2000 for one in held)
    assert buffers.find(2000) is None and buffers.find(4) is None
    held.clear()
    assert buffers.find(100) is None, "2000 bytes are too many for 100"
    large = buffers.make(4500)
    assert [len(one) for one in buffers._kept] == [4500] and buffers.find(4000) is None
    del large
    assert buffers.find(4000) is not None
