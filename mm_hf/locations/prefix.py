"""Tokens that a model puts before those of its input, such as CLS, distillation and register tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class PrefixMode(TorchFunctionMode):
    """Mode that counts the tokens which a model puts before those of its input, by the length of the sequence.

    They are the first arguments of a concatenation of tokens (b, n, d) if they are the same for all examples. In a
    later stage, which separates and concatenates them again, they are known by their number.

    Attributes:
        lengths: Number of such tokens by the number of all tokens.

    Example:
        >>> cls, registers, patches = torch.zeros(1, 1, 8), torch.ones(1, 4, 8), torch.randn(2, 9, 8)
        >>> with PrefixMode() as mode:
        ...     tokens = torch.cat([cls.expand(2, -1, -1), registers.expand(2, -1, -1), patches], dim=1)
        >>> mode.lengths
        {14: 5}
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths: dict[int, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in CONCATENATIONS:
            self._count(*_concatenated(*args, **(kwargs or {})))
        return output

    def _count(self, parts: Sequence[Tensor], dim: int) -> None:
        if dim not in (1, -2) or any(part.ndim != 3 for part in parts):
            return
        count = 0
        for part in parts[:-1]:
            if not torch.equal(part, part[:1].expand_as(part)) and count + part.shape[1] not in self.lengths.values():
                break
            count += part.shape[1]
        n = sum(part.shape[1] for part in parts)
        self.lengths[n] = max(count, self.lengths.get(n, 0))


def _concatenated(tensors: Sequence[Tensor], dim: int = 0, axis: int | None = None, **_: Any) -> tuple[Any, int]:
    return tensors, dim if axis is None else axis
