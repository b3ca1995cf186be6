"""Select the attention that weighs the labels: the call, and the query whose row is read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..candidates import source_of
from ..modes import probing_mode
from ..plan import EVERY, Plan
from ..pools import MODULE_POOL
from ..recording import Recording, logits_of, original_forward
from ..tolerance import is_close
from .hook import REPORTED, AttentionHook
from .recording import AttentionCall, calls_within
from .weights import num_groups


def with_attention(recording: Recording, plan: Plan, num_tokens: int) -> Plan:
    """Return the plan with its attention fields set, or with `query=None` if no attention can be read.

    A selected row was shown to be the one that the model computes, and to leave the logits unchanged when it is read.

    Args:
        recording: The recorded forward.
        plan: A plan that explains the logits.
        num_tokens: Number of tokens at the plan's source.
    """
    call, keys = _pooling_attention(recording, plan, num_tokens), ""
    if call is not None:
        plan = replace(plan, query=0 if call.queries == 1 else "mean")
    else:
        call, keys = _last_attention(recording, num_tokens, plan)
    if call is None or (plan.layout != "sequence" and plan.pool == EVERY):
        return replace(plan, query=None)
    bases: list[str | None] = []
    examples = len(recording.logits) * num_groups(keys)  # Attention inside of parts of an image has more.
    if call.values is not None and len(call.values) == examples and call.rows_are_exact():
        bases += [call.base, call.inner]
    if call.weights is not None and len(call.weights) == examples:
        bases.append(call.base if call.base.endswith("]") else call.base + REPORTED)
    for base in filter(None, bases):
        candidate = replace(plan, attention=call.name, attention_base=base, query=_query(plan), keys=keys)
        if base.endswith("]") or _hook_keeps_logits(recording, candidate):
            return candidate
    return replace(plan, query=None)


def _pooling_attention(recording: Recording, plan: Plan, num_tokens: int) -> AttentionCall | None:
    """Return the attention by which the first module of the head pools the tokens, or None."""
    calls = calls_within(recording.attention_calls, plan.chain[0]) if plan.pool == MODULE_POOL else []
    return calls[-1] if calls and calls[-1].queries < calls[-1].keys == num_tokens else None


def _last_attention(recording: Recording, num_tokens: int, plan: Plan) -> tuple[AttentionCall | None, str]:
    """Return the last attention over all tokens, and the tokens of its keys as in `Plan.keys`; None if there is none.

    In hybrid models it may not be in the last block.
    """
    calls = recording.attention_calls
    if calls and calls[-1].queries == num_tokens < calls[-1].keys and _has_own_keys_first(recording, calls[-1]):
        return calls[-1], "first"
    # A single query is that of the first token if the head reads this token.
    queries = (num_tokens, 1) if plan.pool.startswith("token[0]") else (num_tokens,)
    own = [i for i, call in enumerate(calls) if call.queries in queries and not call.cross]
    if own and (calls[own[-1]].keys == num_tokens or _is_padded(calls[own[-1]], num_tokens)):
        # A decoder layer has one cross-attention after its self-attention. If more follow, the tokens themselves are
        # among the keys of the cross-attention, and this self-attention is not the last attention over them.
        crossed = sum(call.cross for call in calls[own[-1] :])
        call = calls[own[-1]]
        return (call if crossed <= 1 else None), ("first" if call.queries < num_tokens else "")
    if plan.layout != "sequence" or not calls or calls[-1].cross or calls[-1].queries != calls[-1].keys:
        return None, ""
    grouped = plan.pool == "token[0]" and plan.prefix == 1
    keys = _grouping(recording, plan, num_tokens) if grouped else _upsampling(recording, plan, num_tokens)
    return (calls[-1] if keys else None), keys


def _is_padded(call: AttentionCall, num_tokens: int) -> bool:
    """Return True if a single query attends to the tokens and to keys of padding after them, which have no weight.

    An example is the global attention of a model whose attention in windows pads the sequence.
    """
    has_more = call.queries == 1 and call.keys > num_tokens
    return has_more and call.weights is not None and not call.weights[..., num_tokens:].any()


def _has_own_keys_first(recording: Recording, call: AttentionCall) -> bool:
    """Return True if the first keys are those of the module's own tokens, before those of another sequence.

    Then a projection of the module's argument gives the first values.
    """
    argument = next((c.argument for c in reversed(recording.calls) if c.name == call.name), None)
    if argument is None or call.values is None:
        return False
    first = call.values[:, :, : call.queries].transpose(1, 2).flatten(2)
    projections = (c for c in recording.calls if c.name.startswith(f"{call.name}.") and c.argument is argument)
    results = (c.result for c in projections if c.result is not None and c.result.shape == first.shape)
    return any(is_close(result, first) for result in results)


def _upsampling(recording: Recording, plan: Plan, num_tokens: int) -> str:
    """Return the keys of `Plan.keys` if each key of the last attention is upsampled to several tokens, else "".

    Some encoders of audio run at a lower resolution in time. Their output is upsampled, and fewer tokens than those of
    a key are appended, which depend on no key.
    """
    source, output = source_of(recording, plan), _last_output(recording)
    call = recording.attention_calls[-1]
    if plan.prefix or source is None or output is None or output.shape[1] != call.keys:
        return ""
    factor, appended = num_tokens // call.keys, num_tokens % call.keys
    if factor < 2 or appended >= factor:
        return ""
    own = torch.arange(num_tokens, device=source.device) // factor
    return f"repeat[{factor}]" if _tokens_use_own_key(source, output, own) else ""


def _grouping(recording: Recording, plan: Plan, num_tokens: int) -> str:
    """Return the keys of `Plan.keys` if the last attention is inside of groups of tokens, else "".

    Each group, such as a frame of a video, begins with a copy of the first token, and the mean of the copies is the
    first token of the output. The gradient at all copies of an example is then the same.
    """
    source, output = source_of(recording, plan), _last_output(recording)
    if source is None or output is None or output.ndim != 3 or output.shape[1] != recording.attention_calls[-1].keys:
        return ""
    groups, size = len(output) // len(recording.logits), output.shape[1] - 1
    if groups < 2 or groups * size != num_tokens - 1 or len(output) != groups * len(recording.logits):
        return ""
    gradient = _gradient(source[:, :1], output)
    copies = None if gradient is None else gradient.unflatten(0, (-1, groups))
    if (
        copies is None
        or copies[:, :, 1:].any()
        or not is_close(copies[:, :, 0], copies[:, :1, 0].expand(-1, groups, -1))
    ):
        return ""
    key = torch.arange(groups * (size + 1), device=source.device).reshape(groups, size + 1)[:, 1:]
    for name, own in (("chunks", key.flatten()), ("strided", key.mT.flatten())):
        if _tokens_use_own_key(source[:, 1:], output, own):
            return f"{name}[{groups}]"
    return ""


def _last_output(recording: Recording) -> Tensor | None:
    """Return the output of the module that computed the last attention."""
    name = recording.attention_calls[-1].name
    return next((call.result for call in reversed(recording.calls) if call.name == name), None)


def _tokens_use_own_key(source: Tensor, output: Tensor, own: Tensor) -> bool:
    """Return True if each token of the source depends on the attention's output at its own key only.

    Args:
        source: (b, n, d).
        output: (b, k, d), or (b g, k / g, d) for attention inside of g groups.
        own: (n,) the key of each token; a token without a key has a number of at least k.
    """
    keys = torch.arange(output.shape[0] * output.shape[1] // len(source), device=source.device)
    all_used = torch.zeros_like(keys, dtype=torch.bool)
    for bit in range(int(own.max()).bit_length()):  # Two numbers differ in one of their bits.
        for tokens in ((own >> bit) % 2 == 0, (own >> bit) % 2 == 1):
            gradient = _gradient(source[:, tokens], output)
            if gradient is not None:
                used = gradient.reshape(len(source), len(keys), -1).any(dim=-1).any(dim=0)
                if (used & ~torch.isin(keys, own[tokens])).any():
                    return False
                all_used |= used
    return bool(all_used.any())  # Tokens of padding use no key.


def _gradient(tokens: Tensor, output: Tensor) -> Tensor | None:
    """Return the gradient, at a module's output, of the sum of tokens in one direction; None if there is none."""
    direction = torch.arange(tokens.shape[-1], device=tokens.device).cos()
    (gradient,) = torch.autograd.grad((tokens * direction).sum(), output, retain_graph=True, allow_unused=True)
    return gradient


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
        hook.begin(len(recording.logits) * num_groups(plan.keys), index=0, detach=True)
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
