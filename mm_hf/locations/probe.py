"""Find out, from one forward of an unmodified model, how its logits come about from its tokens.

Record the calls of all modules on a few examples; walk back from the logits to where the head meets the tokens; keep
the first explanation that reproduces the logits and whose gradient reaches exactly the tokens that it says are read.
No architecture is named anywhere.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import watch_attention
from .plan import ACTIVATIONS, LocationError, Plan, as_tokens, pool_rows, pool_tokens, pooled_logits

PROBE_EXAMPLES = 4
PREFIX_PARAMETERS = ("cls_token", "distillation_token", "dist_token", "register_tokens", "class_embedding")
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
SUPPORTED = (
    "MultiMix trains classification models (AutoModelFor...Classification), whose logits have the shape (batch, labels)"
)


@dataclass
class Call:
    """One call of a module: its first tensor argument, its tensor results, and when it began and ended."""

    name: str
    began: int
    ended: int
    argument: Tensor | None
    results: dict[str | int | None, Tensor]


@dataclass
class Recording:
    """What one forward on a few examples showed."""

    model: nn.Module
    inputs: dict[str, Any]
    logits: Tensor
    calls: list[Call]
    attention_calls: list[tuple[nn.Module, str, int, int]]


def probe(model: nn.Module, inputs: Mapping[str, Any], processing_class: Any = None) -> Plan:
    """The plan of a model, from a batch as it comes from the data loader (labels are not looked at).

    Nothing of it remains: no hook, no change of mode or flags, no draw from the random generators.

    Args:
        model: A Transformers classification model, also under PEFT.
        inputs: Keyword arguments of its forward.
        processing_class: The tokenizer, which knows the special tokens that the model's config may not name.

    Raises:
        LocationError: The model's logits cannot be explained by its tokens; the message says what was seen.
    """
    nearest: tuple[float, str] = (float("inf"), "nothing that its head reads was seen to come from tokens")
    with torch.inference_mode(False), torch.enable_grad():
        recording = record(model, inputs)
        check_head(recording)
        for guess in _explanations(recording):
            for plan, tokens in _pools(recording, guess):
                error = _identity_error(recording, plan, tokens)
                if error <= _tolerance(recording.logits):
                    return _with_attention(recording, _with_special_ids(recording, plan, processing_class), tokens)
                nearest = min(nearest, (error, f"the nearest miss is off by {error:.1e} (relative):\n{plan}"))
    raise LocationError(
        f"{type(model).__name__} gives no per-location logits: {nearest[1]}\n"
        "MultiMix() needs the logits only and works with this model."
    )


def record(model: nn.Module, inputs: Mapping[str, Any]) -> Recording:
    """Run one forward on a few examples in evaluation mode and keep what the modules took and gave."""
    inputs = _few_examples({k: v for k, v in inputs.items() if k not in ("labels", "num_items_in_batch")})
    calls: list[Call] = []
    running: list[int] = []
    clock = itertools.count()

    def before(*_: Any) -> None:
        running.append(next(clock))

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            argument = next((x for x in (*args, *kwargs.values()) if _is_features(x)), None)
            calls.append(Call(name, running.pop(), next(clock), argument, _tensors(output)))

        return hook

    handles: list[Any] = []
    try:
        with _traceless(model), watch_attention() as attention_calls:
            for name, module in model.named_modules():
                if name:
                    handles.append(module.register_forward_pre_hook(before))
                    handles.append(module.register_forward_hook(after(name), with_kwargs=True))
            output = plain_call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(output, "logits", None)
    batch = next(len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 0)
    if logits is None or logits.ndim != 2 or len(logits) != batch:
        shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise LocationError(f"{type(model).__name__} returns {shape} for {batch} examples. {SUPPORTED}.")
    return Recording(model, inputs, logits, calls, attention_calls)


def plain_call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's own forward: not one that was put in its place, with autocast (accelerate) or mixing."""
    forward = functools.partial(type(model).forward, model) if "forward" in model.__dict__ else model
    return forward(**inputs, return_dict=True)


def check_head(recording: Recording) -> None:
    """Raise a LocationError unless the logits leave an affine layer, as all that MultiMix does rests on it."""
    name = type(recording.model).__name__
    logits = recording.logits
    last_steps = [c for c in recording.calls if _has(c, logits)]
    for call in last_steps:
        if call.argument is not None and _is_affine(recording, call):
            return
    for call in recording.calls:
        for result in call.results.values():
            for label, activation in ACTIVATIONS.items():
                if result.shape == logits.shape and _same(activation(result), logits):
                    raise LocationError(
                        f"The head of {name} does not end in a linear layer: its logits are {label} of what leaves "
                        f"{call.name!r}. Interpolating features is interpolating logits for a linear layer only."
                    )
    for call in recording.calls:  # a head applied to every token, whose logits are picked or averaged afterwards
        scored = call.results.get(None)
        if (
            scored is not None
            and scored.ndim == 3
            and scored.shape[::2] == logits.shape
            and _is_affine(recording, call)
        ):
            return
    seen = f"they leave {last_steps[-1].name!r}, which is not linear" if last_steps else "they leave no module"
    raise LocationError(
        f"The head of {name} does not end in a linear layer that computes its logits: {seen}. Interpolating features "
        "is interpolating logits for a linear layer only."
    )


