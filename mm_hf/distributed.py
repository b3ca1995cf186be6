"""Collective operations on the mini-batches of all ranks, and a random generator for each rank.

With `gather_across_devices`, the mini-batches of all ranks are mixed as one. Every rank gathers the tensors of all
examples and computes its share of the mixed examples. The backward pass sums the gradients over the ranks and returns
each example's gradient to its own rank.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


def rank_generator(device: torch.device | str) -> torch.Generator:
    """Create a generator for this rank, seeded by one draw from the CPU's global generator plus the rank.

    Trainer seeds the global generators of all ranks alike, so without the rank all would draw the same factors.
    Checkpoints restore the global generator, so a resumed training run draws the same numbers as an uninterrupted one.
    """
    return torch.Generator(device).manual_seed(rank_seed())


def rank_seed() -> int:
    """Draw a seed from the CPU's global generator, and add the rank: see `rank_generator`."""
    return int(torch.randint(2**62, ())) + (dist.get_rank() if is_distributed() else 0)


def is_distributed() -> bool:
    """Return True if the default process group is initialized."""
    return dist.is_available() and dist.is_initialized()


def started_processes() -> int:
    """Return the number of processes that torchrun or Accelerate has started together with this one.

    They set the environment variables WORLD_SIZE and LOCAL_RANK. WORLD_SIZE alone belongs to a job whose nodes work
    independently.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    return int(processes) if "LOCAL_RANK" in os.environ and processes.isdigit() else 1


def is_single_process_of_many() -> bool:
    """Return True if `accelerate launch --num_processes N` has started one process instead of N.

    It expects MPI to start the others if the configuration is for CPUs or not distributed. It sets MASTER_ADDR if N is
    larger than 1. Launchers that start N processes also set a variable with their number.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"}
    return launched <= os.environ.keys() and not any(name.endswith(("WORLD_SIZE", "PMI_SIZE")) for name in os.environ)


def warn_if_ranks_train_apart() -> None:
    """Warn if a launcher has started several processes that do not communicate, or one process instead of several."""
    processes = started_processes()
    if processes > 1 and not is_distributed():
        warnings.warn(
            f"A launcher has started {processes} processes, and torch.distributed is not initialized: each process "
            "trains a model of its own. Create accelerate.Accelerator() (on CPUs with ACCELERATE_USE_CPU=true) or call "
            "torch.distributed.init_process_group() before training.",
            stacklevel=2,
        )
    elif is_single_process_of_many() and not is_distributed():
        warnings.warn(
            "accelerate launch has started one process, which trains alone, although MASTER_ADDR is set as for several "
            "processes: without MPI it starts several for distributed_type MULTI_GPU only, on CPUs with "
            "ACCELERATE_USE_CPU=true. Use this type, or set num_processes to 1.",
            stacklevel=2,
        )


def check_processes(accelerator: Any) -> None:
    """Check that the processes of a job train one model together, in the way that is configured.

    Args:
        accelerator: The `accelerate.Accelerator` that prepares the model.

    Raises:
        ValueError: Each process would train a model of its own, or Accelerate ignores the configured FSDP or DeepSpeed.
    """
    started = dist.get_world_size() if is_distributed() else started_processes()
    kind = accelerator.distributed_type.value
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but Accelerate has {accelerator.num_processes}: each would train "
            "independently. On CPUs, set ACCELERATE_USE_CPU=true, or for DeepSpeed the backend gloo (ddp_backend of "
            "TrainingArguments, accelerate.InitProcessGroupKwargs)."
        )
    if started > 1 and kind == "NO":
        raise ValueError(
            f"{started} processes were started, but Accelerate has found no accelerator and would not average their "
            "gradients: each would train independently. On CPUs, set ACCELERATE_USE_CPU=true."
        )
    for engine, name in {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}.items():
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" and kind != engine:
            raise ValueError(
                f"{name} is configured, but Accelerate would silently use {kind}: it supports FSDP on accelerators "
                "only and ignores DeepSpeed with ACCELERATE_USE_CPU. Use another configuration on CPUs, and for "
                "DeepSpeed the backend gloo without ACCELERATE_USE_CPU."
            )


