"""Several processes, one run, as torchrun starts them: who samples which groups, and what they tell each other.

Each rank samples, scores and learns from whole groups of its own; rewards are told to all, so that every rank computes the same
advantages, and gradients are summed. What goes between ranks is msgpack and tensors, with a deadline. Alone, nothing here does anything.
"""

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import ConfigError, RunConfig
from trainer.scoring import Rewards

T = TypeVar("T")
_ARRAY = 1


class World:
    """Rank `rank` of `size`; every method but `part` and `rows` has to be called by all ranks, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, device: str | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of what all know, in one piece; the pieces stand in the order of the ranks."""
        return items[self.rows(len(items))]

    def rows(self, count: int) -> slice:
        """The same of so many rows."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def tell(self, value: Any) -> list[Any]:
        """What each rank told: None, numbers, texts, arrays, lists and mappings of these."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(_pack(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = max(int(one) for one in sizes)
        told = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(told, torch.nn.functional.pad(own, (0, longest - len(own))))
        return [_unpack(one[: int(n)].numpy().tobytes()) for one, n in zip(told, sizes, strict=True)]

    def same(self, value: T) -> T:
        """What rank 0 says, which all go by."""
        return cast(T, self.tell(value if self.rank == 0 else None)[0])

    def total(self, value: float) -> float:
        """The sum over ranks, in their order: equal bits everywhere."""
        return float(sum(self.tell(float(value))))

    def joined(self, own_BX: Tensor) -> Tensor:
        """The rows of all ranks, in their order."""
        return own_BX if self.size == 1 else torch.from_numpy(np.concatenate(self.tell(own_BX.cpu().numpy())))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Each becomes its sum over ranks, in place; all of one kind go in one piece."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors if self.size > 1 else ():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for several in kinds.values():
            flat = torch.cat([one.reshape(-1) for one in several])
            dist.all_reduce(flat)
            for one, summed in zip(several, flat.split([one.numel() for one in several]), strict=True):
                one.copy_(summed.view_as(one))

    def wait(self) -> None:
        """For all others."""
        self.tell(None)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


ALONE = World()


def start(timeout_s: float, device: str = "auto") -> World:
    """The world that torchrun's variables describe, and this rank's device; alone without them.

    A rank that waits longer than `timeout_s` for the others ends with an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    return World(dist.get_rank(), dist.get_world_size(), f"cuda:{local}" if cuda else "cpu")


def agreed(world: World, config: RunConfig) -> RunConfig:
    """The configuration with the least micro-batch that fits any rank; ConfigError when the groups of a step cannot be dealt out evenly."""
    if world.size == 1:
        return config
    least = min(world.tell(config.sampling.micro_batch))
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"micro_batch": least})})
    together = max(1, config.sampling.batch // config.group.size)
    blocks, odd = divmod(config.group.prompts, together)
    if odd or blocks % world.size:
        fits = [m * config.group.size for m in range(1, together + 1) if config.group.prompts % (m * world.size) == 0]
        key = "draw_batch" if config.sampling.draw_batch else "micro_batch"
        fix = f"sampling.{key}={fits[-1]}" if fits else f"group.prompts={-(-config.group.prompts // world.size) * world.size}"
        raise ConfigError(
            f"{config.group.prompts} groups of {config.group.size}, {together} to a pass, cannot be dealt out evenly to {world.size} "
            f"ranks: set {fix}"
        )
    return config


def rewards_of_all(world: World, own: Rewards) -> Rewards:
    """The step's rewards, those of each rank after those of the one before it."""
    if world.size == 1:
        return own
    told = world.tell(
        {
            "values": own.values_RB.numpy(),
            "mask": own.mask_RB.numpy(),
            "versions": dict(own.versions),
            "failures": dict(own.failures),
            "uncertainty": {name: one.numpy() for name, one in own.uncertainty.items()},
            "notes": dict(own.notes),
            "missing": own.missing,
        }
    )
    failures: dict[str, int] = {}
    for one in told:
        for kind, count in one["failures"].items():
            failures[kind] = failures.get(kind, 0) + count

    def joined(*path: str) -> Tensor:
        found: list[Any] = told
        for key in path:
            found = [one[key] for one in found]
        return torch.from_numpy(np.concatenate(found, axis=-1))

    return Rewards(
        joined("values"),
        joined("mask"),
        {name: version for one in told for name, version in one["versions"].items()},
        failures,
        uncertainty={name: joined("uncertainty", name) for name in own.uncertainty},
        notes={name: float(np.mean([one["notes"][name] for one in told if name in one["notes"]])) for name in told[0]["notes"]},
        missing=sum(one["missing"] for one in told),
    )


def _pack(value: Any) -> bytes:
    def array(one: Any) -> msgspec.msgpack.Ext:
        if not isinstance(one, np.ndarray):
            raise TypeError(f"ranks tell each other no {type(one).__name__}")
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode([one.dtype.str, one.shape, one.tobytes()]))

    return msgspec.msgpack.encode(value, enc_hook=array)


def _unpack(data: bytes) -> Any:
    def array(code: int, inner: memoryview) -> Any:
        dtype, shape, content = msgspec.msgpack.decode(inner)
        return np.frombuffer(content, dtype=dtype).reshape(shape).copy()

    return msgspec.msgpack.decode(data, ext_hook=array)
