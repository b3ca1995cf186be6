"""Carry a plan out: one hook on the tokens, one row of attention, in the model's own forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention.capture import AttentionHook
from .attention.weights import KINDS, confidence, normalise
from .plan import EVERY, LocationError, Plan, as_tokens, pooled_logits, score_tokens
from .pools import attended, pool_rows, pool_tokens
from .probe import probe
from .recording import batch_size, logits_of, plain_call
from .tolerance import relative_error

HOOKS = "mm_hf_hooks"


@dataclass
class LocationOutput:
    """What one forward tells about a batch and its locations.

    Attributes:
        logits: (b, c), the model's own; (b, n, c) or (b, c, h, w) of a model that labels every location.
        token_logits: (b, r, c), the model's head applied at every location; None where they were not asked for.
        mask: (b, r), True where a location is one of the example (not padding, not a special token).
        attention: (b, r) in float32, zero off the mask, summing to 1 for each example that has locations.
        labels: (b, r), where each location has a label of its own; else None.
    """

    logits: Tensor
    token_logits: Tensor | None = None
    mask: Tensor | None = None
    attention: Tensor | None = None
    labels: Tensor | None = None


def extract(model: nn.Module, attention: str = "auto", **inputs: Any) -> LocationOutput:
    """Logits, per-location logits, mask and attention of a batch, from one forward of an unmodified model.

    The first call probes the model (a second, small forward) and proves the plan it finds; later ones check it against
    the clean logits in evaluation mode.

    Args:
        model: A Transformers classification model.
        attention: "cls" (of the token that the head reads), "mean" (of all tokens), "gap", "cam" (needs `labels`),
            "uniform", or "auto": "cls" where the head reads a single token, else "gap"; "uniform" for models that label
            every location.
        inputs: Keyword arguments of the model's forward; `labels` are for "cam" only and not handed to it.

    Raises:
        LocationError: The model gives no per-location logits, or not the attention asked for.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=8, num_labels=10)
        >>> model = ViTForImageClassification(config).eval()
        >>> output = extract(model, pixel_values=torch.randn(4, 3, 32, 32))
        >>> output.token_logits.shape, output.attention.shape
        (torch.Size([4, 16, 10]), torch.Size([4, 16]))
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    labels = inputs.pop("labels", None)
    installed = model.__dict__.get(HOOKS)
    if installed is not None:
        return _forward(model, installed, attention, labels, inputs)
    plan = _plans.get(model)
    if plan is not None:
        with temporary_hooks(model, plan) as hooks:
            try:
                return _forward(model, hooks, attention, labels, inputs)
            except StalePlanError:
                pass  # the model has changed since: look again
    plan = _plans[model] = probe(model, inputs)
    with temporary_hooks(model, plan) as hooks:
        return _forward(model, hooks, attention, labels, inputs)


_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


class StalePlanError(LocationError):
    """A plan that was right once no longer reproduces the model's logits."""


def _forward(
    model: nn.Module, hooks: LocationHooks, attention: str, labels: Tensor | None, inputs: dict[str, Any]
) -> LocationOutput:
    kind = resolve_attention(attention, hooks.plan)
    with hooks.capture(inputs, kind):
        logits = logits_of(plain_call(model, inputs))
        output = hooks.to_output(model, logits, inputs, kind, labels, detach=True)
        if not model.training and hooks.plan.pool != EVERY:
            hooks.check(model, logits, inputs)
    return output


@contextmanager
def temporary_hooks(model: nn.Module, plan: Plan) -> Iterator[LocationHooks]:
    """Install a plan's taps for a while."""
    hooks = LocationHooks(model, plan)
    try:
        yield hooks
    finally:
        hooks.remove(model)


