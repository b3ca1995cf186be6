"""Read attention weights while a model computes them: all calls once, in a probe, and then one row of one call.

Two ways cover the library. An attention function of ours can be registered with Transformers and named in the config of
one module; it calls the function that would have run. Models that do not use registered functions call a softmax or
PyTorch's scaled dot product attention somewhere inside a module: there a `TorchFunctionMode` sees the call.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .weights import attention_rows

PREFIX = "mm_hf_"
REPORTED = " (weights)"
SDPA = "scaled_dot_product_attention"
# What computes attention, by name; all but PyTorch's fused attention give the weights themselves.
FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "softmax"),
    F.multi_head_attention_forward: "multi_head_attention_forward",
    F.scaled_dot_product_attention: SDPA,
}
_sdpa_signature = inspect.signature(lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                    enable_gqa=False: None)  # fmt: skip


@dataclass
class AttentionCall:
    """One call that computed the attention of `queries` tokens to `keys` tokens.

    Attributes:
        name: Name of the module that made the call.
        base: What computed it, as in `Plan.attention_base`.
        cross: Whether other tokens than the queries' own were attended to.
        weights: (b, h, n, n) where the call tells them.
        rows: Function of a query's index that computes its weights from the call's arguments, if it can.
        values: (b, h, n, d), and `result` (b, h, n, d), what the weights made of them.
        inner: The function by which a registered attention function computed it.
    """

    name: str
    base: str
    queries: int
    keys: int
    cross: bool
    weights: Tensor | None = None
    rows: Callable[[Any], Tensor] | None = None
    values: Tensor | None = None
    result: Tensor | None = None
    inner: str | None = None

    def proves_rows(self, tolerance: float) -> bool:
        """Whether the computed weights make the call's result of its values."""
        if self.rows is None or self.values is None or self.result is None:
            return False
        try:
            weights = self.rows(None).to(self.values.dtype)
        except Exception:  # arguments of a kind that nothing here knows
            return False
        values = self.values.repeat_interleave(weights.shape[1] // self.values.shape[1], dim=1)
        # A query that may attend to nothing (padding under a sliding window) gets zeros from one function, a mean from
        # another, and is read by nobody.
        expected = (weights @ values) * self.result.ne(0).any(dim=-1, keepdim=True)
        scale = self.result.abs().max().clamp(min=1e-12)
        return expected.shape == self.result.shape and bool((expected - self.result).abs().max() <= tolerance * scale)


@dataclass
class Running:
    """A module call that has begun: when, and whether it was given other tokens to attend to."""

    name: str
    module: nn.Module
    began: int
    cross: bool


@contextmanager
def watch_attention(innermost: Callable[[], Running | None]) -> Iterator[list[AttentionCall]]:
    """Record all attention, by registered functions and by others; `innermost` tells which module is being computed."""
    from transformers import AttentionInterface

    calls: list[AttentionCall] = []
    mapping = AttentionInterface._global_mapping
    saved = dict(mapping)
    nested: list[str] = []  # inside a registered function, the functions that it called
    inside = [False]

    def watched(name: str, function: Callable[..., Any] | None) -> Callable[..., Any]:
        def call(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            inside[0] = True
            nested.clear()
            try:
                output = (function or eager_of(module))(module, query, key, value, attention_mask, **kwargs)
            finally:
                inside[0] = False
            where = innermost()
            if where is not None:
                calls.append(
                    AttentionCall(
                        where.name,
                        name.removeprefix(PREFIX),
                        query.shape[2],
                        key.shape[2],
                        where.cross,
                        weights=output[1],
                        rows=lambda index: attention_rows(module, query, key, attention_mask, index, **kwargs),
                        values=value,
                        result=output[0].transpose(1, 2),
                        inner=nested[-1] if nested else None,
                    )
                )
            return output

        return call

    def eager_of(module: nn.Module) -> Callable[..., Any]:
        mapping.pop("eager", None)
        try:
            return base_function(module, "eager")
        finally:
            mapping["eager"] = eager

    def on_result(function: str, count: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        where, base = innermost(), f"{function}[{count}]"
        if inside[0]:
            nested.append(base)
        elif where is not None and output.ndim >= 3 and function != SDPA:
            heads = getattr(where.module, "num_heads", None)
            if function == "softmax" and output.ndim == 3 and isinstance(heads, int) and len(output) % heads == 0:
                output = output.unflatten(0, (-1, heads))
            queries, keys = output.shape[-2:]
            calls.append(AttentionCall(where.name, base, queries, keys, where.cross, weights=output))
        elif where is not None and output.ndim == 4:
            module, bound = where.module, _sdpa_signature.bind(*args, **kwargs).arguments
            rows = lambda index: _sdpa_rows(module, bound, index)  # noqa: E731
            sizes = output.shape[2], bound["key"].shape[2]
            calls.append(AttentionCall(where.name, base, *sizes, where.cross, None, rows, bound["value"], output))

    eager: Any = watched("eager", saved.get("eager"))
    mapping.update({name: watched(name, function) for name, function in saved.items()})
    mapping["eager"] = eager
    try:
        with FunctionWatch(on_result, lambda: getattr(innermost(), "began", None)):
            yield calls
    finally:
        mapping.clear()
        mapping.update(saved)
        eager = None  # a circle of functions, which would keep all recorded tensors until the next garbage collection


class FunctionWatch(TorchFunctionMode):
    """Tells of each softmax and scaled dot product attention, and how many came before it in the same call (`scope`)."""

    def __init__(self, on_result: Callable[..., None], scope: Callable[[], Any]):
        super().__init__()
        self.on_result, self.scope = on_result, scope
        self.counts: dict[Any, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = FUNCTIONS.get(func)
        result = output[1] if isinstance(output, tuple) else output
        if name is not None and result is not None:
            key = (name, self.scope())
            self.counts[key] = self.counts.get(key, -1) + 1
            self.on_result(name, self.counts[key], args, kwargs or {}, result)
        return output


def _sdpa_rows(module: nn.Module, bound: Mapping[str, Any], index: Any) -> Tensor:
    return attention_rows(
        module,
        bound["query"],
        bound["key"],
        bound.get("attn_mask"),
        index,
        scaling=bound.get("scale"),
        is_causal=bound.get("is_causal", False),
    )


class AttentionHook:
    """Reads one query's row of one attention module: the cost of one row, whatever the implementation computes.

    A module that runs registered functions alone is given a copy of its config that names a function of ours. The
    model's own config, masks and all other modules stay as they are. Another module is watched while it runs.

    Attributes:
        index: Whose row: an integer, one for each example (b,), or None for the mean of all.
        batch: b, the number of examples of the forward to come.
        row: (b, n), heads averaged, after a forward while `active`.
    """

    def __init__(self, module: nn.Module, base: str):
        self.index: Any = 0
        self.batch = 0
        self.active = False
        self.detach = True
        self.row: Tensor | None = None
        self.base = base
        self._hooks: list[Any] = []
        self._mode: FunctionWatch | None = None
        self._own_config: Any = None
        if base.endswith("]"):
            self._hooks = [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        else:
            self._own_config = module.config
            config: Any = copy.copy(self._own_config)
            config._attn_implementation_internal = _register(base.removesuffix(REPORTED))
            module.config = config
        module.mm_hf_hook = self  # type: ignore[assignment]

    @property
    def implementation(self) -> str:
        """The attention implementation that the module's own config names."""
        return self._own_config._attn_implementation

    def remove(self, module: nn.Module) -> None:
        """Leave the module as it was."""
        for hook in self._hooks:
            hook.remove()
        if self._own_config is not None:
            module.config = self._own_config
        del module.mm_hf_hook

    def store(self, weights: Callable[[Any], Tensor]) -> None:
        """Keep the row, given a function that computes rows (b, h, 1 or n, n)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            self.row = weights(self.index).float().mean(dim=(1, 2))

    def keep_reported(self, weights: Tensor) -> None:
        """Keep the row of weights (b, h, n, n), or of other dimensions that amount to the same."""
        n = weights.shape[-1]
        every = weights.reshape(self.batch, -1, n, n)
        if isinstance(self.index, Tensor):
            self.store(lambda index: every[torch.arange(self.batch, device=every.device), :, index][:, :, None])
        else:
            self.store(lambda index: every if index is None else every[:, :, index, None])

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self.active:
            self._mode = FunctionWatch(self._seen, lambda: None)
            self._mode.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def _seen(self, function: str, count: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if f"{function}[{count}]" != self.base:
            return
        if function != SDPA:
            self.keep_reported(output)
        else:
            bound = _sdpa_signature.bind(*args, **kwargs).arguments
            self.store(lambda index: _sdpa_rows(nn.Identity(), bound, index))


def _register(base: str) -> str:
    """Make the attention function that taps `base` known to Transformers."""
    from transformers import AttentionInterface

    name = PREFIX + base

    def attention_with_hook(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        hook: Any = module.mm_hf_hook
        # The implementation may have been changed since, and the mask that comes is made for the one in use.
        current = base_function(module, hook.implementation)
        output, weights = current(module, query, key, value, attention_mask, **kwargs)
        if hook.active and hook.base.endswith(REPORTED) and weights is not None:
            hook.keep_reported(weights)
        elif hook.active:
            hook.store(lambda index: attention_rows(module, query, key, attention_mask, index, **kwargs))
        return output, weights

    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, attention_with_hook)
    return name


def base_function(module: nn.Module, base: str) -> Callable[..., Any]:
    """The attention function that a module runs: a registered one, or the eager one of its own file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # A module of an adapter or a subclass still runs the function of the file that defines its attention.
    files = [sys.modules[cls.__module__] for cls in type(module).__mro__ if cls.__module__ in sys.modules]
    eager: Any = next((f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward")), None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
