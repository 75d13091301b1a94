"""Whatever arrives, fails, leaves, is late or is swapped: every answer goes with its question, and nothing is lost."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler import Admission, DeviceLost, Lane, OutOfMemory, ServiceTime
from shared.errors import Busy, DeadlineExceeded, NotReady


class Doubler:
    """Answers 2q by version; hurt by what a test asks of it."""

    def __init__(
        self, version: int = 1, seconds: float = 0.0, poison: frozenset[int] = frozenset(), room: int = 1 << 30, joins: bool = False
    ) -> None:
        self.join = (lambda pieces: [q for piece in pieces for q in piece]) if joins else None
        self.version, self.seconds, self.poison, self.room = version, seconds, poison, room
        self.batches: list[list[int]] = []
        self.collated = self.recovered = 0
        self.alone = threading.Lock()

    def collate(self, questions: Sequence[int]) -> list[int]:
        self.collated += 1
        return list(questions)

    def run(self, collated: list[int]) -> list[tuple[int, int]]:
        assert self.alone.acquire(blocking=False), "two batches at once on one device"
        try:
            time.sleep(self.seconds)
            if len(collated) > self.room:
                raise OutOfMemory("too many")
            if self.poison & set(collated):
                raise ValueError("poison")
            self.batches.append(collated)
            return [(2 * q, self.version) for q in collated]
        finally:
            self.alone.release()

    def failed(self, question: int, error: Exception) -> tuple[int, int]:
        return (-1, self.version)

    def recover(self) -> None:
        self.recovered += 1


def run(work: Callable[[], Coroutine[Any, Any, None]], seconds: float = 20) -> None:
    asyncio.run(asyncio.wait_for(work(), seconds))


jobs_of = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.sampled_from(["interactive", "train", "bulk"]),
        st.sampled_from(["wait", "wait", "leave now", "leave later", "late", "soon"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(
    jobs_of,
    st.integers(1, 7),
    st.integers(1, 3),
    st.sets(st.integers(0, 1400), max_size=40),
    st.integers(1, 8),
    st.integers(-1, 13),
    st.booleans(),
)
def test_answers_stay_with_their_questions(
    jobs: list[tuple[int, str, str, bool]], cap: int, buckets: int, poison: set[int], room: int, swap_after: int, joins: bool
) -> None:
    first = Doubler(1, 0.0003, frozenset(poison), room, joins)
    second = Doubler(2, 0.0003, frozenset(poison), room, joins)

    async def all_of_them() -> None:
        lane: Lane[int, tuple[int, int]] = Lane("test", first, cap=cap, bucket=lambda q: q % buckets)
        asked, swapping = [], None
        for number, (count, priority, fate, pause) in enumerate(jobs):
            questions = list(range(100 * number, 100 * number + count))
            deadline = {"late": time.monotonic() - 1, "soon": time.monotonic() + 0.0005}.get(fate)
            asked.append((questions, fate, asyncio.create_task(lane.ask(questions, priority, deadline))))
            if number == swap_after:
                swapping = asyncio.create_task(lane.swap(second))
            await asyncio.sleep(0.0004 if pause else 0)
        for _, fate, task in asked:
            if fate == "leave now":
                task.cancel()
        await asyncio.sleep(0.001)
        for _, fate, task in asked:
            if fate == "leave later":
                task.cancel()
        for questions, fate, task in asked:
            try:
                done = await task
            except DeadlineExceeded:
                assert fate in ("late", "soon")
            except asyncio.CancelledError:
                assert fate.startswith("leave")
            else:
                assert fate != "late"
                version = done.work.version
                assert done.answers == [(-1 if q in poison else 2 * q, version) for q in questions]
                assert done.asked <= done.begun <= done.done
        if swapping is not None:
            await swapping
            assert (await lane.ask([7001])).answers == [(14002, 2)]
        await lane.drain()
        assert not sum(lane.waiting.values()) and not lane._open and not lane._half

    run(all_of_them)
    for batch in [*first.batches, *second.batches]:
        assert len(batch) <= cap and len({q % buckets for q in batch}) == 1
    answered = [q for batch in [*first.batches, *second.batches] for q in batch]
    assert len(answered) == len(set(answered)), "a question was answered twice"


def test_what_waits_is_one_batch_and_the_first_goes_at_once() -> None:
    work = Doubler(seconds=0.05)

    async def many() -> None:
        lane: Lane[int, Any] = Lane("test", work, cap=64)
        first = asyncio.create_task(lane.ask([0]))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, *(lane.ask([i]) for i in range(1, 20)))
        await lane.drain()

    run(many)
    assert [len(batch) for batch in work.batches] == [1, 19]


def test_a_whole_further_batch_is_collated_beside_the_running_one() -> None:
    work = Doubler(seconds=0.05)

    async def look() -> None:
        lane: Lane[int, Any] = Lane("test", work, cap=4)
        tasks = [asyncio.create_task(lane.ask([i], "train")) for i in range(11)]
        await asyncio.sleep(0.02)
        assert work.collated == 2 and not work.batches, "the second batch is ready before the first is done"
        tasks.append(asyncio.create_task(lane.ask([99], "interactive")))
        await asyncio.gather(*tasks)
        await lane.drain()

    run(look)
    assert work.batches == [[0, 1, 2, 3], [99], [4, 5, 6, 7], [8, 9, 10]], "a person overtakes the batch that is ready, once"


def test_pieces_are_collated_as_they_come_and_run_as_one_batch() -> None:
    work = Doubler(seconds=0.05, joins=True)

    async def look() -> None:
        lane: Lane[int, Any] = Lane("test", work, cap=8)
        tasks = [asyncio.create_task(lane.ask([0], "train"))]
        await asyncio.sleep(0.01)
        for i in range(1, 4):
            tasks.append(asyncio.create_task(lane.ask([i], "train")))
            await asyncio.sleep(0.005)
        assert work.collated == 4 and not work.batches, "each was collated when it came"
        tasks.append(asyncio.create_task(lane.ask([99], "interactive")))
        answers = await asyncio.gather(*tasks)
        assert [one.answers[0][0] for one in answers] == [0, 2, 4, 6, 198]
        await lane.drain()

    run(look)
    assert work.batches == [[0], [99], [1, 2, 3]], "one batch of three pieces; a person does not wait for it"


def test_no_class_starves() -> None:
    work = Doubler(seconds=0.001)

    async def crowd() -> None:
        lane: Lane[int, Any] = Lane("test", work, cap=1)
        tasks = [asyncio.create_task(lane.ask([i], "interactive")) for i in range(60)]
        tasks += [asyncio.create_task(lane.ask([100 + i], "bulk")) for i in range(3)]
        tasks += [asyncio.create_task(lane.ask([200 + i for i in range(10)], "train"))]
        await asyncio.gather(*tasks)
        await lane.drain()

    run(crowd)
    order = [batch[0] for batch in work.batches]
    assert order.index(102) < 50 and order.index(209) < 50


def test_the_earliest_deadline_goes_first() -> None:
    work = Doubler(seconds=0.01)

    async def three() -> None:
        lane: Lane[int, Any] = Lane("test", work, cap=3)
        now = time.monotonic()
        tasks = [asyncio.create_task(lane.ask([0]))]
        await asyncio.sleep(0.005)
        tasks += [asyncio.create_task(lane.ask([i], "train", now + late)) for i, late in ((1, 9.0), (2, 5.0), (3, 7.0))]
        await asyncio.gather(*tasks)
        await lane.drain()

    run(three)
    assert work.batches == [[0], [2, 3, 1]]


def test_memory_that_is_short_halves_the_cap_and_loses_nothing() -> None:
    work = Doubler(room=5)

    async def fill() -> None:
        lane: Lane[int, Any] = Lane("test", work, cap=64)
        assert [a for a, _ in (await lane.ask(list(range(40)))).answers] == [2 * q for q in range(40)]
        assert lane.cap <= 5 and lane.counts["out_of_memory"] > 0
        before = work.recovered
        await lane.ask(list(range(100, 130)))
        assert work.recovered == before, "the smaller cap holds"
        await lane.drain()

    run(fill)


def test_one_poisonous_question_costs_only_itself() -> None:
    work = Doubler(poison=frozenset([13]))

    async def ask() -> None:
        lane: Lane[int, Any] = Lane("test", work, cap=32)
        answers = (await lane.ask(list(range(32)))).answers
        assert answers[13] == (-1, 1) and all(answers[q] == (2 * q, 1) for q in range(32) if q != 13)
        assert lane.counts["bisected"] == 5  # 32 -> 16 -> 8 -> 4 -> 2
        await lane.drain()

    run(ask)


@pytest.mark.parametrize("error", [DeviceLost("gone"), "failed raises"])
def test_a_lost_device_answers_everyone_and_hangs_nobody(error: Any) -> None:
    class Broken(Doubler):
        def run(self, collated: list[int]) -> list[tuple[int, int]]:
            time.sleep(0.01)
            raise error if isinstance(error, Exception) else ValueError("bad")

        def failed(self, question: int, cause: Exception) -> tuple[int, int]:
            raise KeyError("no answer for that either")

    async def all_told() -> None:
        lane: Lane[int, Any] = Lane("test", Broken(), cap=2)
        tasks = [asyncio.create_task(lane.ask([i], "train")) for i in range(9)]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, NotReady)
        assert lane.lost
        with pytest.raises(NotReady, match="device"):
            await lane.ask([1])
        await lane.drain()

    run(all_told)


def test_who_left_is_dropped_and_counted() -> None:
    work = Doubler(seconds=0.03)

    async def leave() -> None:
        lane: Lane[int, Any] = Lane("test", work, cap=2)
        stays = asyncio.create_task(lane.ask([0, 1]))
        await asyncio.sleep(0.005)
        leaves = asyncio.create_task(lane.ask([10, 11, 12]))
        last = asyncio.create_task(lane.ask([20]))
        await asyncio.sleep(0.005)
        leaves.cancel()
        await asyncio.gather(stays, last)
        await lane.drain()
        assert lane.counts["cancelled"] == 3

    run(leave)
    assert not {10, 11, 12} & {q for batch in work.batches[1:] for q in batch} or work.batches[1] == [
        10,
        11,
    ]  # at most what was ready
    assert sum(12 in batch for batch in work.batches) == 0


def test_accepted_work_is_finished_while_draining() -> None:
    async def drain() -> None:
        lane: Lane[int, Any] = Lane("test", Doubler(seconds=0.05), cap=1)
        tasks = [asyncio.create_task(lane.ask([i])) for i in range(3)]
        await asyncio.sleep(0.01)
        await lane.drain()
        assert [(await task).answers for task in tasks] == [[(0, 1)], [(2, 1)], [(4, 1)]]
        with pytest.raises(NotReady):
            await lane.ask([1])

    run(drain)


def test_a_drain_that_takes_too_long_tells_who_waits() -> None:
    async def drain() -> None:
        lane: Lane[int, Any] = Lane("test", Doubler(seconds=0.2), cap=1)
        tasks = [asyncio.create_task(lane.ask([i])) for i in range(3)]
        await asyncio.sleep(0.01)
        await lane.drain(0.05)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, NotReady) for result in results)

    run(drain)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 900)), max_size=30), st.integers(1, 100), st.integers(1, 1000))
def test_admission_never_holds_more_than_it_may(asks: list[tuple[int, int]], most: int, most_bytes: int) -> None:
    door = Admission(most, most_bytes, lambda n: 0.01 * n)
    held: list[Any] = []
    for items, size in asks:
        hold = door.hold(items, size)
        try:
            hold.__enter__()
            held.append(hold)
        except Busy as busy:
            assert busy.retry_after_ms is not None and 50 <= busy.retry_after_ms <= max(50, 10 * door.items + 1)
            held.pop(0).__exit__(None, None, None)
        assert len(held) <= 1 or (door.items <= most and door.bytes <= most_bytes)
    for hold in held:
        hold.__exit__(None, None, None)
    assert door.items == door.bytes == 0


def test_the_time_to_come_back_is_that_of_the_excess() -> None:
    door = Admission(10, 1000, lambda n: 0.3 * n)
    with door.hold(8, 100):
        with pytest.raises(Busy) as caught, door.hold(3, 100):
            pass
        assert caught.value.retry_after_ms == 300 and caught.value.problem().retryable


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 0.1), st.floats(0, 0.5), st.lists(st.integers(1, 64), min_size=3, max_size=40))
def test_service_time_finds_the_line(a: float, b: float, sizes: list[int]) -> None:
    fit = ServiceTime()
    for n in sizes:
        fit.observe(n, a * n + b)
    if len(set(sizes)) > 1:
        assert fit.seconds(32) == pytest.approx(a * 32 + b, rel=0.05, abs=0.02)
        assert fit.seconds(64, 16) == pytest.approx(a * 64 + 4 * b, rel=0.1, abs=0.08)
    assert fit.seconds(sizes[0]) >= 0
