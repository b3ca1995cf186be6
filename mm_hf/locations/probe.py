"""Find the plan of a model in one recorded forward.

From the logits, trace the recorded calls back to where the head takes the tokens. Each way back is a candidate plan.
The first candidate is taken that reproduces the logits and whose pool reads exactly the tokens that the logits depend
on, as their gradient shows. No architecture is named.

    probe
      record, check_head                   one forward; the head ends in a linear layer
      _search
        candidates                         candidates.py: registered mechanisms, then plans traced back from the logits
          _trace_back <-> _trace_call      from a vector to the calls that return it, and from a call to its argument
        with_pools                         each pool that reads the tokens with a gradient
        _plan_error                        the plan's logits against the model's
        with_attention                     attention/selection.py
      forward_size                         operations and locations, for num_mixed="auto"
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention.selection import with_attention
from .candidates import candidates, source_of, with_pools
from .head import check_head, is_linear_model
from .modes import nonzero_head_weights, probing_mode
from .operations import ForwardSize
from .padding import find_padding_map
from .plan import EVERY, REGISTERED, LocationError, Plan, as_tokens, head_operations, pooled_logits
from .probe_inputs import config_of
from .recording import Recording, record
from .registry import is_registered
from .tolerance import relative_error, within_rounding

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
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
    return probe_with_size(model, inputs, processing_class, plan)[0]


def probe_with_size(
    model: nn.Module, inputs: Mapping[str, Any], processing_class: Any = None, plan: Plan | None = None
) -> tuple[Plan, ForwardSize]:
    """Return the plan of [`probe`], and the size of the forward that it recorded."""
    without_autocast = torch.autocast(next(model.parameters()).device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), without_autocast, nonzero_head_weights(model):
        recording = record(model, inputs)
        check_head(recording)
        plan = _search(recording, processing_class) if plan is None else _verify(recording, plan)
        return plan, replace(forward_size(recording, plan), head_operations=head_operations(model, plan))


def forward_size(recording: Recording, plan: Plan | None = None) -> ForwardSize:
    """Return the size of a recorded forward, for one example. Its locations are those of a plan."""
    logits, locations = recording.logits, 1
    classes = logits.shape[1 if logits.ndim == 4 else -1]
    if plan is not None and plan.pool == EVERY:
        locations = logits[0].numel() // classes
    elif plan is not None:
        source = source_of(recording, plan)
        assert source is not None
        locations = as_tokens(source, plan.layout).shape[1] - plan.prefix
    return ForwardSize(recording.operations / len(logits), locations, classes)


def _search(recording: Recording, processing_class: Any) -> Plan:
    """Return the first candidate that reproduces the logits."""
    rejected: list[tuple[float, Plan]] = []
    for candidate in candidates(recording):
        for pooled, tokens in with_pools(recording, candidate):
            error = _plan_error(recording, pooled, tokens)
            if within_rounding(error, recording.logits.dtype):
                return _complete(recording, pooled, tokens, processing_class)
            rejected.append((error, pooled))
    raise LocationError(_describe_failure(recording, rejected))


def _describe_failure(recording: Recording, rejected: list[tuple[float, Plan]]) -> str:
    name, attention = type(recording.model).__name__, recording.attention_calls
    reason, nearest = ": nothing that its head reads was found to come from tokens", ""
    if attention and any(attention[-1].queries < attention[-1].keys == call.queries < call.keys for call in attention):
        reason = f": its head reads {attention[-1].keys} latents, which attend to all tokens"
    elif is_linear_model(recording):
        reason = ": it is linear in its inputs"
    elif not _has_single_head(recording):
        reason = ": its logits combine the results of several heads"
    elif rejected:
        error, plan = min(rejected, key=lambda pair: pair[0])
        reason, nearest = "", f" The nearest one misses its logits by {error:.1e} (relative):\n{plan}"
    return (
        f"{name} gives no per-location logits{reason}.\n"
        "A head that scores every token, a head or pooler that takes the sequence, a pooled vector, two averaged heads "
        f"and a module that pools the tokens were tried: {len(rejected)} candidates in all.{nearest}\n"
        f"MultiMix() needs the logits only and works with this model. {REGISTER_HELP}"
    )


def _has_single_head(recording: Recording) -> bool:
    """Return True if a module inside of the model returns the logits."""
    returning = (call.argument for call in recording.calls if call.returns(recording.logits))
    return any(x is not None and x.data_ptr() not in recording.input_pointers for x in returning)


def _complete(recording: Recording, plan: Plan, tokens: Tensor, processing_class: Any) -> Plan:
    """Add the special tokens and the attention to a plan that reproduces the logits."""
    plan = replace(plan, padding=find_padding_map(recording, plan, tokens.shape[1]))
    if plan.padding == "last":  # virtual tokens are no locations
        plan = replace(plan, prefix=tokens.shape[1] - recording.inputs["input_ids"].shape[1])
    plan = _with_special_ids(recording, plan, processing_class)
    return with_attention(recording, plan, tokens.shape[1])


def _verify(recording: Recording, plan: Plan) -> Plan:
    """Return the plan if each of its fields fits the model; raise a LocationError that names the first one if not."""
    name = type(recording.model).__name__
    if source_of(recording, plan) is None:
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
        candidate = next((c for c in candidates(recording) if (c.pool, c.chain) == (plan.pool, plan.chain)), None)
    else:
        candidate = replace(plan, attention=None, attention_base=None, query=None, keys="")
    pooled, tokens = next(with_pools(recording, candidate), (None, None)) if candidate else (None, None)
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
    if not plan.text and plan.padding != "last":
        return plan
    config = config_of(recording.model)
    ids = {getattr(config, name, None) for name in SPECIAL_IDS} | set(getattr(processing_class, "all_special_ids", ()))
    return replace(plan, special_ids=tuple(sorted(i for i in ids if isinstance(i, int))))
