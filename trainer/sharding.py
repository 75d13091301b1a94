"""Weights in parts: FSDP2 (`parallel.shard: true`), where each rank holds its part of the network and fetches the rest block by block.

An adapter stays whole on every rank and is summed by hand, as without sharding; trained weights of the network itself are DTensors, whose
gradients FSDP sums over ranks. What is written to disk is whole, so that a run can be resumed on another number of ranks.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config import ConfigError, RunConfig

EVEN = ("grpo", "guard")  # losses whose ranks make the same number of forward passes, whatever was scored


def shard(policy: Any, config: RunConfig, ranks: int) -> None:
    """Cut the transformer of a policy into parts for all ranks. ConfigError for what cannot be had that way."""
    if ranks < 2:
        raise ConfigError("parallel.shard needs several ranks: start with torchrun --nproc-per-node N, or set parallel.shard=false")
    if config.loss.use not in EVEN:
        raise ConfigError(
            f"parallel.shard does not go with loss.use={config.loss.use}, whose ranks make unlike many forward passes: "
            f"take {' or '.join(EVEN)}, or set parallel.shard=false"
        )
    network: torch.nn.Module = policy.transformer
    mesh = init_device_mesh(policy.device.type, (ranks,))
    adapter = set(policy.trainable().values()) if policy.options.lora is not None else None
    lists = [child for child in network.children() if isinstance(child, torch.nn.ModuleList)]
    for block in (block for several in lists for block in several):
        fully_shard(block, mesh=mesh, ignored_params=adapter)
    fully_shard(network, mesh=mesh, ignored_params=adapter, reshard_after_forward=True)  # whole only while in use, the root too
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            module.set_gradient_divide_factor(1.0)  # losses are shares of the whole step's: their gradients add up


def whole(tensor: Tensor) -> Tensor:
    """The tensor from all its parts: by all ranks together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, own: Tensor) -> Tensor:
    """`value`, whole on every rank, on the device of `own` and in parts as it."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor):
        return value.to(own.device)
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


@contextlib.contextmanager
def wearing(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters have these values; what they learned meanwhile would be lost.

    Whole ones change places at no cost; FSDP knows its parts by their place, so these are copied.
    """
    if any(isinstance(p, DTensor) for p in parameters.values()):
        held = {k: p.detach().clone() for k, p in parameters.items()}
        try:
            _copy(parameters, values)
            yield
        finally:
            _copy(parameters, held)
        return
    own = {k: p.data for k, p in parameters.items()}
    try:
        for k, p in parameters.items():
            p.data = values[k].to(p.device)
        yield
    finally:
        for k, p in parameters.items():
            p.data = own[k]


@torch.no_grad()
def _copy(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for k, p in parameters.items():
        p.copy_(like(values[k], p))
