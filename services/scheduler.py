"""Many small requests in, few forward passes out.

A `Lane` belongs to one device. While a batch runs there, questions wait; the moment the device frees, the next batch is cut from the
queues and sent. No timer decides anything, so a lone caller waits for nothing but its own forward. What waits is collated beside the
running batch: piece by piece where pieces can be joined, else as soon as a whole further batch waits. Knows nothing of HTTP, pictures or
torch: questions in, answers out.
"""

import asyncio
import heapq
import itertools
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from shared.errors import Busy, DeadlineExceeded, NotReady

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")
Q_in = TypeVar("Q_in", contravariant=True)
A_out = TypeVar("A_out", covariant=True)
log = logging.getLogger("verism.scheduler")

# How often each class comes first: weighted round robin, so that no class starves.
TURNS: tuple[Literal["interactive", "train", "bulk"], ...] = ("interactive", "train", "interactive", "train", "interactive", "bulk")


class OutOfMemory(RuntimeError):
    """The batch did not fit; a smaller one may."""


class DeviceLost(RuntimeError):
    """The device answers nothing any more; only a new process helps."""


class Work(Protocol[Q_in, A_out]):
    """What a lane drives. Each method runs in a thread, never two `run`s at once."""

    def collate(self, questions: Sequence[Q_in]) -> Any:
        """Whatever can be made ready while another batch runs."""
        ...

    @property
    def join(self) -> Callable[[Sequence[Any]], Any] | None:
        """What was collated in pieces as if it had been collated at once; None where that cannot be."""
        ...

    def run(self, collated: Any) -> Sequence[A_out]:
        """As many answers as questions, in order. May raise OutOfMemory, DeviceLost, or anything about a bad question."""
        ...

    def failed(self, question: Q_in, error: Exception) -> A_out:
        """The answer for a question that cannot be answered."""
        ...

    def recover(self) -> None:
        """After OutOfMemory: give cached memory back."""
        ...


@dataclass
class ServiceTime:
    """Seconds of a batch of n as a n + b, refitted from the batches seen (exponentially forgetting least squares)."""

    keep: float = 0.97
    _s: list[float] = field(default_factory=lambda: [0.0] * 5)  # weight, n, n^2, t, n t

    def observe(self, n: int, seconds: float) -> None:
        self._s = [self.keep * old + new for old, new in zip(self._s, (1, n, n * n, seconds, n * seconds), strict=True)]

    def line(self) -> tuple[float, float]:
        """(a, b), both >= 0; zeros before the first batch."""
        w, sn, snn, st, snt = self._s
        if st == 0:
            return 0.0, 0.0
        spread = w * snn - sn * sn
        if spread <= 1e-9 * max(1.0, snn):
            return st / max(sn, 1e-9), 0.0
        a = max(0.0, (w * snt - sn * st) / spread)
        return a, max(0.0, (st - a * sn) / w)

    def seconds(self, n: int, cap: int = 1 << 30) -> float:
        """Expected seconds for n questions in batches of at most `cap`; 0 before the first batch."""
        a, b = self.line()
        return a * n + b * math.ceil(n / cap)


class Admission:
    """What may wait at once, in questions and in bytes; refuses at the door with an honest time to come back."""

    def __init__(self, max_items: int, max_bytes: int, estimate: Callable[[int], float], what: str = "pictures") -> None:
        self.max_items, self.max_bytes, self._estimate, self._what = max_items, max_bytes, estimate, what
        self.items = self.bytes = 0

    def check(self, items: int, size: int) -> None:
        """Busy when full, with the time until enough is answered. What is larger than everything allowed is let in alone, or never."""
        excess = max(
            self.items + items - self.max_items, math.ceil(self.items * (self.bytes + size - self.max_bytes) / max(self.bytes, 1))
        )
        if excess > 0 and self.items > 0:
            wait = max(0.05, self._estimate(min(excess, self.items)))
            raise Busy(
                f"{self.items} {self._what} are waiting (limit {self.max_items}); come back in {wait:.1f} s",
                retry_after_ms=math.ceil(wait * 1000),
                limit=self.max_items,
                observed=self.items + items,
            )

    @contextmanager
    def hold(self, items: int, size: int) -> Iterator[None]:
        """`check`, then count them until the block ends."""
        self.check(items, size)
        self.items, self.bytes = self.items + items, self.bytes + size
        try:
            yield
        finally:
            self.items, self.bytes = self.items - items, self.bytes - size


@dataclass(frozen=True)
class Answered(Generic[A]):
    """Answers in order, all by one `work`; readings of time.monotonic() when they were asked, begun and done."""

    answers: list[A]
    work: Any
    asked: float
    begun: float
    done: float


