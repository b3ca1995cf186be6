"""Functions that compute attention: those registered with Transformers, and PyTorch's own.

Most models call an attention function that is registered with Transformers by name ("sdpa", "eager", ...). It can be
replaced in the registry. The others call a softmax or PyTorch's scaled dot product attention somewhere inside a module;
`AttentionFunctionMode` sees these calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .weights import attention_rows

SDPA = "scaled_dot_product_attention"
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # those that may be positional
# All of these but SDPA return the weights themselves.
FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "softmax"),
    F.multi_head_attention_forward: "multi_head_attention_forward",
    F.scaled_dot_product_attention: SDPA,
}


class AttentionFunctionMode(TorchFunctionMode):
    """Mode that calls `on_result` after each of PyTorch's functions in `FUNCTIONS`.

    Args:
        on_result: Function of a name such as "softmax[1]" (the second softmax in its scope), the call's arguments,
            keyword arguments and result.
        scope: Function that returns an identifier of the module call that is being computed. Calls are counted per
            scope.
    """

    def __init__(self, on_result: Callable[..., None], scope: Callable[[], Any]):
        super().__init__()
        self.on_result, self.scope = on_result, scope
        self.counts: dict[Any, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = FUNCTIONS.get(func)
        if name is None:
            return output
        result = output[1] if isinstance(output, tuple) else output
        if result is not None:
            key = (name, self.scope())
            count = self.counts.get(key, 0)
            self.counts[key] = count + 1
            self.on_result(f"{name}[{count}]", args, kwargs or {}, result)
        return output


def sdpa_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `scaled_dot_product_attention` by name."""
    return {**dict(zip(SDPA_ARGUMENTS, args)), **kwargs}


def sdpa_rows(module: nn.Module, arguments: Mapping[str, Any], index: int | Tensor | None) -> Tensor:
    """Return rows of attention as `attention_rows` does, for the arguments of `scaled_dot_product_attention`."""
    return attention_rows(
        module,
        arguments["query"],
        arguments["key"],
        arguments.get("attn_mask"),
        index,
        scaling=arguments.get("scale"),
        is_causal=arguments.get("is_causal", False),
    )


def registered_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return the attention function that a module runs: the registered one, or the eager one of its own file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Subclasses (adapters, users' models) run the function of the file that defines their attention.
    files = [sys.modules[cls.__module__] for cls in type(module).__mro__ if cls.__module__ in sys.modules]
    eager: Any = next((f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward")), None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
