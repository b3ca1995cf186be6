"""Attributes and hooks on a user's modules, which copies and pickles of these modules lack.

`copy`, `pickle`, `torch.save(model)` and multiprocessing all ask an object for its `__getstate__`. A module that has
something of ours gets one as an attribute, and it returns the state of the plain module.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

PREFIX = "mm_hf_"  # of all attributes
GETSTATE = "__getstate__"
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOK_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
REPLACED_FORWARD = "mm_hf_original"  # attribute of a function that replaces a module's forward
FORWARDS = ("forward", "_original_forward")  # the second one is Accelerate's


class ModuleHooks:
    """Base class of objects whose methods are hooks of modules."""


def attach(module: nn.Module, **attributes: Any) -> None:
    """Set attributes of a module. Copies and pickles of the module lack them and all hooks of `ModuleHooks`.

    Example:
        >>> import copy
        >>> module = nn.Linear(2, 2)
        >>> attach(module, mm_hf_note="seen")
        >>> "mm_hf_note" in vars(module), "mm_hf_note" in vars(copy.deepcopy(module))
        (True, False)
    """
    module.__dict__.update(attributes)
    module.__dict__[GETSTATE] = types.MethodType(plain_state, module)


def detach(module: nn.Module, *names: str) -> None:
    """Delete attributes, and the module's `__getstate__` once nothing of ours is left."""
    for name in names:
        module.__dict__.pop(name, None)
    if not any(name.startswith(PREFIX) for name in module.__dict__) and not _hook_ids(module):
        module.__dict__.pop(GETSTATE, None)


def plain_state(module: nn.Module) -> Any:
    """Return the state of a module for copies and pickles, without what is attached to it."""
    own = getattr(type(module), GETSTATE, None)
    state = dict(module.__dict__) if own is getattr(object, GETSTATE, None) else own(module)  # type: ignore[misc]
    if not isinstance(state, dict):
        return state
    hooks = _hook_ids(module)
    dropped = {GETSTATE, *(name for name in state if name.startswith(PREFIX))}
    if is_replaced(state.get("forward")):  # else Accelerate's wrapper, around a forward that a copy runs unchanged
        dropped.update(FORWARDS)
    state = {name: value for name, value in state.items() if name not in dropped}
    for name in {*HOOKS, *HOOK_OPTIONS} & state.keys():
        state[name] = type(state[name])((key, hook) for key, hook in state[name].items() if key not in hooks)
    return state


def is_replaced(forward: Any) -> bool:
    """Return True for a forward that replaces that of a module's class, as the wrapping does."""
    return hasattr(getattr(forward, "__func__", None), REPLACED_FORWARD)


def _hook_ids(module: nn.Module) -> set[int]:
    hooks = [pair for name in HOOKS for pair in module.__dict__[name].items()]
    return {key for key, hook in hooks if isinstance(getattr(hook, "__self__", None), ModuleHooks)}