@dataclass(eq=False)
class _Job(Generic[Q, A]):
    questions: Sequence[Q]
    done: "asyncio.Future[Answered[A]]"
    answers: list[A | None]
    arrived: float
    left: int  # not yet in a batch
    open: int  # not yet answered
    work: Any = None  # whoever answered first answers all
    started: float = 0.0
    timer: asyncio.TimerHandle | None = None
    over: bool = False


@dataclass(eq=False)
class _Part(Generic[Q, A]):
    """The questions of a job that may share a forward pass."""

    job: _Job[Q, A]
    bucket: Hashable
    indices: list[int]
    priority: str
    order: tuple[float, float, int]  # begun ones first, then the earliest deadline, then the earliest arrival

    def __lt__(self, other: "_Part[Q, A]") -> bool:
        return self.order < other.order


@dataclass(eq=False)
class _Batch(Generic[Q, A]):
    """`pieces` are the first `ready` rows, collated or being so."""

    rows: list[tuple[_Job[Q, A], int]] = field(default_factory=list)
    bucket: Hashable = ...
    ready: int = 0
    pieces: "list[Future[Any]]" = field(default_factory=list)

    @property
    def questions(self) -> list[Q]:
        return [job.questions[i] for job, i in self.rows]


@dataclass(frozen=True)
class Ran:
    """What a lane tells its observer after each batch."""

    size: int
    seconds: float
    bisected: int
    out_of_memory: int
    wasted: int  # answered, but their caller had left or was out of time


