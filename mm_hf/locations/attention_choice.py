"""Which attention weighs a model's labels: the last self-attention among its tokens, and whose row of it."""

from __future__ import annotations

from dataclasses import replace

from .plan import EVERY, Plan
from .reading import REPORTED
from .record import Recording


def with_attention(recording: Recording, plan: Plan, num_tokens: int, tolerance: float) -> Plan:
    """The plan with the attention that can be read and was proved to be the one that was computed.

    The last call among as many tokens as the head meets: in hybrid models it need not be in the last block.
    """
    call = next((c for c in reversed(recording.attention_calls) if c.size == num_tokens), None)
    if call is None or plan.layout != "sequence" and plan.pool == EVERY:
        return replace(plan, query=None)
    base: str | None = None
    if call.rows is not None and call.proves_rows(max(1e-4, tolerance)):
        base = call.base
    elif call.weights is not None:
        rows = call.weights.numel() // (num_tokens * num_tokens)
        whole = rows % len(recording.logits) == 0
        base = (call.base if call.base.endswith("]") else call.base + REPORTED) if whole else None
    if base is None:
        return replace(plan, query=None)
    return replace(plan, attention=call.name, attention_base=base, query=_query(plan))


def _query(plan: Plan) -> int | str:
    if plan.query is not None:
        return plan.query
    if plan.pool == EVERY:
        return "mean"
    if plan.pool.startswith(("token[last", "token[after")) or plan.pool == "token[-1]":
        return "pool"
    # Where a CLS token is there it attends, be it read by the head or not.
    return 0 if plan.pool.startswith("token[0]") or (plan.prefix and plan.pool.startswith("mean")) else "mean"
