"""Probe a model whose parameters are sharded over processes (FSDP2, ZeRO-3).

A probe calls single modules and computes gradients repeatedly, which the hooks of FSDP and DeepSpeed do not support.
Inside of `unsharded`, every process has all parameters and the hooks are removed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

SHARDING_PACKAGES = ("torch.distributed.fsdp", "deepspeed")
ZERO_ATTRIBUTE = "ds_id"  # of parameters that ZeRO-3 shards
HOOK_DICTIONARIES = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def unsharded(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a sharded model all of its parameters and none of the sharding hooks; restore both on exit.

    All processes must call this together. It may be called during a forward. A model that is not sharded is unchanged.

    Yields:
        The inputs in the parameters' precision, because the removed hooks of FSDP would convert them.
    """
    sharded = _sharded_parameter(model)
    if sharded is None:
        yield dict(inputs)
        return
    device = next((x.device for x in inputs.values() if isinstance(x, Tensor)), sharded.device)
    with ExitStack() as stack:
        stack.enter_context(_copied_parameters(model, device, sharded.dtype))
        stack.enter_context(_without_sharding_hooks(model))
        yield {
            k: v.to(sharded.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
        }


def is_sharded(model: nn.Module) -> bool:
    """Return True if each process holds a part of each parameter (FSDP2, ZeRO-3)."""
    return _sharded_parameter(model) is not None


def _sharded_parameter(model: nn.Module) -> Any:
    """Return one of the sharded parameters, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return next((p for p in model.parameters() if isinstance(p, DTensor) or hasattr(p, ZERO_ATTRIBUTE)), None)


@contextmanager
def _copied_parameters(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Replace all parameters by complete copies."""
    copies: dict[int, nn.Parameter] = {}  # by id, because modules may share a parameter
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    with _gathered(model):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in copies:
                        copies[id(parameter)] = _complete_copy(parameter, device, dtype)
                    originals.append((module, name, parameter))
    for module, name, parameter in originals:
        module._parameters[name] = copies[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in originals:
            module._parameters[name] = parameter


@contextmanager
def _without_sharding_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the forward hooks that shard and gather parameters."""
    originals: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for attribute in HOOK_DICTIONARIES:
            hooks = getattr(module, attribute)
            others = OrderedDict((k, hook) for k, hook in hooks.items() if not _is_sharding_hook(hook))
            if len(others) < len(hooks):
                originals.append((module, attribute, hooks))
                setattr(module, attribute, others)
    try:
        yield
    finally:
        for module, attribute, hooks in originals:
            setattr(module, attribute, hooks)


def _gathered(model: nn.Module) -> AbstractContextManager[Any]:
    """Gather the parameters that ZeRO-3 shards."""
    parameters = [p for p in model.parameters() if hasattr(p, ZERO_ATTRIBUTE)]
    if not parameters:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters)


def _complete_copy(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    # Without `full_tensor`, the parameter is complete already; FSDP may have gathered it in the precision of its
    # forward.
    gather = getattr(parameter, "full_tensor", None)
    values = (parameter if gather is None else gather()).detach().to(device, copy=True)
    values = values.to(dtype) if values.is_floating_point() else values
    return nn.Parameter(values, parameter.requires_grad)


def _is_sharding_hook(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(SHARDING_PACKAGES)
