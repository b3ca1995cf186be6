"""Count the operations of a forward while it is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


@dataclass(frozen=True)
class ForwardSize:
    """Size of a forward, for one example.

    Attributes:
        operations: Floating-point operations of matrix products, convolutions and attention; 0 if the model consists of
            operations that PyTorch cannot count.
        num_locations: Number of locations, padding included; 1 if they are not known.
        num_classes: Number of logits of an example or of a location.
        head_operations: Operations of the head at one location; 0 if the model itself returns logits of every location.
    """

    operations: float
    num_locations: int
    num_classes: int
    head_operations: float = 0.0


class OperationCounter(TorchDispatchMode):
    """Counter of the floating-point operations inside of the context, by the formulas of PyTorch's `FlopCounterMode`.

    Unlike that class, it installs no hooks on modules, which would stay in the graph of a probe, and it counts
    attention on a CPU. Operations without a formula, such as custom kernels, count as 0.
    """

    supports_higher_order_operators = True  # such as flex_attention

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            with contextlib.suppress(Exception):  # a formula that does not fit a call must not stop the training
                self.operations += int(formula(*args, **kwargs, out_val=result))
        return result


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    **flop_registry,
}
