"""One mini-batch out of those of all processes: what `gather_across_devices` mixes.

Every process has the numbers of all examples, and the gradient of what any process computes from them comes back to the
process whose they are. The processes then share the mixed examples out among themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


def rank_generator(device: torch.device | str) -> torch.Generator:
    """A generator of this process's own, seeded by one draw from the CPU's global generator.

    Processes of one training have the same global state (Trainer seeds them alike): without this, all would mix by the
    same factors. The global generator is what checkpoints restore, so that a resumed training draws the same ones.
    """
    seed = int(torch.randint(2**62, ())) + (dist.get_rank() if is_distributed() else 0)
    return torch.Generator(device).manual_seed(seed)


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


def raise_if_uneven_inputs(what: str, instead: str) -> None:
    """Refuse what all processes do together where some may have run out of mini-batches: it would be waited for for ever.

    Inside of `torch.distributed.algorithms.Join` (`accelerator.join_uneven_inputs`), a process without a mini-batch takes
    part in what DistributedDataParallel does, and in nothing else.

    Raises:
        ValueError: This is a forward of a DistributedDataParallel that is joined; the message says what to do `instead`.
    """
    parallel: Any = torch.nn.parallel.DistributedDataParallel
    joined = getattr(parallel._get_active_ddp_module(), "_join_config", None)
    if joined is not None and joined.enable:
        raise ValueError(
            f"{what} needs all processes in every step, and inside of Join (join_uneven_inputs with even_batches=False) some "
            f"may have run out of mini-batches: it would wait for them for ever. Leave even_batches on, or {instead}."
        )


def all_gather_object(x: Any) -> list[Any]:
    """What each process has here, in the order of the processes: anything that can be pickled."""
    if not is_distributed():
        return [x]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


@dataclass
class GlobalBatch:
    """The mini-batches of all processes as one, in the order of the processes.

    Attributes:
        sizes: The number of examples of each process.
        locations: The largest number of locations of any process; 0 where there are none.
        rank: Which process this is.
        generator: Draws the same numbers in every process; seeded from the global generator of the first.
    """

    sizes: list[int]
    locations: int
    rank: int
    generator: torch.Generator

    @classmethod
    def gather_sizes(cls, num_examples: int, num_locations: int, device: torch.device) -> GlobalBatch:
        """Ask all processes for the sizes of their mini-batches. On a GPU this waits for the device."""
        raise_if_uneven_inputs(
            "gather_across_devices=True", "let each process mix its own (gather_across_devices=False)"
        )
        seed = int(torch.randint(2**62, ()))
        mine = torch.tensor([num_examples, num_locations, seed], device=device)
        all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_of_them, mine)
        sizes, locations, seeds = torch.stack(all_of_them).T.tolist()
        return cls(sizes, max(locations), dist.get_rank(), torch.Generator(device).manual_seed(seeds[0]))

    @property
    def processes(self) -> int:
        """How many there are."""
        return len(self.sizes)

    def columns(self, num_mixed: int) -> slice:
        """The mixed examples that are this process's to compute.

        Example:
            >>> [GlobalBatch([4, 4, 4], 0, rank, torch.Generator()).columns(1000) for rank in range(3)]
            [slice(0, 333, None), slice(333, 666, None), slice(666, 1000, None)]
        """
        return slice(*(num_mixed * i // self.processes for i in (self.rank, self.rank + 1)))

    def gather(self, x: Tensor, locations: int | None = None, fill: float = 0) -> Tensor:
        """Give this process's (b, ...), differentiable, as everyone's (sum of b, ...).

        With `locations`, dimension 1 is first made as long as that, by `fill`.
        """
        missing = 0 if locations is None else locations - x.shape[1]
        padding = [*[0] * (2 * (x.ndim - 2)), 0, missing]
        return _Gather.apply(F.pad(x, padding, value=fill) if missing else x, self.sizes, self.rank)

    def total(self, x: Tensor) -> Tensor:
        """The sum of a number of each process."""
        x = x.detach().clone()
        dist.all_reduce(x)
        return x


class _Gather(torch.autograd.Function):
    """All-gather of tensors whose first dimensions differ; in the backward pass the gradients of all are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.first, ctx.size = sum(sizes[:rank]), sizes[rank]
        most = max(sizes)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.first : ctx.first + ctx.size], None, None
