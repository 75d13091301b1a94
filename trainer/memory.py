"""How much fits: a micro-batch is tried at growing size, and what running out of memory means is said in words.

On an accelerator the allocator's own peak counts, and running out is an exception; on a CPU the growth of the resident set, measured while
the micro-batch runs, and what the graph holds for the backward pass, whichever is more.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.config import ConfigError, RunConfig, Stopped
from trainer.types import ImagePolicy

SHARE = {"cuda": 0.85, "cpu": 0.5}  # of what is free, that a micro-batch may take
MOST_ON_CPU = 256  # pictures: more make no pass faster
FILE = "micro_batch.json"


class OutOfMemory(Stopped):
    """Memory ran out in mid-run; the last checkpoint stands."""


@dataclass
class Peak:
    """`bytes` beyond what was taken before, at most; None as long as it was not measured."""

    bytes: int | None = None


def free(device: torch.device) -> int:
    """Bytes that could still be taken: on a CPU what the machine has available, or what is left of the control group's limit."""
    if device.type == "cuda":
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + own
    known = Path("/proc/meminfo")
    if not known.is_file():  # not Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = dict(line.split(":", 1) for line in known.read_text().splitlines() if ":" in line)
    left = [1024 * int(lines["MemAvailable"].split()[0])]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(left))


def networks(policy: Any) -> dict[str, torch.nn.Module]:
    """The networks of a policy by name: those of its pipeline, as diffusers lists them."""
    parts = getattr(getattr(policy, "pipeline", None), "components", {"transformer": getattr(policy, "transformer", None)})
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def weigh(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextlib.contextmanager
def peak(policy: ImagePolicy) -> Iterator[Peak]:
    """What the block takes at most, besides the policy's own weights."""
    device = policy.device
    out = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield out
        out.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for network in networks(policy).values() for p in network.parameters()}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    before, most, over = _resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            yield out
    finally:
        over.set()
        watcher.join()
    out.bytes = max(most[0] - before, sum(held.values()))


def _resident() -> int:
    """Bytes of main memory that this process holds; 0 where only the graph can be counted."""
    if not Path("/proc/self/statm").is_file():
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def exhausted(error: BaseException) -> bool:
    """Whether an exception means that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))
    )


@contextlib.contextmanager
def explained(config: RunConfig, what: Callable[[], str]) -> Iterator[None]:
    """Memory that runs out inside is an OutOfMemory that says what to set."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not exhausted(error):
            raise
        raise OutOfMemory(advice(config, what(), error)) from error


def advice(config: RunConfig, what: str, error: BaseException) -> str:
    """What to set when memory ran out."""
    own = config.sampling.micro_batch
    less = f"sampling.micro_batch={max(1, own // 2)}" if own > 1 else "policy.gradient_checkpointing=true"
    drawn = f"; in sampling, sampling.draw_batch={max(1, config.sampling.draw_batch // 2)}" if config.sampling.draw_batch else ""
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return (
        f"memory ran out in {what} with sampling.micro_batch={own} ({first}). What was saved stands: go on with "
        f"`{less} --resume`; groups then share fewer windows, and the numbers go another way from there. "
        f"Also smaller: policy.gradient_checkpointing=true{drawn}."
    )


def one_pass(policy: ImagePolicy, prompts: Sequence[str], shape: tuple[int, ...], guidance: float, count: int) -> None:
    """Forward and backward of `count` pictures, then their decoding: the most that a step holds of one micro-batch."""
    condition = policy.encode([prompts[i % len(prompts)] for i in range(count)])
    x = torch.randn((count, *shape), generator=torch.Generator().manual_seed(0)).to(policy.device)
    try:
        policy.velocity(x, torch.tensor(0.5), condition, guidance).square().mean().backward()
    finally:
        for parameter in policy.trainable().values():
            parameter.grad = None
    policy.decode(x)