def _is_affine(recording: Recording, call: Call) -> bool:
    """Whether the halfway point of two arguments gives the halfway point of the results."""
    x = call.argument
    if x is None or call.name == "" or not x.is_floating_point() or x.data_ptr() in _input_pointers(recording):
        return False
    module = recording.model.get_submodule(call.name)
    if not any(True for _ in module.parameters()):
        return False
    other = 3 * x.flip(0) + x.std()
    with _traceless(recording.model), torch.no_grad():
        try:
            ends, middle = (module(x) + module(other)) / 2, module((x + other) / 2)
        except Exception:  # a module that needs more arguments is no last layer
            return False
    return isinstance(ends, Tensor) and _same(ends, middle, 100 * _tolerance(ends))


def _explanations(recording: Recording) -> Iterator[Plan]:
    """Ways in which the logits may have come about, outermost modules first; `pool` is "" where it is still open."""
    model = recording.model
    prefix = _prefix_length(model)
    inputs = _input_pointers(recording)
    empty = Plan(type(model).__name__, "", "", None, "", (), "vector", prefix, False, (), None, None, None)

    def walk(target: Tensor, before: float, chain: tuple[str, ...], depth: int) -> Iterator[Plan]:
        earlier = [c for c in recording.calls if c.ended < before]
        made: list[tuple[Call, tuple[str, ...]]] = [(c, ()) for c in reversed(earlier) if _has(c, target)]
        if not made:
            made = [
                (c, (name,)) for c in reversed(earlier) for name, act in ACTIVATIONS.items() if _has(c, target, act)
            ]
        for call, activation in made if depth < 16 else []:
            x = call.argument
            if x is None or x.data_ptr() in inputs:
                continue
            steps = (call.name, *activation, *chain)
            if _is_vector(x):
                yield from walk(x.flatten(1), call.began, steps, depth + 1)
            elif x.ndim in (3, 4):
                feed = "sequence" if x.ndim == 3 else "map"
                yield replace(empty, source=call.name, side="input", chain=steps, feed=feed)
        for call in sorted(earlier, key=lambda c: (c.name.count("."), -c.ended)):
            for key, x in call.results.items():
                if x.ndim in (3, 4) and not _is_vector(x):
                    for pool in _pool_names(recording, as_tokens(x), prefix):
                        pooled = pool_tokens(as_tokens(x), pool, attended_mask(recording.inputs, as_tokens(x).shape[1]))
                        if pooled.shape == target.shape and _same(pooled, target):
                            yield replace(empty, source=call.name, side="output", key=key, pool=pool, chain=chain)

    yield from walk(recording.logits, math.inf, (), 0)


def _pools(recording: Recording, guess: Plan) -> Iterator[tuple[Plan, Tensor]]:
    """The guess with each pool whose tokens are exactly those that the logits depend on, and these tokens."""
    source = _source(recording, guess)
    if not source.requires_grad:
        return
    weights = torch.linspace(1, 2, recording.logits.numel(), device=source.device, dtype=recording.logits.dtype)
    total = (recording.logits * weights.view_as(recording.logits)).sum()
    (gradient,) = torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)
    if gradient is None:
        return
    tokens, read = as_tokens(source.detach()), as_tokens(gradient).ne(0).any(dim=-1)
    n = tokens.shape[1]
    attended = attended_mask(recording.inputs, n)
    text = any(_length(recording.inputs.get(k)) == n for k in ("input_ids", "inputs_embeds"))
    names = (guess.pool,) if guess.pool else _pool_names(recording, tokens, guess.prefix)
    for pool in names:
        # A token may be read and still have no gradient (a saturated or dead unit), but none may be read in secret.
        rows = pool_rows(tokens, pool, attended)
        if not (read & ~rows).any() and (read.sum() >= 0.9 * rows.sum()):
            yield replace(guess, pool=pool, text=text, prefix=0 if text else guess.prefix), tokens


def _pool_names(recording: Recording, tokens: Tensor, prefix: int) -> tuple[str, ...]:
    """Pools that may be, the likeliest first."""
    masked = attended_mask(recording.inputs, tokens.shape[1]) is not None
    names = ["token[0]", *(["token[last]", "mean[mask]"] if masked else ["token[-1]"]), "mean[0:]"]
    if prefix:
        names += [f"mean[{prefix}:]", f"token[0]|mean[{prefix}:]"]
        names += [f"token[0]|mean[{k}:]" for k in (1,) if k != prefix]
    return tuple(names)


