"""Whatever arrives, fails, leaves or is late: every answer goes with its question, and nothing is lost."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler import Admission, Lane, ServiceTime
from shared.errors import Busy, DeadlineExceeded, NotReady


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(["interactive", "train", "bulk"]), st.sampled_from(["wait", "leave", "late"])),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 7),
)
def test_answers_stay_with_their_questions(jobs: list[tuple[int, str, str]], cap: int) -> None:
    seen: list[int] = []

    def double(batch: list[int]) -> list[int]:
        assert 1 <= len(batch) <= cap
        seen.extend(batch)
        time.sleep(0.0005)
        return [2 * q for q in batch]

    async def all_of_them() -> None:
        lane: Lane[int, int] = Lane("test", double, cap=cap)
        tasks = []
        for number, (count, priority, fate) in enumerate(jobs):
            questions = list(range(100 * number, 100 * number + count))
            deadline = time.monotonic() - 1 if fate == "late" else None
            tasks.append((questions, fate, asyncio.create_task(lane.ask(questions, priority, deadline))))
            if number % 3 == 0:
                await asyncio.sleep(0)
        for _, fate, task in tasks:
            if fate == "leave":
                task.cancel()
        for questions, fate, task in tasks:
            if fate == "wait":
                assert await task == [2 * q for q in questions]
            elif fate == "late":
                with pytest.raises(DeadlineExceeded):
                    await task
            else:
                with pytest.raises(asyncio.CancelledError):
                    await task
        await lane.drain()
        assert lane.waiting == 0

    run(all_of_them)
    assert len(seen) == len(set(seen)), "a question was asked twice"


def test_what_waits_is_one_batch_and_the_first_goes_at_once() -> None:
    sizes: list[int] = []

    def slow(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        time.sleep(0.05)
        return batch

    async def many() -> None:
        lane: Lane[int, int] = Lane("test", slow, cap=64)
        first = asyncio.create_task(lane.ask([0]))
        await asyncio.sleep(0.01)
        rest = [asyncio.create_task(lane.ask([i])) for i in range(1, 20)]
        await asyncio.gather(first, *rest)
        await lane.drain()

    run(many)
    assert sizes == [1, 19]


def test_no_class_starves() -> None:
    order: list[str] = []

    def note(batch: list[str]) -> list[str]:
        order.extend(batch)
        time.sleep(0.001)
        return batch

    async def crowd() -> None:
        lane: Lane[str, str] = Lane("test", note, cap=1)
        tasks = [asyncio.create_task(lane.ask([f"interactive{i}"], "interactive")) for i in range(30)]
        tasks += [asyncio.create_task(lane.ask([f"bulk{i}"], "bulk")) for i in range(3)]
        await asyncio.gather(*tasks)
        await lane.drain()

    run(crowd)
    assert order.index("bulk2") < len(order) - 5


def test_a_failing_device_fails_its_batch_and_not_the_lane() -> None:
    def broken(batch: list[int]) -> list[int]:
        if 13 in batch:
            raise RuntimeError("device")
        return batch

    async def both() -> None:
        lane: Lane[int, int] = Lane("test", broken, cap=4)
        with pytest.raises(RuntimeError, match="device"):
            await lane.ask([13])
        assert await lane.ask([1, 2]) == [1, 2]
        await lane.drain()
        with pytest.raises(NotReady):
            await lane.ask([1])

    run(both)


def test_accepted_work_is_finished_while_draining() -> None:
    def slow(batch: list[int]) -> list[int]:
        time.sleep(0.05)
        return batch

    async def drain() -> None:
        lane: Lane[int, int] = Lane("test", slow, cap=1)
        tasks = [asyncio.create_task(lane.ask([i])) for i in range(3)]
        await asyncio.sleep(0.01)
        await lane.drain()
        assert [await task for task in tasks] == [[0], [1], [2]]

    run(drain)


def test_admission_counts_and_says_when_to_come_back() -> None:
    door = Admission(10, 1000, lambda n: 0.3 * n)
    with door.hold(8, 100):
        with pytest.raises(Busy) as caught, door.hold(3, 100):
            pass
        assert caught.value.retry_after_ms == 2400 and caught.value.problem().retryable
        with pytest.raises(Busy), door.hold(1, 950):
            pass
        with door.hold(2, 100):
            assert door.items == 10
    assert door.items == door.bytes == 0
    with door.hold(50, 5000):  # larger than the whole limit: alone, or never
        pass


def test_service_time_learns_a_line() -> None:
    fit = ServiceTime()
    assert fit.seconds(5) == 0
    for n in (1, 4, 16, 64, 2, 8):
        fit.observe(n, 0.01 + 0.002 * n)
    assert fit.seconds(32) == pytest.approx(0.074, rel=0.05)