def choose(measure: Callable[[int], int | None], budget: float, most: int, group: int) -> tuple[int, dict[int, int]]:
    """(the largest size up to `most` that takes no more than `budget`, bytes by size tried); 0 where not even 1 fits.

    `measure` gives bytes, or None where memory ran out. Sizes double while the next is expected to fit (a line through the last two); then one
    between is tried. Whole groups share a pass, so the size is a multiple of `group`, or divides it.
    """
    took: dict[int, int] = {}
    n = 1
    while n <= most:
        told = measure(n)
        if told is None or told > budget:
            break
        took[n] = told
        if n == most or _expected(took, min(2 * n, most)) > budget:
            break
        n = min(2 * n, most)
    if not took:
        return 0, took
    largest = max(took)
    between = max((m for m in range(largest, min(2 * largest, most + 1)) if _expected(took, m) <= budget), default=largest)
    for size in (_whole(between, group), _whole(largest, group)):
        if size not in took and (told := measure(size)) is not None:
            took[size] = told
        if size in took and took[size] <= budget:
            return size, took
    return largest, took


def _expected(took: dict[int, int], size: int) -> float:
    """Bytes at `size` on the line through the two largest that were tried; one alone says nothing of larger ones."""
    if size in took:
        return took[size]
    *before, last = sorted(took)
    slope = (took[last] - took[before[-1]]) / (last - before[-1]) if before else 0.0
    return took[last] + max(slope, 0.0) * (size - last)


def _whole(size: int, group: int) -> int:
    """`size` down to whole groups, or to an even share of one."""
    return size - size % group if size >= group else max(d for d in range(1, size + 1) if group % d == 0)


def even(size: int, groups: int, group: int) -> int:
    """The smallest size that takes no more passes for a step than `size` does, in whole groups."""
    if size < group:
        return size
    passes = math.ceil(groups / (size // group))
    return math.ceil(groups / passes) * group


def reserved(policy: ImagePolicy, config: RunConfig, shape: tuple[int, ...]) -> int:
    """Bytes that a step needs besides a micro-batch: moments, average and a snapshot of what is trained, and the paths of all pictures."""
    trained = weigh(policy.trainable().values())
    pictures = config.group.prompts * config.group.size
    kept = 2 * ((config.sampling.window or 0) + 1)
    return 4 * trained + pictures * kept * math.prod(shape) * 4


def fitted(
    config: RunConfig, policy: ImagePolicy, prompts: Sequence[str], shape: tuple[int, ...], folder: Path, known: bool
) -> RunConfig:
    """`sampling.micro_batch: auto` as a number: the one that `folder` holds where `known`, else tried now and written there."""
    if config.sampling.micro_batch:
        return config
    place = folder / FILE
    if known and place.is_file():
        return _with(config, checkpoint.read_json(place)["micro_batch"])
    device = policy.device
    budget = SHARE.get(device.type, 0.5) * (free(device) - reserved(policy, config, shape))
    pictures = config.group.prompts * config.group.size

    def measure(count: int) -> int | None:
        try:
            with peak(policy) as taken:
                one_pass(policy, prompts, shape, config.sampling.guidance, count)
        except (RuntimeError, MemoryError) as error:
            if not exhausted(error):
                raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        return taken.bytes

    most = pictures if device.type == "cuda" else min(pictures, MOST_ON_CPU)
    size, took = choose(measure, budget, most, config.group.size)
    if size == 0:
        raise ConfigError(
            f"one picture of {config.sampling.height}x{config.sampling.width} does not fit: {checkpoint.size(max(budget, 0))} of "
            f"{device} may be taken. Set policy.gradient_checkpointing=true, policy.dtype=bfloat16, or smaller sampling.height and .width."
        )
    size = even(size, config.group.prompts, config.group.size)
    tried = {str(n): count for n, count in sorted(took.items())}
    checkpoint.write_json(place, {"micro_batch": size, "device": str(device), "budget": int(budget), "bytes": tried})
    return _with(config, size)


def _with(config: RunConfig, size: int) -> RunConfig:
    return config.model_copy(update={"sampling": config.sampling.model_copy(update={"micro_batch": size})})
