"""Many small requests in, one forward pass out.

A `Lane` belongs to one device. While a batch runs there, new questions wait; the moment the device frees, the next batch is cut
from the queues and sent. No timer decides anything. Knows nothing of HTTP, rewards or torch: questions in, answers out.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from shared.errors import Busy, DeadlineExceeded, NotReady

Q = TypeVar("Q")
A = TypeVar("A")

# How often each class comes first: weighted round robin, so that no class starves.
TURNS: tuple[Literal["interactive", "train", "bulk"], ...] = ("interactive", "train", "interactive", "train", "interactive", "bulk")


@dataclass
class ServiceTime:
    """Seconds of a batch of n as a n + b, refitted from the batches seen (exponentially forgetting least squares)."""

    keep: float = 0.97
    _s: list[float] = field(default_factory=lambda: [1e-3, 0.0, 0.0, 0.0, 0.0])  # weight, n, n^2, t, n t

    def observe(self, n: int, seconds: float) -> None:
        self._s = [self.keep * old + new for old, new in zip(self._s, (1, n, n * n, seconds, n * seconds), strict=True)]

    def seconds(self, n: int) -> float:
        """Expected seconds for n questions; 0 before the first batch."""
        w, sn, snn, st, snt = self._s
        spread = w * snn - sn * sn
        if st == 0:
            return 0.0
        if spread <= 1e-9 * max(1.0, snn):
            return n * st / max(sn, 1e-9)
        slope = max(0.0, (w * snt - sn * st) / spread)
        return max(0.0, slope * n + max(0.0, (st - slope * sn) / w))


class Admission:
    """What may wait at once, in questions and in bytes; refuses at the door with an honest time to come back."""

    def __init__(self, max_items: int, max_bytes: int, estimate: Callable[[int], float]) -> None:
        self.max_items, self.max_bytes, self._estimate = max_items, max_bytes, estimate
        self.items = self.bytes = 0

    @contextmanager
    def hold(self, items: int, size: int) -> Iterator[None]:
        """Busy when full. A request larger than everything allowed is let in alone, or it could never be served."""
        over = self.items + items > self.max_items or self.bytes + size > self.max_bytes
        if over and self.items > 0:
            wait = max(0.05, self._estimate(self.items))
            raise Busy(
                f"{self.items} pictures are waiting (limit {self.max_items}); come back in {wait:.1f} s",
                retry_after_ms=int(wait * 1000),
                limit=self.max_items,
                observed=self.items + items,
            )
        self.items, self.bytes = self.items + items, self.bytes + size
        try:
            yield
        finally:
            self.items, self.bytes = self.items - items, self.bytes - size


@dataclass(eq=False)
class _Job(Generic[Q, A]):
    questions: Sequence[Q]
    deadline: float | None
    done: "asyncio.Future[None]"
    answers: list[A | None]
    taken: int = 0
    answered: int = 0
    dropped: bool = False


@dataclass(frozen=True)
class Batch:
    """What a lane tells its observer after each batch."""

    size: int
    seconds: float
    waited: float


class Lane(Generic[Q, A]):
    """One device, one thread, three queues. `work` gets up to `cap` questions and returns as many answers, in order."""

    def __init__(
        self,
        name: str,
        work: Callable[[list[Q]], list[A]],
        *,
        cap: int = 64,
        observe: Callable[[Batch], None] | None = None,
    ) -> None:
        if cap < 1:
            raise ValueError("a batch holds at least one question: set batch_cap to 1 or more")
        self.name, self.cap, self.time = name, cap, ServiceTime()
        self._work, self._observe = work, observe
        self._queues: dict[str, deque[_Job[Q, A]]] = {name: deque() for name in dict.fromkeys(TURNS)}
        self._turn = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"device-{name}")
        self._task: asyncio.Task[None] | None = None
        self._draining = False
        self.waiting = 0

    async def ask(self, questions: Sequence[Q], priority: str = "interactive", deadline: float | None = None) -> list[A]:
        """Answers in order. `deadline` is a time.monotonic(); past it DeadlineExceeded. A cancelled caller's questions leave."""
        if self._draining:
            raise NotReady(f"{self.name} is shutting down; ask another replica")
        if not questions:
            return []
        now = time.monotonic()
        if deadline is not None and now + self.time.seconds(len(questions)) > deadline:
            raise DeadlineExceeded(f"{self.name} needs about {self.time.seconds(len(questions)):.2f} s: give a later deadline_ms")
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"lane-{self.name}")
        job: _Job[Q, A] = _Job(questions, deadline, asyncio.get_running_loop().create_future(), [None] * len(questions))
        self._queues[priority].append(job)
        self.waiting += len(questions)
        self._idle.clear()
        self._wake.set()
        try:
            await (asyncio.wait_for(job.done, deadline - now) if deadline is not None else job.done)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} did not answer before the deadline; give a later deadline_ms") from None
        finally:
            job.dropped = True
        return job.answers  # type: ignore[return-value]

    def _cut(self) -> list[tuple[_Job[Q, A], int]]:
        """The next batch: (job, index) pairs. Jobs keep together; within a class the earliest deadline goes first."""
        batch: list[tuple[_Job[Q, A], int]] = []
        empty = 0
        while len(batch) < self.cap and empty < len(TURNS):
            queue = self._queues[TURNS[self._turn]]
            while queue and queue[0].dropped:
                gone = queue.popleft()
                self.waiting -= len(gone.questions) - gone.taken
            if not queue:
                empty += 1
                self._turn = (self._turn + 1) % len(TURNS)
                continue
            empty = 0
            job = min((j for j in queue if not j.dropped), key=lambda j: (j.taken == 0, j.deadline or float("inf")))
            take = min(self.cap - len(batch), len(job.questions) - job.taken)
            batch += [(job, index) for index in range(job.taken, job.taken + take)]
            job.taken += take
            self.waiting -= take
            if job.taken == len(job.questions):
                queue.remove(job)
                self._turn = (self._turn + 1) % len(TURNS)
        return batch

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._cut()
            if not batch:
                self._wake.clear()
                self._idle.set()
                await self._wake.wait()
                continue
            started = time.monotonic()
            try:
                answers = await loop.run_in_executor(self._thread, self._work, [job.questions[i] for job, i in batch])
                if len(answers) != len(batch):
                    raise RuntimeError(f"{len(answers)} answers to {len(batch)} questions")
            except Exception as error:
                for job in {id(job): job for job, _ in batch}.values():
                    if not job.done.done():
                        job.done.set_exception(error)
                    job.dropped = True
                continue
            seconds = time.monotonic() - started
            self.time.observe(len(batch), seconds)
            if self._observe is not None:
                self._observe(Batch(len(batch), seconds, 0.0))
            for (job, index), answer in zip(batch, answers, strict=True):
                job.answers[index] = answer
                job.answered += 1
                if job.answered == len(job.questions) and not job.done.done():
                    job.done.set_result(None)

    async def drain(self, limit_s: float = 30.0) -> None:
        """Take nothing new, finish what was accepted (up to `limit_s`), stop the thread."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), limit_s)
        except TimeoutError:
            pass
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
