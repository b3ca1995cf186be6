"""Record every call that computes attention during one forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attachments import PREFIX
from ..tolerance import is_close
from .functions import SDPA, AttentionFunctionMode, registered_function, sdpa_arguments, sdpa_rows
from .weights import attention_rows


@dataclass
class OpenCall:
    """A module call that has begun and not ended.

    Attributes:
        name: Name of the module.
        module: The module.
        began: Position of the call's beginning among all beginnings and ends of calls.
        cross: True if the module attends to other tokens than its own.
    """

    name: str
    module: nn.Module
    began: int
    cross: bool


@dataclass
class AttentionCall:
    """One call that computed the attention of `queries` tokens over `keys` tokens.

    Attributes:
        name: Name of the module that made the call.
        base: The function that computed it, as in `Plan.attention_base`.
        cross: True for cross-attention.
        weights: (b, h, n, n), or None if the function does not return them.
        rows: Function of a query's index that computes its weights from the call's arguments, or None.
        values: (b, h, n, d), or None.
        result: (b, h, n, d), the weighted values, or None.
        inner: PyTorch's function inside of a registered function, or None.
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

    def rows_are_exact(self) -> bool:
        """Return True if `rows` computes the weights that gave the call's result."""
        if self.rows is None or self.values is None or self.result is None:
            return False
        try:
            weights = self.rows(None).to(self.values.dtype)
        except Exception:  # `attention_rows` does not support these arguments.
            return False
        values = self.values.repeat_interleave(weights.shape[1] // self.values.shape[1], dim=1)
        # A query without keys (padding under a sliding window) gets zeros from some functions and a mean from others.
        has_keys = self.result.ne(0).any(dim=-1, keepdim=True)
        return is_close((weights @ values) * has_keys, self.result, slack=10)


def calls_within(calls: Iterable[AttentionCall], name: str) -> list[AttentionCall]:
    """Return the calls that a module, or a module inside of it, made."""
    return [call for call in calls if f"{call.name}.".startswith(f"{name}.")]


@contextmanager
def record_attention(current_call: Callable[[], OpenCall | None]) -> Iterator[list[AttentionCall]]:
    """Record all attention that is computed inside the context.

    Args:
        current_call: Function that returns the innermost module call that is being computed.

    Yields:
        A list to which the calls are appended.
    """
    from transformers import AttentionInterface

    recorder = _Recorder(current_call)
    mapping = AttentionInterface._global_mapping
    saved = dict(mapping)
    for name in {*saved, "eager"}:
        mapping[name] = functools.partial(recorder.run_registered, name, saved.get(name))
    try:
        with AttentionFunctionMode(recorder.on_result, lambda: getattr(current_call(), "began", None)):
            yield recorder.calls
    finally:
        mapping.clear()
        mapping.update(saved)


class _Recorder:
    def __init__(self, current_call: Callable[[], OpenCall | None]):
        self.current_call = current_call
        self.calls: list[AttentionCall] = []
        self.inner: list[str] | None = None  # PyTorch's functions inside of the registered function that is running

    def run_registered(
        self,
        name: str,
        function: Callable[..., Any] | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run a registered attention function, or the module's own eager one for None, and record the call."""
        outer, inner = self.inner, list[str]()
        self.inner = inner
        try:
            output = (function or _own_eager(module))(module, query, key, value, attention_mask, **kwargs)
        finally:
            self.inner = outer
        if outer is not None:  # a registered function that calls another one
            outer += inner
        current = self.current_call()
        if current is not None:
            self.calls.append(
                AttentionCall(
                    name=current.name,
                    base=name.removeprefix(PREFIX),
                    queries=query.shape[2],
                    keys=key.shape[2],
                    cross=current.cross,
                    weights=output[1],
                    rows=lambda index: attention_rows(module, query, key, attention_mask, index, **kwargs),
                    values=value,
                    result=output[0].transpose(1, 2),
                    inner=inner[-1] if inner else None,
                )
            )
        return output

    def on_result(self, base: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        """Record a call of one of PyTorch's functions, unless a registered function made it."""
        current = self.current_call()
        if self.inner is not None:
            self.inner.append(base)
        elif current is None:
            return
        elif not base.startswith(SDPA):
            if result.ndim >= 3:
                weights = _with_heads(result, current.module) if base.startswith("softmax") else result
                queries, keys = weights.shape[-2:]
                self.calls.append(AttentionCall(current.name, base, queries, keys, current.cross, weights))
        elif result.ndim == 4:
            module, arguments = current.module, sdpa_arguments(args, kwargs)
            self.calls.append(
                AttentionCall(
                    name=current.name,
                    base=base,
                    queries=result.shape[2],
                    keys=arguments["key"].shape[2],
                    cross=current.cross,
                    rows=lambda index: sdpa_rows(module, arguments, index),
                    values=arguments["value"],
                    result=result,
                )
            )


def _own_eager(module: nn.Module) -> Callable[..., Any]:
    """Return the eager function of the module's own file, which a registered "eager" would hide."""
    from transformers import AttentionInterface

    mapping = AttentionInterface._global_mapping
    registered: Any = mapping.pop("eager")
    try:
        return registered_function(module, "eager")
    finally:
        mapping["eager"] = registered


def _with_heads(weights: Tensor, module: nn.Module) -> Tensor:
    """Return weights (b h, n, n) as (b, h, n, n) if the module states its number of heads."""
    heads = getattr(module, "num_heads", None)
    if weights.ndim == 3 and isinstance(heads, int) and len(weights) % heads == 0:
        return weights.unflatten(0, (-1, heads))
    return weights