class Lane(Generic[Q, A]):
    """One device, one thread, three queues. Counts in `counts`: cancelled, expired, wasted, bisected, out_of_memory."""

    def __init__(
        self,
        name: str,
        work: Work[Q, A],
        *,
        cap: int = 64,
        bucket: Callable[[Q], Hashable] = lambda q: None,
        observe: Callable[[Ran], None] | None = None,
    ) -> None:
        if cap < 1:
            raise ValueError("a batch holds at least one question: set batch_cap to 1 or more")
        self.name, self.cap, self.work, self.time = name, cap, work, ServiceTime()
        self.counts: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter(dict.fromkeys(TURNS, 0))
        self.busy_s = 0.0
        self.lost: str | None = None
        self._bucket, self._observe = bucket, observe
        self._heaps: dict[str, dict[Hashable, list[_Part[Q, A]]]] = {name: defaultdict(list) for name in dict.fromkeys(TURNS)}
        self._turn, self._serial = 0, itertools.count()
        self._open: set[_Job[Q, A]] = set()  # whose caller waits
        self._half: set[_Job[Q, A]] = set()  # begun, and not wholly in batches
        self._ahead: _Batch[Q, A] | None = None
        self._overtaken = self._running = self._draining = False
        self._swap: tuple[Work[Q, A], asyncio.Future[None]] | None = None
        self._failures = 0
        self._wake, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._device = ThreadPoolExecutor(1, thread_name_prefix=f"device-{name}")
        self._helper = ThreadPoolExecutor(1, thread_name_prefix=f"collate-{name}")
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether the device has a batch."""
        return self._running

    def estimate(self, extra: int = 0) -> float:
        """Expected seconds until what waits, and `extra` more, is answered."""
        return self.time.seconds(sum(self.waiting.values()) + extra, self.cap)

    async def ask(self, questions: Sequence[Q], priority: str = "interactive", deadline: float | None = None) -> Answered[A]:
        """Answers in order. `deadline` is a time.monotonic(); past it DeadlineExceeded. A cancelled caller's questions leave."""
        if self.lost is not None:
            raise NotReady(f"{self.name} has lost its device; ask another replica")
        if self._draining:
            raise NotReady(f"{self.name} is shutting down; ask another replica")
        if not questions:
            return Answered([], self.work, *[time.monotonic()] * 3)
        loop, now = asyncio.get_running_loop(), time.monotonic()
        if deadline is not None and now + self.time.seconds(len(questions), self.cap) > deadline:
            self.counts["expired"] += len(questions)
            needs = self.time.seconds(len(questions), self.cap)
            raise DeadlineExceeded(f"{self.name} needs about {needs:.2f} s: give a later deadline_ms")
        if self._task is None:
            self._task = loop.create_task(self._run(), name=f"lane-{self.name}")
        count = len(questions)
        job: _Job[Q, A] = _Job(questions, loop.create_future(), [None] * count, now, count, count)
        if deadline is not None:
            job.timer = loop.call_later(deadline - now, self._expire, job)
        self._open.add(job)
        parts: dict[Hashable, list[int]] = {}
        for index, question in enumerate(questions):
            parts.setdefault(self._bucket(question), []).append(index)
        for bucket, indices in parts.items():
            order = (1.0, deadline if deadline is not None else math.inf, next(self._serial))
            heapq.heappush(self._heaps[priority][bucket], _Part(job, bucket, indices, priority, order))
        self.waiting[priority] += count
        self._idle.clear()
        self._wake.set()
        self._look_ahead()
        try:
            return await job.done
        finally:
            if not job.done.done() or job.done.cancelled():
                self.counts["cancelled"] += job.open
            self._drop(job)

    async def swap(self, work: Work[Q, A]) -> None:
        """Put other work in place between two batches. A job that was begun is finished by the work that began it."""
        if self._swap is not None:
            raise NotReady(f"{self.name} is taking another version already; try again")
        self._swap = (work, asyncio.get_running_loop().create_future())
        if self._task is None:
            self._take_swap()
            return
        self._wake.set()
        await self._swap[1]

    async def borrow(self, call: Callable[..., T], *arguments: Any) -> T:
        """`call` on the device's own thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._device, call, *arguments)

    async def drain(self, limit_s: float = 30.0) -> None:
        """Take nothing new, finish what was accepted (up to `limit_s`), stop the threads."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), limit_s)
        except TimeoutError:
            self._fail_all(NotReady(f"{self.name} shut down before it came to this; ask another replica"))
        if self._task is not None:
            self._task.cancel()
        self._device.shutdown(wait=False, cancel_futures=True)
        self._helper.shutdown(wait=False, cancel_futures=True)

    def _expire(self, job: _Job[Q, A]) -> None:
        if not job.done.done():
            self.counts["expired"] += job.open
            job.done.set_exception(DeadlineExceeded(f"{self.name} did not answer before the deadline; give a later deadline_ms"))

    def _drop(self, job: _Job[Q, A]) -> None:
        """The caller has its answer, or has left: what still waits of it is skipped."""
        if not job.over:
            job.over = True
            self._half.discard(job)
            self._open.discard(job)
            if job.timer is not None:
                job.timer.cancel()
            if job.left:
                self._wake.set()

    def _peek(self, priority: str, bucket: Hashable) -> _Part[Q, A] | None:
        """The first live part of a class, of one bucket where `bucket` is not `...`; during a swap only of begun jobs."""
        heaps, best = self._heaps[priority], None
        for key in [bucket] if bucket is not ... else list(heaps):
            heap = heaps.get(key, [])
            while heap and heap[0].job.over:
                self.waiting[priority] -= len(heapq.heappop(heap).indices)
            if not heap:
                heaps.pop(key, None)
                continue
            if self._swap is not None and heap[0].job not in self._half:
                found = min(
                    (part for part in heap if part.job in self._half), default=None
                )  # a part of a begun job in a new bucket
            else:
                found = heap[0]
            if found is not None and (best is None or found < best):
                best = found
        return best

    def _cut(self, classes: Sequence[str] = TURNS, batch: _Batch[Q, A] | None = None) -> _Batch[Q, A] | None:
        """The next batch, or more for this one: of one bucket, at most `cap`, the classes in turn."""
        batch = batch or _Batch()
        rows, bucket, misses = batch.rows, batch.bucket, 0
        while len(rows) < self.cap and misses < len(TURNS):
            priority = TURNS[self._turn]
            self._turn = (self._turn + 1) % len(TURNS)
            part = self._peek(priority, bucket) if priority in classes else None
            if part is None:
                misses += 1
                continue
            misses, bucket, job = 0, part.bucket, part.job
            batch.bucket = bucket
            taken, part.indices = part.indices[: self.cap - len(rows)], part.indices[self.cap - len(rows) :]
            rows += [(job, index) for index in taken]
            self.waiting[priority] -= len(taken)
            job.left -= len(taken)
            job.work = job.work or self.work
            (self._half.add if job.left else self._half.discard)(job)
            heap = self._heaps[priority][bucket]
            if heap[0] is part:
                heapq.heappop(heap)
            else:  # during a swap
                heap.remove(part)
                heapq.heapify(heap)
            if part.indices:
                part.order = (0.0, *part.order[1:])
                heapq.heappush(heap, part)
        return batch if rows else None

    def _look_ahead(self) -> None:
        """Cut what waits and collate it beside the running batch. While a piece is being collated, more may come for the next one."""
        ahead, waiting = self._ahead, sum(self.waiting.values())
        if not self._running or self._swap is not None or not waiting or (ahead is not None and not ahead.pieces[-1].done()):
            return
        if waiting < self.cap and self.work.join is None or ahead is not None and len(ahead.rows) >= self.cap:
            return
        ahead = self._cut() if ahead is None else self._more(ahead)
        if ahead is not None and ahead.ready < len(ahead.rows):
            piece = self._helper.submit(self.work.collate, ahead.questions[ahead.ready :])
            ahead.pieces.append(piece)
            ahead.ready, self._ahead = len(ahead.rows), ahead
            if self.work.join is not None:
                asyncio.wrap_future(piece).add_done_callback(self._collated)

    def _collated(self, piece: "asyncio.Future[Any]") -> None:
        if not piece.cancelled():
            piece.exception()  # whoever runs the batch will meet it
        self._look_ahead()

    def _more(self, batch: _Batch[Q, A]) -> _Batch[Q, A]:
        """What a person waits for does not join a batch of others that is ready: it overtakes."""
        if self.work.join is not None:
            self._cut(("train", "bulk"), batch)
        return batch

    def _next(self) -> _Batch[Q, A] | None:
        """The batch that was made ready, but first, once, what a person waits for."""
        ahead = self._ahead
        if ahead is not None:
            if not self._overtaken and (quick := self._cut(("interactive",))) is not None:
                self._overtaken = True
                return quick
            self._ahead, self._overtaken = None, False
            if any(not job.over for job, _ in ahead.rows):
                return self._more(ahead)
        return self._cut()

    async def _run(self) -> None:
        while True:
            batch = self._next()
            if batch is not None:
                await self._execute(batch)
            elif self._swap is not None:
                self._take_swap()
            else:
                self._wake.clear()
                if not sum(self.waiting.values()):
                    self._idle.set()
                await self._wake.wait()

    def _take_swap(self) -> None:
        assert self._swap is not None
        self.work, done = self._swap
        self._swap = None
        if not done.done():
            done.set_result(None)

    async def _execute(self, batch: _Batch[Q, A]) -> None:
        now = time.monotonic()
        for job, _ in batch.rows:
            job.started = job.started or now
        work = batch.rows[0][0].work
        self._running = True
        running = asyncio.get_running_loop().run_in_executor(self._device, self._attempt, work, batch)
        self._look_ahead()
        try:
            answers, split, full = await running
        except Exception as error:  # DeviceLost, or a work that cannot even fail
            log.exception("%s lost its device", self.name)
            self.lost = f"{type(error).__name__}: {error}"
            self._fail_all(NotReady(f"{self.name} has lost its device; ask another replica"))
            return
        finally:
            self._running = False
        seconds = time.monotonic() - now
        self.busy_s += seconds
        wasted = sum(job.over for job, _ in batch.rows)
        self.counts.update(bisected=split, out_of_memory=full, wasted=wasted)
        if not split and not full:
            self.time.observe(len(batch.rows), seconds)
        if self._observe is not None:
            self._observe(Ran(len(batch.rows), seconds, split, full, wasted))
        for (job, index), answer in zip(batch.rows, answers, strict=True):
            job.answers[index] = answer
            job.open -= 1
            if job.open == 0 and not job.done.done():
                told: list[Any] = job.answers
                job.done.set_result(Answered(told, job.work, job.arrived, job.started, time.monotonic()))

    def _attempt(self, work: Work[Q, A], batch: _Batch[Q, A]) -> tuple[list[A], int, int]:
        """In the device thread: the answers, how often the batch was split, how often memory was short."""
        split = full = 0
        questions = batch.questions

        def gathered() -> Any:
            pieces = [piece.result() for piece in batch.pieces]
            if batch.ready < len(questions):
                pieces.append(work.collate(questions[batch.ready :]))
            if len(pieces) == 1:
                return pieces[0]
            assert work.join is not None
            return work.join(pieces)

        def solve(part: Sequence[Q], collate: Callable[[], Any] | None, again: bool) -> list[A]:
            nonlocal split, full
            try:
                answers = list(work.run(collate() if collate is not None else work.collate(part)))
                if len(answers) != len(part):
                    raise RuntimeError(f"{len(answers)} answers to {len(part)} questions")
                return answers
            except DeviceLost:
                raise
            except OutOfMemory as error:
                full += 1
                work.recover()
                if len(part) == 1:
                    return solve(part, None, False) if again else [work.failed(part[0], error)]
                self.cap = max(1, min(self.cap, len(part) // 2))
            except Exception as error:
                if len(part) == 1:
                    return [work.failed(part[0], error)]
                split += 1
            half = len(part) // 2
            return solve(part[:half], None, again) + solve(part[half:], None, again)

        return solve(questions, gathered, True), split, full

    def _fail_all(self, error: Exception) -> None:
        self._ahead = None
        for job in list(self._open):
            if not job.done.done():
                job.done.set_exception(error)
