"""Read one query's row of attention in each forward, whatever implementation the model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attachments import PREFIX, ModuleHooks, attach, detach
from .functions import SDPA, AttentionFunctionMode, registered_function, sdpa_arguments, sdpa_rows
from .weights import attention_rows

HOOK = "mm_hf_hook"  # the attribute of an attention module
REPORTED = " (weights)"  # ends the `attention_base` of functions whose returned weights are read


class AttentionHook(ModuleHooks):
    """Hook on one attention module that stores one row of its attention, at the cost of one row.

    While the hook is active, a module that runs registered attention functions has a copy of its config that names one
    of our functions, which runs the original one and computes the row. The model's own config, its masks and all other
    modules stay as they are. In any other module, an `AttentionFunctionMode` is active while it runs.

    Attributes:
        active: Store the row of the next forward.
        detach: Store it without a gradient.
        index: The query: an integer, one integer per example (b,), or None for the mean over all queries.
        batch: b, the number of examples in the next forward.
        row: (b, n), the attention averaged over heads, after a forward while `active`.
    """

    def __init__(self, module: nn.Module, base: str):
        self.active = False
        self.detach = True
        self.index: int | Tensor | None = 0
        self.batch = 0
        self.row: Tensor | None = None
        self.base = base
        self.module: Any = module
        self._handles: list[Any] = []
        self._mode: AttentionFunctionMode | None = None
        self._outer = module.__dict__.get(HOOK)
        self._original_config: Any = None
        self._config: Any = None
        if base.endswith("]"):  # the k-th call of one of PyTorch's functions
            self._handles = [
                module.register_forward_pre_hook(self._enter_mode),
                module.register_forward_hook(self._exit_mode, always_call=True),
            ]
        else:
            self._original_config = self.module.config
            self._config = copy.copy(self._original_config)
            self._config._attn_implementation_internal = _register_function(base.removesuffix(REPORTED))
        attach(module, **{HOOK: self})

    def remove(self) -> None:
        """Restore the module."""
        for handle in self._handles:
            handle.remove()
        if self.module.__dict__.get(HOOK) is self:
            detach(self.module, HOOK)
            if self._outer is not None:
                attach(self.module, **{HOOK: self._outer})

    def begin(self, batch: int, index: int | Tensor | None, detach: bool) -> None:
        """Store the row of the forward until `end`."""
        self.active, self.batch, self.index, self.detach = True, batch, index, detach
        if self._config is not None:
            self.module.config = self._config

    def end(self) -> None:
        """Delete the row, and let the module run as without the hook."""
        self.active, self.row = False, None
        if self._config is not None:
            self.module.config = self._original_config

    def store(self, rows: Callable[[Any], Tensor]) -> None:
        """Store the row, given a function of `index` that returns rows (b, h, 1 or n, n)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            self.row = rows(self.index).float().mean(dim=(1, 2))

    def store_from_weights(self, weights: Tensor) -> None:
        """Store the row, given weights (b, h, q, n) or (b h, q, n)."""
        all_rows = weights.reshape(self.batch, -1, *weights.shape[-2:])
        if self.index is None:
            self.store(lambda index: all_rows)
        elif isinstance(self.index, Tensor):
            examples = torch.arange(self.batch, device=weights.device)
            self.store(lambda index: all_rows[examples, :, index][:, :, None])
        else:
            self.store(lambda index: all_rows[:, :, index, None])

    def run(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run the attention function that the module's original config names, and store the row if `active`."""
        # The implementation may have changed since the hook was installed, and the mask is made for the current one.
        function = registered_function(module, self._original_config._attn_implementation)
        output, weights = function(module, query, key, value, attention_mask, **kwargs)
        if self.active:
            if weights is not None and self.base.endswith(REPORTED):
                self.store_from_weights(weights)
            else:
                self.store(lambda index: attention_rows(module, query, key, attention_mask, index, **kwargs))
        return output, weights

    def _enter_mode(self, module: nn.Module, args: Any) -> None:
        if self.active:
            self._mode = AttentionFunctionMode(self._on_result, scope=lambda: None)
            self._mode.__enter__()

    def _exit_mode(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def _on_result(self, base: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        if base != self.base:
            return
        if base.startswith(SDPA):
            arguments = sdpa_arguments(args, kwargs)
            self.store(lambda index: sdpa_rows(nn.Identity(), arguments, index))
        else:
            self.store_from_weights(result)


def _register_function(base: str) -> str:
    """Register with Transformers, once, a function that runs the hook of its module; return its name.

    The name contains that of the original function, so that a probe of a model with a hook still reports the original.
    """
    from transformers import AttentionInterface

    def attention_with_hook(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        hook: Any = getattr(module, HOOK)
        return hook.run(module, query, key, value, attention_mask, **kwargs)

    name = PREFIX + base
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, attention_with_hook)
    return name
