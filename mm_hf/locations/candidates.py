"""Candidates for the plan of a model, traced back from its logits in one recorded forward."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .head import averaged_heads, location_scorers
from .modes import probing_mode
from .plan import ACTIVATIONS, EVERY, REGISTERED, Plan, as_tokens, pooled_logits
from .pools import MASKS, MODULE_POOL, pool_rows, pool_tokens
from .probe_inputs import config_of, pad_id
from .recording import Call, Recording, is_vector
from .registry import registrations
from .tolerance import is_close, within_rounding

LAYOUTS = {3: ("sequence", "channels"), 4: ("map", "grid"), 5: ("map", "grid")}
MAX_DEPTH = 16  # modules between the pooled vector and the logits
MAX_VISITS = 4  # ways back through one call; each identity, such as dropout in evaluation, doubles their number
MIN_READ = 0.9  # share of a pool's tokens that must have a gradient: saturated or dead units have none


def candidates(recording: Recording) -> Iterator[Plan]:
    """Yield plans that may explain the logits, with the outermost modules first; `pool` is "" if it is still open."""
    model = recording.model
    empty = Plan(type(model).__name__, "", "", None, "", "", ())
    yield from _registered_candidates(recording, empty)
    if recording.logits.ndim > 2:
        yield _every_location(recording, empty)
        return
    yield from _trace_back(recording, empty, Counter(), recording.logits, math.inf, (), 0)
    for a, b in averaged_heads(recording):
        yield from _two_heads(recording, empty, a, b)
    yield from _module_pools(recording, empty)


def _registered_candidates(recording: Recording, empty: Plan) -> Iterator[Plan]:
    """Yield plans of the registered mechanisms whose source the model has."""
    for known in registrations():
        for name in dict.fromkeys(call.name for call in recording.calls):
            plan = replace(
                empty, source=name, side=known.side, key=known.key, layout=known.layout, pool=REGISTERED,
                chain=(known.name,), prefix=known.prefix, query=known.query,
            )  # fmt: skip
            tokens = source_of(recording, plan) if f".{name}".endswith(f".{known.source}") else None
            if tokens is not None and known.layout in LAYOUTS.get(tokens.ndim, ()):
                yield plan


def _every_location(recording: Recording, empty: Plan) -> Plan:
    """Return the plan of a model that labels every location: its source is the last affine layer."""
    scorer = next(location_scorers(recording))
    layout = "sequence" if recording.logits.ndim == 3 else "map"
    return replace(empty, source=scorer.name, side="output", layout=layout, pool=EVERY)


def _two_heads(recording: Recording, empty: Plan, a: Call, b: Call) -> Iterator[Plan]:
    """Yield plans for logits that are the mean of the results of two heads with the same source."""
    # Each head is traced by itself, because the gradient of the mean does not show which head reads which token.
    plans = [
        [
            plan
            for candidate in _trace_call(recording, empty, Counter(), head, (head.name,), 0)
            for plan, _ in with_pools(recording, candidate, head)
        ]
        for head in (a, b)
    ]
    for one, other in itertools.product(*plans):
        same_source = (one.source, one.side, one.key, one.layout) == (other.source, other.side, other.key, other.layout)
        if same_source and len(one.chain) == len(other.chain):
            pool = one.pool if one.pool == other.pool else f"{one.pool}+{other.pool}"
            chain = tuple(x if x == y else f"{x}+{y}" for x, y in zip(one.chain, other.chain))
            yield replace(one, pool=pool, chain=chain)


def _module_pools(recording: Recording, empty: Plan) -> Iterator[Plan]:
    """Yield plans whose first module pools the tokens itself, those with the fewest calls inside of it first."""

    def calls_inside(plan: Plan) -> int:
        return sum(f"{call.name}.".startswith(f"{plan.source}.") for call in recording.calls)

    traced = _trace_back(recording, empty, Counter(), recording.logits, math.inf, (), 0)
    plans = dict.fromkeys(replace(plan, pool=MODULE_POOL) for plan in traced if not plan.pool)
    yield from (plan for plan in sorted(plans, key=calls_inside) if _is_pool(recording, plan))


def _is_pool(recording: Recording, plan: Plan) -> bool:
    """Return True if the order of the tokens does not matter, and copies of a token give what the token gives."""
    source = source_of(recording, plan)
    if source is None:
        return False
    tokens = as_tokens(source.detach(), plan.layout)
    n = tokens.shape[1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    pairs = [(tokens[:, order], tokens)]
    pairs += [(token.expand(-1, n, -1), token) for token in (tokens[:, :1], tokens[:, -1:])]
    with probing_mode(recording.model), torch.no_grad():
        try:
            logits = [[pooled_logits(recording.model, plan, x, {}) for x in pair] for pair in pairs]
        except Exception:  # A module that does not accept another number of tokens is no pool.
            return False
    return all(is_close(a, b) for a, b in logits)


def _trace_back(
    recording: Recording,
    empty: Plan,
    visits: Counter[int],
    target: Tensor,
    before: float,
    chain: tuple[str, ...],
    depth: int,
) -> Iterator[Plan]:
    """Yield plans for one vector per example that existed at some time and goes through `chain` afterwards.

    Args:
        recording: The recorded forward.
        empty: A plan with the fields that all candidates share.
        visits: Number of visits of each call, by its beginning, which bounds the search.
        target: (b, d), or with further dimensions of size 1.
        before: Time at which the vector existed, as in `Call.ended`.
        chain: Steps from the vector to the logits.
        depth: Number of modules in the chain.
    """
    flat = target.flatten(1)
    earlier = [c for c in recording.calls if c.ended < before]
    for call, steps in _calls_that_return(flat, earlier) if depth < MAX_DEPTH else []:
        reshaped = ("flatten",) if target.ndim == 2 and call.result is not None and call.result.ndim > 2 else ()
        yield from _trace_call(recording, empty, visits, call, (call.name, *steps, *reshaped, *chain), depth)
    for call in sorted(earlier, key=lambda c: (c.name.count("."), -c.ended)):
        for key, x in call.results.items():
            scores_tokens = flat.shape[1] == 1 and x.ndim == 3 and x.shape[1] > 1 == x.shape[2]  # one label per token
            for layout in LAYOUTS.get(x.ndim, ()) if scores_tokens or not is_vector(x) else ():
                tokens = as_tokens(x, layout)
                if chain and tokens.shape[-1] not in (flat.shape[-1], flat.shape[-1] // 2):
                    continue
                for pool in _pool_names(recording, tokens):
                    pooled = pool_tokens(tokens, pool, recording.inputs)
                    if pooled.shape == flat.shape and is_close(pooled, flat):
                        yield replace(
                            empty, source=call.name, side="output", key=key, layout=layout, pool=pool, chain=chain
                        )


def _calls_that_return(target: Tensor, calls: list[Call]) -> list[tuple[Call, tuple[str, ...]]]:
    """Return the calls that return `target` (b, d), with the step that follows: none, an activation or a scale."""
    # The most exact calls come first, because small numbers are nearly equal to their tanh.
    exact = sorted(
        (
            (error, call, () if name is None else (name,))
            for call in reversed(calls)
            for name, activation in ((None, None), *ACTIVATIONS.items())
            if within_rounding(error := call.error(target, activation), target.dtype)
        ),
        key=lambda triple: triple[0],
    )
    if exact:
        return [(call, steps) for _, call, steps in exact]
    return [(c, (f"scale[{scale}]",)) for c in reversed(calls) if (scale := c.scale_to(target)) is not None]


def _trace_call(
    recording: Recording, empty: Plan, visits: Counter[int], call: Call, chain: tuple[str, ...], depth: int
) -> Iterator[Plan]:
    """Yield plans for the argument of a module call, which is the tokens or one vector per example."""
    x = call.argument
    visits[call.began] += 1
    if x is None or x.data_ptr() in recording.input_pointers or visits[call.began] > MAX_VISITS:
        return
    if is_vector(x):
        yield from _trace_back(recording, empty, visits, x, call.began, chain, depth + 1)
    else:
        for layout in LAYOUTS.get(x.ndim, ()):
            yield replace(empty, source=call.name, side="input", layout=layout, chain=chain)


def with_pools(recording: Recording, candidate: Plan, head: Call | None = None) -> Iterator[tuple[Plan, Tensor]]:
    """Yield the candidate with each pool that reads exactly the tokens that the logits depend on, and the tokens.

    Args:
        recording: The recorded forward.
        candidate: A plan; if it names a pool, only this one is checked.
        head: One of two averaged heads, whose logits count. Default: the model's logits.
    """
    source = source_of(recording, candidate)
    if source is None or not source.requires_grad:
        return
    tokens = as_tokens(source.detach(), candidate.layout)
    n = tokens.shape[1]
    text = any(_length(recording.inputs.get(k)) == n for k in ("input_ids", "inputs_embeds"))
    if candidate.pool in (EVERY, REGISTERED):
        yield replace(candidate, text=text), tokens
        return
    plan = replace(candidate, text=text, prefix=0 if text else recording.prefix_length(n))
    if plan.prefix == n:  # no locations
        return
    logits = recording.logits if head is None else head.results[None]
    weights = torch.linspace(1, 2, logits.numel(), device=source.device, dtype=logits.dtype)
    total = (logits * weights.view_as(logits)).sum()
    (gradient,) = torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)
    if gradient is None:
        return
    has_gradient = as_tokens(gradient, candidate.layout).ne(0).any(dim=-1)
    names = (candidate.pool,) if candidate.pool else _pool_names(recording, tokens)
    for pool in names:
        rows = pool_rows(tokens, pool, recording.inputs)
        # No token outside of the pool may have a gradient. Tokens set to zero have one although they are not read.
        outside = bool((has_gradient & ~rows).any()) and pool != "mean[nonzero]"
        some = pool.startswith(("max", MODULE_POOL))  # a maximum reads some of the tokens
        read = some or (has_gradient & rows).sum() >= MIN_READ * rows.sum()
        if not outside and read:
            # The token that the head reads is no location, even if it belongs to the input.
            first = int(pool.startswith("token[0]") and not text)
            yield replace(plan, pool=pool, prefix=max(plan.prefix, first)), tokens


def _pool_names(recording: Recording, tokens: Tensor) -> tuple[str, ...]:
    """Return the pools that are possible for tokens (b, n, d), the most likely ones first."""
    inputs, shape = recording.inputs, tokens.shape[:2]
    prefix = recording.prefix_length(shape[1])
    names = ["token[0]"]
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.shape == shape:
        pad = pad_id(recording.model)
        names += [] if pad is None else [f"token[last!={pad}]", f"token[after!={pad}]"]
        eos = getattr(config_of(recording.model), "eos_token_id", None)
        names += [f"token[last=={i}]" for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)]
    masked = any(isinstance(inputs.get(name), Tensor) and inputs[name].shape == shape for name in MASKS)
    names += ["token[last]", "mean[mask]"] if masked else []
    names += ["token[-1]", "mean[0:]", "mean[nonzero]"]
    if prefix:
        names += [f"mean[{prefix}:]", f"token[0]|mean[{prefix}:]", f"mean[:{prefix}]"]
        names += ["token[1]", "token[0]|mean[1:]"] if prefix > 1 else []
    return (*names, *(f"{kind}[{start}:]" for kind in ("max", "avgmax") for start in sorted({0, prefix})))


def source_of(recording: Recording, plan: Plan) -> Tensor | None:
    """Return the tensor at the plan's source, from the last call of its module, or None."""
    call = next((c for c in reversed(recording.calls) if c.name == plan.source), None)
    if call is None:
        return None
    return call.argument if plan.side == "input" else call.results.get(plan.key)


def _length(x: Any) -> int | None:
    return x.shape[1] if isinstance(x, Tensor) and x.ndim >= 2 else None
