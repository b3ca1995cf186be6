"""Which attention weighs a model's labels: the last self-attention among its tokens, and whose row of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..modes import probing_mode
from ..plan import EVERY, Plan
from ..recording import Recording, logits_of, plain_call
from ..tolerance import tolerance
from .capture import REPORTED, AttentionHook


def with_attention(recording: Recording, plan: Plan, num_tokens: int) -> Plan:
    """The plan with the attention that can be read and was proved to be the one that was computed.

    It is the last self-attention of as many tokens as the head meets; in hybrid models it need not be in the last block.
    """
    calls = recording.attention_calls
    own = [i for i, c in enumerate(calls) if c.queries == num_tokens and not c.cross]
    # A decoder layer attends to itself and then to the encoder. More of the latter: the own tokens are among its keys.
    behind = sum(c.cross for c in calls[own[-1] :]) if own else 0
    call = calls[own[-1]] if own and behind <= 1 else None
    if call is None or call.keys != num_tokens or (plan.layout != "sequence" and plan.pool == EVERY):
        return replace(plan, query=None)
    bases = []
    if call.rows is not None and call.proves_rows(max(1e-4, tolerance(recording.logits))):
        bases += [call.base, call.inner]
    if call.weights is not None and len(call.weights) == len(recording.logits):
        bases.append(call.base if call.base.endswith("]") else call.base + REPORTED)
    for base in bases:
        if base is not None:
            choice = replace(plan, attention=call.name, attention_base=base, query=_query(plan))
            if base.endswith("]") or _changes_nothing(recording, choice):
                return choice
    return replace(plan, query=None)


def _changes_nothing(recording: Recording, plan: Plan) -> bool:
    """Whether the model gives the same logits with its attention tapped.

    The hook goes by a name in the module's config, and there are modules that look at this name and do something else for
    one that they do not know.
    """
    assert plan.attention is not None and plan.attention_base is not None
    module = recording.model.get_submodule(plan.attention)
    if not hasattr(module, "config"):
        return False
    hook = AttentionHook(module, plan.attention_base)
    try:
        with probing_mode(recording.model), torch.no_grad():
            logits = logits_of(plain_call(recording.model, recording.inputs))
    finally:
        hook.remove(module)
    return bool((logits - recording.logits).abs().max() <= tolerance(logits) * recording.logits.abs().max())


def _query(plan: Plan) -> int | str:
    if plan.query is not None:
        return plan.query
    if plan.pool == EVERY:
        return "mean"
    if plan.pool.startswith(("token[last", "token[after")) or plan.pool == "token[-1]":
        return "pool"
    # Where a CLS token is there it attends, be it read by the head or not.
    return 0 if plan.pool.startswith("token[0]") or (plan.prefix and plan.pool.startswith("mean")) else "mean"
