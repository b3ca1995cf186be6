"""Find out, from one forward of an unmodified model, how its logits come about from its tokens.

Record the calls of all modules on a few examples; walk back from the logits to where the head meets the tokens; keep
the first explanation that reproduces the logits and whose gradient reaches exactly the tokens that it says are read.
No architecture is named anywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention.selection import with_attention
from .head import averaged_heads, check_head, location_scorers
from .modes import nonzero_head_weights, probing_mode
from .plan import ACTIVATIONS, EVERY, REGISTERED, LocationError, Plan, as_tokens, pooled_logits
from .pools import MASKS, pool_rows, pool_tokens
from .recording import Call, Recording, pad_id, record
from .registry import is_registered, registered
from .tolerance import is_close, is_vector, mismatch, relative_error, scale_between, tolerance

PREFIX_PARAMETERS = ("cls_token", "distillation_token", "dist_token", "register_tokens", "class_embedding")
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
LAYOUTS = {3: ("sequence", "channels"), 4: ("map", "grid"), 5: ("map", "grid")}
TEACH = """To teach it, say where the tokens are and what the head makes of them (see mm_hf.locations.registry):
    from mm_hf import locations
    def score(model, tokens):   # (batch, locations, features) -> the logits of each location by itself
        ...
    def pooled(model, tokens):  # all tokens -> the model's own logits, as a proof
        ...
    locations.register({name!r}, source="name of the module that gives the tokens", score=score, pooled=pooled)"""


def probe(model: nn.Module, inputs: Mapping[str, Any], processing_class: Any = None, plan: Plan | None = None) -> Plan:
    """The plan of a model, from a batch as it comes from the data loader (labels are not looked at).

    Nothing of it remains: no hook, no change of mode or flags, no draw from the random generators.

    Args:
        model: A Transformers classification model, also under PEFT.
        inputs: Keyword arguments of its forward.
        processing_class: The tokenizer, which knows the special tokens that the model's config may not name.
        plan: A plan from elsewhere (a checkpoint, another process) that is to be proved in place of a search.

    Raises:
        LocationError: The model's logits cannot be explained by its tokens, or not by the given plan; the message says
            what was seen.
    """
    plain = torch.autocast(next(model.parameters()).device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), plain, nonzero_head_weights(model):
        recording = record(model, inputs)
        check_head(recording)
        if plan is not None:
            return _proved(recording, plan)
        misses: list[tuple[float, Plan]] = []
        for guess in _explanations(recording):
            for candidate, tokens in _pools(recording, guess):
                error = _identity_error(recording, candidate, tokens)
                if error <= tolerance(recording.logits):
                    return _completed(recording, candidate, tokens, processing_class)
                misses.append((error, candidate))
    raise LocationError(_no_plan(type(model).__name__, misses))


def _no_plan(name: str, misses: list[tuple[float, Plan]]) -> str:
    nearest = "Nothing that its head reads was seen to come from tokens."
    if misses:
        error, plan = min(misses, key=lambda miss: miss[0])
        nearest = f"The nearest miss reproduces its logits up to {error:.1e} (relative):\n{plan}"
    return (
        f"{name} gives no per-location logits. Tried were a head that scores every token, a head or pooler that takes the "
        f"sequence, a pooled vector and two averaged heads: {len(misses)} explanations in all. {nearest}\n"
        f"MultiMix() needs the logits only and works with this model. {TEACH.format(name=name)}"
    )


def _completed(recording: Recording, plan: Plan, tokens: Tensor, processing_class: Any) -> Plan:
    plan = _with_special_ids(recording, plan, processing_class)
    return with_attention(recording, plan, tokens.shape[1])


def _proved(recording: Recording, plan: Plan) -> Plan:
    """The plan itself if this model bears it out in every field, else a LocationError that says where it does not."""
    name = type(recording.model).__name__
    if _source(recording, plan) is None:
        raise LocationError(
            f"The plan does not fit {name}: it has, or calls, no module {plan.source!r} with such an {plan.side}.\n{plan}"
        )
    if plan.pool in (EVERY, REGISTERED):
        guess = next(_explanations(recording))
    else:
        guess = replace(plan, attention=None, attention_base=None, query=None, prefix=_prefix_length(recording.model))
    candidate, tokens = next(_pools(recording, guess), (None, None))
    if candidate is None or tokens is None:
        raise LocationError(
            f"The plan does not fit {name}: its logits do not depend on the tokens that {plan.pool!r} names and on no "
            f"others.\n{plan}"
        )
    error = _identity_error(recording, candidate, tokens)
    if error > tolerance(recording.logits):
        raise LocationError(f"The plan does not fit {name}: it misses its logits by {error:.1e}.\n{plan}")
    shown = _completed(recording, candidate, tokens, None)
    shown = replace(shown, special_ids=plan.special_ids, model_class=plan.model_class)
    for field in fields(Plan):
        stated, observed = getattr(plan, field.name), getattr(shown, field.name)
        if stated != observed:
            raise LocationError(
                f"The plan does not fit {name}: it says {field.name}={stated!r} and the model shows {observed!r}. Probe again "
                f"(leave the plan out).\n{plan}"
            )
    return plan


def _explanations(recording: Recording) -> Iterator[Plan]:
    """Ways in which the logits may have come about, outermost modules first; `pool` is "" where it is still open."""
    model = recording.model
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__  # type: ignore[operator]
    empty = Plan(type(model).__name__, "", "", None, "", "", (), prefix=_prefix_length(model))
    if is_registered(name):
        known = registered(name)
        yield replace(
            empty, model_class=name, source=known.source, side=known.side, key=known.key, layout=known.layout,
            pool=REGISTERED, prefix=known.prefix, query=known.query,
        )  # fmt: skip
        return
    if recording.logits.ndim > 2:
        yield _every_location(recording, empty)
        return
    yield from _walk(recording, empty, recording.logits, math.inf, (), 0)
    for a, b in averaged_heads(recording):
        # Each head by itself: together their gradients would not tell which of them reads what.
        ways = [
            [way for guess in _before(recording, empty, c, (c.name,), 0) for way, _ in _pools(recording, guess, c)]
            for c in (a, b)
        ]
        for one, other in itertools.product(*ways):
            is_close = (one.source, one.side, one.key, one.layout, len(one.chain))
            if is_close == (other.source, other.side, other.key, other.layout, len(other.chain)):
                pool = one.pool if one.pool == other.pool else f"{one.pool}+{other.pool}"
                chain = tuple(x if x == y else f"{x}+{y}" for x, y in zip(one.chain, other.chain))
                yield replace(one, pool=pool, chain=chain)


def _every_location(recording: Recording, empty: Plan) -> Plan:
    """The plan of a model that labels every location: its own logits, and the last affine layer as their source."""
    scorer = next(location_scorers(recording))
    layout = "sequence" if recording.logits.ndim == 3 else "map"
    return replace(empty, source=scorer.name, side="output", layout=layout, pool=EVERY, prefix=0)


def _walk(
    recording: Recording, empty: Plan, target: Tensor, before: float, chain: tuple[str, ...], depth: int
) -> Iterator[Plan]:
    """Explanations of a vector for each example that was there before some moment and goes through `chain` afterwards."""
    flat = target.flatten(1)
    earlier = [c for c in recording.calls if c.ended < before]
    # Small numbers are nearly their own tanh: what is equal to the last bit comes first.
    made = sorted(
        (
            (error, c, () if name is None else (name,))
            for c in reversed(earlier)
            for name, activation in ((None, None), *ACTIVATIONS.items())
            if (error := mismatch(c, flat, activation)) <= tolerance(flat)
        ),
        key=lambda candidate: candidate[0],
    )
    if not made:
        made = [
            (0.0, c, (f"scale[{scale}]",)) for c in reversed(earlier) if (scale := scale_between(c, flat)) is not None
        ]
    for _, call, activation in made if depth < 16 else []:
        reshaped = ("flatten",) if target.ndim == 2 and call.results[None].ndim > 2 else ()
        yield from _before(recording, empty, call, (call.name, *activation, *reshaped, *chain), depth)
    for call in sorted(earlier, key=lambda c: (c.name.count("."), -c.ended)):
        for key, x in call.results.items():
            for layout in LAYOUTS.get(x.ndim, ()) if not is_vector(x) else ():
                tokens = as_tokens(x, layout)
                if chain and tokens.shape[-1] not in (flat.shape[-1], flat.shape[-1] // 2):
                    continue
                for pool in _pool_names(recording, tokens, empty.prefix):
                    pooled = pool_tokens(tokens, pool, recording.inputs)
                    if pooled.shape == flat.shape and is_close(pooled, flat):
                        yield replace(
                            empty, source=call.name, side="output", key=key, layout=layout, pool=pool, chain=chain
                        )


def _before(recording: Recording, empty: Plan, call: Call, chain: tuple[str, ...], depth: int) -> Iterator[Plan]:
    """Explanations of what a module call took."""
    x = call.argument
    if x is None or x.data_ptr() in recording.input_pointers:
        return
    if is_vector(x):
        yield from _walk(recording, empty, x, call.began, chain, depth + 1)
    else:
        for layout in LAYOUTS.get(x.ndim, ()):
            yield replace(empty, source=call.name, side="input", layout=layout, chain=chain)


def _pools(recording: Recording, guess: Plan, head: Call | None = None) -> Iterator[tuple[Plan, Tensor]]:
    """The guess with each pool whose tokens are exactly those that the logits (of one head) depend on, and these tokens."""
    source = _source(recording, guess)
    if source is None or not source.requires_grad:
        return
    tokens = as_tokens(source.detach(), guess.layout)
    n = tokens.shape[1]
    text = any(_length(recording.inputs.get(k)) == n for k in ("input_ids", "inputs_embeds"))
    found = replace(guess, text=text, prefix=0 if text else guess.prefix)
    if guess.pool in (EVERY, REGISTERED):
        yield replace(found, prefix=guess.prefix), tokens
        return
    logits = recording.logits if head is None else head.results[None]
    weights = torch.linspace(1, 2, logits.numel(), device=source.device, dtype=logits.dtype)
    total = (logits * weights.view_as(logits)).sum()
    (gradient,) = torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)
    if gradient is None:
        return
    read = as_tokens(gradient, guess.layout).ne(0).any(dim=-1)
    names = (guess.pool,) if guess.pool else _pool_names(recording, tokens, guess.prefix)
    for pool in names:
        # A token may be read and still have no gradient (a saturated or dead unit), but none may be read in secret. What
        # was set to zero has a gradient and is not read all the same.
        rows = pool_rows(tokens, pool, recording.inputs)
        secret = (read & ~rows).any() and pool != "mean[nonzero]"
        if not secret and (read & rows).sum() >= 0.9 * rows.sum():
            yield replace(found, pool=pool), tokens


def _pool_names(recording: Recording, tokens: Tensor, prefix: int) -> tuple[str, ...]:
    """Pools that may be, the likeliest first."""
    inputs, shape = recording.inputs, tokens.shape[:2]
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
    return tuple(names)


def _identity_error(recording: Recording, plan: Plan, tokens: Tensor) -> float:
    """How far, relatively, the plan's own way to the logits ends from the model's."""
    if plan.pool == EVERY:
        return 0.0
    with probing_mode(recording.model), torch.no_grad():
        try:
            logits = pooled_logits(recording.model, plan, tokens, recording.inputs)
        except Exception:  # a module that cannot take one token: not a way to per-location logits
            return float("inf")
    if logits.shape != recording.logits.shape or not logits.isfinite().all():
        return float("inf")
    return relative_error(logits, recording.logits)


def _with_special_ids(recording: Recording, plan: Plan, processing_class: Any) -> Plan:
    if not plan.text:
        return plan
    config = recording.model.config
    ids = {getattr(config, name, None) for name in SPECIAL_IDS} | set(getattr(processing_class, "all_special_ids", ()))
    return replace(plan, special_ids=tuple(sorted(i for i in ids if isinstance(i, int))))


def _source(recording: Recording, plan: Plan) -> Tensor | None:
    call = next((c for c in reversed(recording.calls) if c.name == plan.source), None)
    if call is None:
        return None
    return call.argument if plan.side == "input" else call.results.get(plan.key)


def _prefix_length(model: nn.Module) -> int:
    """Number of tokens that the model puts before those of its input, told by its parameters."""
    named = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in PREFIX_PARAMETERS]
    return sum(p.shape[-2] if p.ndim > 1 else 1 for p in named)


def _length(x: Any) -> int | None:
    return x.shape[1] if isinstance(x, Tensor) and x.ndim >= 2 else None