def raise_if_uneven_inputs(what: str, instead: str) -> None:
    """Raise an error before a collective operation that ranks without a mini-batch would not enter.

    Inside `torch.distributed.algorithms.Join` (`accelerator.join_uneven_inputs`), a rank that has run out of
    mini-batches only shadows the collective operations of DistributedDataParallel. Any other collective operation would
    deadlock.

    Args:
        what: The operation, for the error message.
        instead: A setting that avoids the operation, for the error message.

    Raises:
        ValueError: If this is the forward of a DistributedDataParallel module inside `Join`.
    """
    parallel: Any = torch.nn.parallel.DistributedDataParallel
    join_config = getattr(parallel._get_active_ddp_module(), "_join_config", None)
    if join_config is not None and join_config.enable:
        raise ValueError(
            f"{what} needs all ranks in every step, but inside Join (join_uneven_inputs with even_batches=False) some "
            f"ranks may have no mini-batch left: this would deadlock. Set even_batches=True, or {instead}."
        )


def all_gather_object(x: Any) -> list[Any]:
    """Gather a picklable object from each rank, in rank order."""
    if not is_distributed():
        return [x]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, x)
    return gathered


def first_message(message: str | None) -> str | None:
    """Return the message of the first rank that has one, on all ranks, so that all of them raise the same error."""
    return next((found for found in all_gather_object(message) if found is not None), None)


@dataclass
class GlobalBatch:
    """The mini-batches of all ranks as one, in rank order.

    Attributes:
        sizes: Number of examples of each rank.
        num_locations: Largest number of locations of any rank; 0 without locations.
        rank: This rank.
        generator: Draws the same numbers on every rank; seeded from the global generator of rank 0.
    """

    sizes: list[int]
    num_locations: int
    rank: int
    generator: torch.Generator

    @classmethod
    def gather_sizes(cls, num_examples: int, num_locations: int, device: torch.device) -> GlobalBatch:
        """Gather the sizes of the mini-batches of all ranks. On a GPU this synchronizes with the device."""
        raise_if_uneven_inputs("gather_across_devices=True", "set gather_across_devices=False")
        seed = int(torch.randint(2**62, ()))
        local = torch.tensor([num_examples, num_locations, seed], device=device)
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local)
        sizes, locations, seeds = torch.stack(gathered).T.tolist()
        return cls(sizes, max(locations), dist.get_rank(), torch.Generator(device).manual_seed(seeds[0]))

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.sizes)

    def columns(self, num_mixed: int) -> slice:
        """Return the mixed examples that this rank computes.

        Example:
            >>> [GlobalBatch([4, 4, 4], 0, rank, torch.Generator()).columns(1000) for rank in range(3)]
            [slice(0, 333, None), slice(333, 666, None), slice(666, 1000, None)]
        """
        return slice(*(num_mixed * i // self.world_size for i in (self.rank, self.rank + 1)))

    def gather(self, x: Tensor, locations: int | None = None, fill: float = 0) -> Tensor:
        """Gather a tensor (b, ...) of each rank as (sum of b, ...), differentiably.

        Args:
            x: The tensor of this rank.
            locations: If given, dimension 1 is first padded to this length.
            fill: Value of the padding.
        """
        missing = 0 if locations is None else locations - x.shape[1]
        padding = [*[0] * (2 * (x.ndim - 2)), 0, missing]
        return _Gather.apply(F.pad(x, padding, value=fill) if missing else x, self.sizes, self.rank)

    def total(self, x: Tensor) -> Tensor:
        """Sum a tensor over the ranks, without a gradient."""
        x = x.detach().clone()
        dist.all_reduce(x)
        return x


class _Gather(torch.autograd.Function):
    """All-gather of tensors with different first dimensions. The backward pass sums the gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.first, ctx.size = sum(sizes[:rank]), sizes[rank]
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.first : ctx.first + ctx.size], None, None
