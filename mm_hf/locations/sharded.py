"""A look at a model whose parameters are sharded over processes: for its duration, the whole model is everywhere.

The probe calls single modules and asks for gradients more than once, which the hooks of FSDP and DeepSpeed do not allow for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

SHARDING = ("torch.distributed.fsdp", "deepspeed")
ZERO = "ds_id"  # an attribute of the parameters that ZeRO-3 shards
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def unsharded(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a model sharded by FSDP2 or ZeRO-3 all of its parameters and none of their hooks; all processes have to call this.

    What is sharded is untouched and in its place again afterwards, be it in the middle of a forward or outside of one. A
    model that is not sharded is left as it is.

    Yields:
        The inputs, in the parameters' precision: FSDP would convert them in its hooks.
    """
    sharded = _sharded(model)
    if sharded is None:
        yield dict(inputs)
        return
    device = next((x.device for x in inputs.values() if isinstance(x, Tensor)), sharded.device)
    copies: dict[int, nn.Parameter] = {}  # a parameter may be in several modules
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    hooks: list[tuple[nn.Module, str, Any]] = []
    with _gathered(model):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in copies:
                        copies[id(parameter)] = _copy(parameter, device, sharded.dtype)
                    places.append((module, name, parameter))
    for module in model.modules():
        for kind in HOOKS:
            known = getattr(module, kind)
            others = OrderedDict((k, hook) for k, hook in known.items() if not _of_sharding(hook))
            if len(others) < len(known):
                hooks.append((module, kind, known))
                setattr(module, kind, others)
    for module, name, parameter in places:
        module._parameters[name] = copies[id(parameter)]
    try:
        yield {
            k: v.to(sharded.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
        }
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
        for module, kind, known in hooks:
            setattr(module, kind, known)


def is_sharded(model: nn.Module) -> bool:
    """Whether modules are run by all processes together, which hold a part of the parameters each (FSDP2, ZeRO-3)."""
    return _sharded(model) is not None


def _sharded(model: nn.Module) -> Any:
    """One of the sharded parameters, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return next((p for p in model.parameters() if isinstance(p, DTensor) or hasattr(p, ZERO)), None)


def _gathered(model: nn.Module) -> AbstractContextManager[Any]:
    """What ZeRO-3 has sharded is whole inside."""
    parameters = [p for p in model.parameters() if hasattr(p, ZERO)]
    if not parameters:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters)


def _copy(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    gather = getattr(
        parameter, "full_tensor", None
    )  # else it is gathered already, by FSDP in the precision of its forward
    values = (parameter if gather is None else gather()).detach().to(device, copy=True)
    values = values.to(dtype) if values.is_floating_point() else values
    return nn.Parameter(values, parameter.requires_grad)


def _of_sharding(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(SHARDING)
