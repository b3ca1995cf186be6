"""Find the plan of a model in one recorded forward.

From the logits, trace the recorded calls back to where the head takes the tokens. Each way back is a candidate plan.
The first candidate is taken that reproduces the logits and whose pool reads exactly the tokens that the logits depend
on, as their gradient shows. No architecture is named.

    probe
      record, check_head                   one forward; the head ends in a linear layer
      _candidates                          registered mechanisms, then plans traced back from the logits
        _trace_back <-> _trace_call        from a vector to the calls that return it, and from a call to its argument
      _with_pools                          each pool that reads the tokens with a gradient
      _plan_error                          the plan's logits against the model's
      with_attention                       attention/selection.py
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention.selection import with_attention
from .head import averaged_heads, check_head, location_scorers
from .modes import nonzero_head_weights, probing_mode
from .plan import ACTIVATIONS, EVERY, REGISTERED, LocationError, Plan, as_tokens, pooled_logits
from .pools import MASKS, MODULE_POOL, pool_rows, pool_tokens
from .probe_inputs import pad_id
from .recording import Call, Recording, is_vector, record
from .registry import is_registered, registrations
from .tolerance import is_close, relative_error, within_rounding

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
LAYOUTS = {3: ("sequence", "channels"), 4: ("map", "grid"), 5: ("map", "grid")}
MAX_DEPTH = 16  # modules between the pooled vector and the logits
MAX_VISITS = 4  # ways back through one call; each identity, such as dropout in evaluation, doubles their number
MIN_READ = 0.9  # share of a pool's tokens that must have a gradient: saturated or dead units have none
REGISTER_HELP = """To support it, register its tokens and two functions (see mm_hf.locations.registry):
    from mm_hf import locations
    def score(model, tokens):   # (batch, locations, features) -> the logits of each location by itself
        ...
    def pooled(model, tokens):  # all tokens -> the model's own logits
        ...
    locations.register("my head", source="name of the module", score=score, pooled=pooled)"""


def probe(model: nn.Module, inputs: Mapping[str, Any], processing_class: Any = None, plan: Plan | None = None) -> Plan:
    """Find the plan of a model from a batch as the data loader returns it.

    The model, its hooks and modes, and the random state are unchanged afterwards. Labels are ignored.

    Args:
        model: A Transformers classification model, with or without PEFT.
        inputs: Keyword arguments of its forward.
        processing_class: The tokenizer, for special tokens that the model's config does not name.
        plan: A plan of another process or a checkpoint, which is verified instead of a search.

    Returns:
        The plan. It reproduces the model's logits on the batch.

    Raises:
        LocationError: No plan explains the model's logits, or `plan` does not fit; the message says what was found.
    """
    without_autocast = torch.autocast(next(model.parameters()).device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), without_autocast, nonzero_head_weights(model):
        recording = record(model, inputs)
        check_head(recording)
        if plan is not None:
            return _verify(recording, plan)
        rejected: list[tuple[float, Plan]] = []
        for candidate in _candidates(recording):
            for pooled, tokens in _with_pools(recording, candidate):
                error = _plan_error(recording, pooled, tokens)
                if within_rounding(error, recording.logits.dtype):
                    return _complete(recording, pooled, tokens, processing_class)
                rejected.append((error, pooled))
    raise LocationError(_describe_failure(recording, rejected))


def _describe_failure(recording: Recording, rejected: list[tuple[float, Plan]]) -> str:
    name, calls = type(recording.model).__name__, recording.attention_calls
    reason, nearest = ": nothing that its head reads was found to come from tokens", ""
    if calls and any(calls[-1].queries < calls[-1].keys == call.queries < call.keys for call in calls):
        reason = f": its head reads {calls[-1].keys} latents, which attend to all tokens"
    elif rejected:
        error, plan = min(rejected, key=lambda pair: pair[0])
        reason, nearest = "", f" The nearest one misses its logits by {error:.1e} (relative):\n{plan}"
    return (
        f"{name} gives no per-location logits{reason}.\n"
        "A head that scores every token, a head or pooler that takes the sequence, a pooled vector, two averaged heads "
        f"and a module that pools the tokens were tried: {len(rejected)} candidates in all.{nearest}\n"
        f"MultiMix() needs the logits only and works with this model. {REGISTER_HELP}"
    )


def _complete(recording: Recording, plan: Plan, tokens: Tensor, processing_class: Any) -> Plan:
    """Add the special tokens and the attention to a plan that reproduces the logits."""
    plan = _with_special_ids(recording, plan, processing_class)
    return with_attention(recording, plan, tokens.shape[1])


def _verify(recording: Recording, plan: Plan) -> Plan:
    """Return the plan if each of its fields fits the model; raise a LocationError that names the first one if not."""
    name = type(recording.model).__name__
    if _source(recording, plan) is None:
        raise LocationError(
            f"The plan does not fit {name}: it has, or calls, no module {plan.source!r} with such an "
            f"{plan.side}.\n{plan}"
        )
    candidate: Plan | None
    if plan.pool == REGISTERED and not is_registered(*plan.chain):
        raise LocationError(
            f"The plan of {name} uses a mechanism that is not registered in this process: call "
            f"mm_hf.locations.register({plan.chain[0]!r}, ...) first.\n{plan}"
        )
    if plan.pool in (EVERY, REGISTERED):
        candidate = next((c for c in _candidates(recording) if (c.pool, c.chain) == (plan.pool, plan.chain)), None)
    else:
        candidate = replace(plan, attention=None, attention_base=None, query=None)
    pooled, tokens = next(_with_pools(recording, candidate), (None, None)) if candidate else (None, None)
    if pooled is None or tokens is None:
        raise LocationError(
            f"The plan does not fit {name}: the tokens that its logits depend on are not those of the pool "
            f"{plan.pool!r}.\n{plan}"
        )
    error = _plan_error(recording, pooled, tokens)
    if not within_rounding(error, recording.logits.dtype):
        raise LocationError(f"The plan does not fit {name}: it misses its logits by {error:.1e} (relative).\n{plan}")
    found = _complete(recording, pooled, tokens, None)
    found = replace(found, special_ids=plan.special_ids, model_class=plan.model_class)
    for field in fields(Plan):
        given, expected = getattr(plan, field.name), getattr(found, field.name)
        if given != expected:
            raise LocationError(
                f"The plan does not fit {name}: it has {field.name}={given!r}, but the model has {expected!r}. Omit "
                f"the plan to probe the model again.\n{plan}"
            )
    return plan


def _candidates(recording: Recording) -> Iterator[Plan]:
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
            tokens = _source(recording, plan) if f".{name}".endswith(f".{known.source}") else None
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
            for plan, _ in _with_pools(recording, candidate, head)
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
    source = _source(recording, plan)
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
            for layout in LAYOUTS.get(x.ndim, ()) if not is_vector(x) else ():
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


def _with_pools(recording: Recording, candidate: Plan, head: Call | None = None) -> Iterator[tuple[Plan, Tensor]]:
    """Yield the candidate with each pool that reads exactly the tokens that the logits depend on, and the tokens.

    Args:
        recording: The recorded forward.
        candidate: A plan; if it names a pool, only this one is checked.
        head: One of two averaged heads, whose logits count. Default: the model's logits.
    """
    source = _source(recording, candidate)
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
        eos = getattr(recording.model.config, "eos_token_id", None)
        names += [f"token[last=={i}]" for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)]
    masked = any(isinstance(inputs.get(name), Tensor) and inputs[name].shape == shape for name in MASKS)
    names += ["token[last]", "mean[mask]"] if masked else []
    names += ["token[-1]", "mean[0:]", "mean[nonzero]"]
    if prefix:
        names += [f"mean[{prefix}:]", f"token[0]|mean[{prefix}:]", f"mean[:{prefix}]"]
        names += ["token[1]", "token[0]|mean[1:]"] if prefix > 1 else []
    return (*names, *(f"{kind}[{start}:]" for kind in ("max", "avgmax") for start in sorted({0, prefix})))


def _plan_error(recording: Recording, plan: Plan, tokens: Tensor) -> float:
    """Return the relative error of the plan's logits against the model's; infinity if they cannot be computed."""
    if plan.pool == EVERY:
        return 0.0
    with probing_mode(recording.model), torch.no_grad():
        try:
            logits = pooled_logits(recording.model, plan, tokens, recording.inputs)
        except Exception:  # A module that does not accept one token cannot give per-location logits.
            return math.inf
    if logits.shape != recording.logits.shape or not logits.isfinite().all():
        return math.inf
    return relative_error(logits, recording.logits)


def _with_special_ids(recording: Recording, plan: Plan, processing_class: Any) -> Plan:
    if not plan.text:
        return plan
    config = recording.model.config
    ids = {getattr(config, name, None) for name in SPECIAL_IDS} | set(getattr(processing_class, "all_special_ids", ()))
    return replace(plan, special_ids=tuple(sorted(i for i in ids if isinstance(i, int))))


def _source(recording: Recording, plan: Plan) -> Tensor | None:
    """Return the tensor at the plan's source, from the last call of its module, or None."""
    call = next((c for c in reversed(recording.calls) if c.name == plan.source), None)
    if call is None:
        return None
    return call.argument if plan.side == "input" else call.results.get(plan.key)


def _length(x: Any) -> int | None:
    return x.shape[1] if isinstance(x, Tensor) and x.ndim >= 2 else None