def _identity_error(recording: Recording, plan: Plan, tokens: Tensor) -> float:
    """How far, relatively, the plan's own way to the logits ends from the model's."""
    attended = attended_mask(recording.inputs, tokens.shape[1])
    with _traceless(recording.model), torch.no_grad():
        try:
            logits = pooled_logits(recording.model, plan, tokens, attended)
        except Exception:  # a module that cannot take one token: not a way to per-location logits
            return float("inf")
    if logits.shape != recording.logits.shape or not logits.isfinite().all():
        return float("inf")
    return relative_error(logits, recording.logits)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors relative to the larger one's largest entry."""
    a, b = a.detach(), b.detach()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-12)
    return float((a.double() - b.double()).abs().max()) / scale


def _with_special_ids(recording: Recording, plan: Plan, processing_class: Any) -> Plan:
    if not plan.text:
        return plan
    config = recording.model.config
    ids = {getattr(config, name, None) for name in SPECIAL_IDS} | set(getattr(processing_class, "all_special_ids", ()))
    return replace(plan, special_ids=tuple(sorted(i for i in ids if isinstance(i, int))))


def _with_attention(recording: Recording, plan: Plan, tokens: Tensor) -> Plan:
    """The last self-attention over as many tokens as the head meets, and whose attention is the head's."""
    names = {module: name for name, module in recording.model.named_modules()}
    n = tokens.shape[1]
    found = [(m, base) for m, base, queries, keys in recording.attention_calls if queries == keys == n]
    query: int | str | None = None
    if plan.pool.startswith("token[0]") or (plan.prefix and plan.pool.startswith("mean")):
        query = 0
    elif plan.pool in ("token[-1]", "token[last]"):
        query = "last"
    if not found or found[-1][0] not in names or not hasattr(found[-1][0], "config"):
        return plan
    module, base = found[-1]
    return replace(plan, attention=names[module], attention_base=base, query=query)


def _source(recording: Recording, plan: Plan) -> Tensor:
    call = next(c for c in reversed(recording.calls) if c.name == plan.source)
    source = call.argument if plan.side == "input" else call.results[plan.key]
    assert source is not None
    return source


def _prefix_length(model: nn.Module) -> int:
    """Number of tokens that the model puts before those of its input, told by its parameters."""
    named = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in PREFIX_PARAMETERS]
    return sum(p.shape[-2] if p.ndim > 1 else 1 for p in named)


def attended_mask(inputs: Mapping[str, Any], n: int) -> Tensor | None:
    """The padding mask (b, n), if the inputs have one for n tokens."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape[1:] == (n,):
        return mask.bool()
    ids = inputs.get("input_ids")
    return torch.ones_like(ids, dtype=torch.bool) if isinstance(ids, Tensor) and ids.shape[1:] == (n,) else None


def _few_examples(inputs: dict[str, Any]) -> dict[str, Any]:
    batch = next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 0), None)
    if batch is None:
        raise ValueError(f"The inputs {sorted(inputs)} hold no tensor to probe the model with.")
    # Cloned: tensors made in inference mode take no part in a backward pass.
    return {
        k: v[:PROBE_EXAMPLES].clone() if isinstance(v, Tensor) and v.ndim > 0 and len(v) == batch else v
        for k, v in inputs.items()
    }


@contextmanager
def _traceless(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, float arithmetic and gradients also for frozen weights, and everything as it was afterwards."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False), torch.enable_grad():
            for module in modes:
                module.training = False
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(False)


def _tensors(output: Any) -> dict[str | int | None, Tensor]:
    """Floating tensors of a module's output by field or index; None for an output that is a tensor itself."""
    if isinstance(output, Tensor):
        items: list[tuple[Any, Any]] = [(None, output)]
    elif isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    else:
        items = []
    return {k: v for k, v in items if _is_features(v)}


def _is_features(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and 2 <= x.ndim <= 4


def _is_vector(x: Tensor) -> bool:
    """One vector an example, with or without dimensions of size 1 for a single token or pixel."""
    return x.ndim == 2 or (x.ndim == 3 and x.shape[1] == 1) or (x.ndim == 4 and x.shape[2:] == (1, 1))


def _has(call: Call, target: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> bool:
    """Whether a module's one result is `target`, a vector an example (through an activation)."""
    result = call.results.get(None)
    if result is None or not _is_vector(result) or result.numel() != target.numel():
        return False
    result = result.flatten(1)
    return _same(result if activation is None else activation(result), target)


def _same(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    return a.shape == b.shape and relative_error(a, b) <= (_tolerance(a) if tolerance is None else tolerance)


def _tolerance(x: Tensor) -> float:
    return 1e-5 if x.dtype in (torch.float32, torch.float64) else 2e-2


def _length(x: Any) -> int | None:
    return x.shape[1] if isinstance(x, Tensor) and x.ndim >= 2 else None


def _input_pointers(recording: Recording) -> set[int]:
    return {v.data_ptr() for v in recording.inputs.values() if isinstance(v, Tensor)}