class LocationHooks:
    """The one hook and the one attention hook that a plan needs. They stay installed and listen only when told to.

    A hook that comes and goes breaks torch.compile's graph each time; one that is installed before the first compiled
    call and looks at a flag does not. Nothing features refers to the model: a copy of the model has taps of its own.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.plan = plan
        self.active = False
        self.source: Tensor | None = None
        self.row: AttentionHook | None = None
        self._hook = model.get_submodule(plan.source).register_forward_hook(self._capture, with_kwargs=True)
        if plan.attention is not None:
            assert plan.attention_base is not None
            self.row = AttentionHook(model.get_submodule(plan.attention), plan.attention_base)
        model.__dict__[HOOKS] = self

    def remove(self, model: nn.Module) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        if self.row is not None:
            assert self.plan.attention is not None
            self.row.remove(model.get_submodule(self.plan.attention))
        model.__dict__.pop(HOOKS, None)

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # The head is called again on every token, and then this is not the call that is meant.
        if not self.active or self.source is not None:
            return
        if self.plan.side == "input":
            self.source = args[0] if args else next(iter(kwargs.values()))
        else:
            self.source = output if self.plan.key is None else output[self.plan.key]

    @contextmanager
    def capture(self, inputs: Mapping[str, Any], kind: str, detach: bool = True) -> Iterator[None]:
        """Keep the tokens of the forward inside, and the attention that `kind` needs; forget both afterwards."""
        row = self.row if kind in ("cls", "mean") else None
        self.active = True
        if row is not None:
            row.active, row.detach = True, detach
            row.batch = batch_size(inputs)
            row.index = None if kind == "mean" else self._query(inputs)
        try:
            yield
        finally:
            self.active, self.source = False, None
            if row is not None:
                row.active, row.row = False, None

    def _query(self, inputs: Mapping[str, Any]) -> int | Tensor:
        """Whose attention is the confidence: a position, or one for each example."""
        if self.plan.query != "pool":
            assert isinstance(self.plan.query, int)
            return self.plan.query
        words = next((inputs[k] for k in ("input_ids", "inputs_embeds") if inputs.get(k) is not None), None)
        if words is None:
            return -1
        return pool_rows(words.detach().reshape(*words.shape[:2], -1), self.plan.pool, inputs).int().argmax(dim=1)

    def to_output(
        self,
        model: nn.Module,
        logits: Tensor,
        inputs: Mapping[str, Any],
        kind: str,
        labels: Tensor | None,
        detach: bool,
        score: bool = True,
    ) -> LocationOutput:
        """Turn what was kept of the forward into locations. Call while `listening`.

        Without `score`, and for attention that is read ("cls", "mean"), the head is not run on the locations.
        """
        plan = self.plan
        if self.source is None:
            raise StalePlanError(
                f"{type(model).__name__} did not call {plan.source!r} in this forward, where its tokens were when it was "
                f"probed: it has changed since. Remove the wrapping and wrap it again.\n{plan}"
            )
        tokens = as_tokens(self.source, plan.layout)
        row = None
        if kind in ("cls", "mean"):
            assert self.row is not None and self.row.row is not None
            row = self.row.row[:, plan.prefix :]
        token_logits: Tensor | None
        if plan.pool == EVERY:
            features = token_logits = logits if logits.ndim == 3 else logits.flatten(2).mT
            mask = attended(inputs, features)
        else:
            features = tokens[:, plan.prefix :]
            mask = self._mask(inputs, tokens)[:, plan.prefix :]
            scored = features
            if "|" in plan.pool:
                first = pool_tokens(tokens, plan.pool.split("|")[0], inputs)
                scored = torch.cat([first[:, None].expand_as(features), features], dim=-1)
            token_logits = score_tokens(model, plan, scored) if score or row is None else None
        weights = confidence(kind, row, features * mask[..., None], token_logits, labels)
        attention = normalise(weights.detach() if detach else weights, mask)
        return LocationOutput(logits, token_logits, mask, attention)

    def _mask(self, inputs: Mapping[str, Any], tokens: Tensor) -> Tensor:
        """Tokens (b, n) that are locations: attended to, and of a text only its words."""
        plan = self.plan
        mask = attended(inputs, tokens)
        if plan.pool == "mean[nonzero]":
            mask = pool_rows(tokens, plan.pool, inputs)
        if plan.text:
            ids = inputs.get("input_ids")
            for special in plan.special_ids if ids is not None else ():
                mask = mask & (ids != special)
            if plan.pool.startswith("token[0]"):  # which stands for the whole
                mask = mask & (torch.arange(mask.shape[1], device=mask.device) > 0)
        return mask

    def check(self, model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]) -> None:
        """Raise unless the plan reproduces the clean logits of this forward. Call while `listening`, in eval mode."""
        assert self.source is not None
        tokens = as_tokens(self.source, self.plan.layout)
        with torch.no_grad():
            expected = pooled_logits(model, self.plan, tokens, inputs)
            error = relative_error(expected, logits)
        if error > (1e-4 if logits.dtype in (torch.float32, torch.float64) else 5e-2):
            raise StalePlanError(
                f"The plan that fitted {type(model).__name__} when it was probed misses its logits by {error:.1e} "
                f"(relative) now:\n{self.plan}"
            )


def resolve_attention(kind: str, plan: Plan) -> str:
    """What "auto" means for a model; a LocationError if the model has not got the attention asked for."""
    if kind not in KINDS:
        raise ValueError(f"attention must be one of {', '.join(KINDS)}, got {kind!r}.")
    name, readable = plan.model_class, plan.attention is not None
    if plan.pool == EVERY:
        if kind in ("auto", "uniform"):
            return "uniform"
        if kind == "mean" and readable:
            return kind
        raise LocationError(
            f"{name} labels every location, and attention={kind!r} says where the one label of a whole example is. Use "
            '"uniform"' + (' or "mean".' if readable else ".")
        )
    single = readable and plan.query != "mean"
    if kind == "auto":
        return "cls" if single and plan.pool.startswith("token") else "gap"
    if kind == "cls" and not single:
        why = "its head reads no single token" if readable else "its attention cannot be read"
        others = ('"mean", ' if readable else "") + '"gap", "cam" or "uniform"'
        raise LocationError(
            f'attention="cls" needs a CLS token whose attention can be read, and {name} has none: {why}. '
            f'Use attention={others}, or "auto" to have one chosen.'
        )
    if kind == "mean" and not readable:
        raise LocationError(
            f'attention="mean" needs attention that can be read, and that of {name} cannot be. Use attention="gap", "cam" '
            'or "uniform", or "auto" to have one chosen.'
        )
    return kind
