"""Select the attention that weighs the labels: the call, and the query whose row is read."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..modes import probing_mode
from ..plan import EVERY, Plan
from ..pools import MODULE_POOL
from ..recording import Recording, logits_of, original_forward
from ..tolerance import is_close
from .hook import REPORTED, AttentionHook
from .recording import AttentionCall, calls_within


def with_attention(recording: Recording, plan: Plan, num_tokens: int) -> Plan:
    """Return the plan with its attention fields set, or with `query=None` if no attention can be read.

    A selected row was shown to be the one that the model computes, and to leave the logits unchanged when it is read.

    Args:
        recording: The recorded forward.
        plan: A plan that explains the logits.
        num_tokens: Number of tokens at the plan's source.
    """
    call = _pooling_attention(recording, plan, num_tokens)
    if call is not None:
        plan = replace(plan, query=0 if call.queries == 1 else "mean")
    else:
        call = _last_attention(recording.attention_calls, num_tokens, plan.pool.startswith("token[0]"))
    if call is None or (plan.layout != "sequence" and plan.pool == EVERY):
        return replace(plan, query=None)
    bases: list[str | None] = []
    examples = len(recording.logits)  # Attention inside of parts of an image has more.
    if call.values is not None and len(call.values) == examples and call.rows_are_exact():
        bases += [call.base, call.inner]
    if call.weights is not None and len(call.weights) == examples:
        bases.append(call.base if call.base.endswith("]") else call.base + REPORTED)
    for base in filter(None, bases):
        candidate = replace(plan, attention=call.name, attention_base=base, query=_query(plan))
        if base.endswith("]") or _hook_keeps_logits(recording, candidate):
            return candidate
    return replace(plan, query=None)


def _pooling_attention(recording: Recording, plan: Plan, num_tokens: int) -> AttentionCall | None:
    """Return the attention by which the first module of the head pools the tokens, or None."""
    calls = calls_within(recording.attention_calls, plan.chain[0]) if plan.pool == MODULE_POOL else []
    return calls[-1] if calls and calls[-1].queries < calls[-1].keys == num_tokens else None


def _last_attention(calls: list[AttentionCall], num_tokens: int, reads_first: bool) -> AttentionCall | None:
    """Return the last attention over all tokens, or None. In hybrid models it may not be in the last block.

    Args:
        calls: All calls.
        num_tokens: Number of tokens.
        reads_first: The head reads the first token, so that a single query is this token's.
    """
    queries = (num_tokens, 1) if reads_first else (num_tokens,)
    own = [i for i, call in enumerate(calls) if call.queries in queries and not call.cross]
    if not own or calls[own[-1]].keys != num_tokens:
        return None
    # A decoder layer has one cross-attention after its self-attention. If more follow, the tokens themselves are among
    # the keys of the cross-attention, and this self-attention is not the last attention over them.
    crossed = sum(call.cross for call in calls[own[-1] :])
    return calls[own[-1]] if crossed <= 1 else None


def _hook_keeps_logits(recording: Recording, plan: Plan) -> bool:
    """Return True if the model gives the same logits with the hook active.

    The hook changes the attention implementation that the module's config names, and some modules branch on that name.
    """
    assert plan.attention is not None and plan.attention_base is not None
    module = recording.model.get_submodule(plan.attention)
    if not hasattr(module, "config"):
        return False
    hook = AttentionHook(module, plan.attention_base)
    try:
        hook.begin(len(recording.logits), index=0, detach=True)
        with probing_mode(recording.model), torch.no_grad():
            logits = logits_of(original_forward(recording.model, recording.inputs))
    finally:
        hook.end()
        hook.remove()
    return is_close(logits, recording.logits)


def _query(plan: Plan) -> int | str:
    if plan.query is not None:
        return plan.query
    if plan.pool == EVERY:
        return "mean"
    if plan.pool.startswith(("token[last", "token[after")) or plan.pool == "token[-1]":
        return "pool"
    # A CLS token's row is used even if the head averages the other tokens.
    has_cls = plan.pool.startswith("token[0]") or (plan.prefix and plan.pool.startswith("mean"))
    return 0 if has_cls else "mean"
