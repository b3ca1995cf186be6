"""Carry a plan out: one hook on the tokens, one row of attention, in the model's own forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import KINDS, AttentionTap, confidence, normalise
from .plan import LocationError, Plan, as_tokens, last_attended, pool_tokens, pooled_logits, score_tokens
from .probe import attended_mask, plain_call, probe, relative_error

TAPS = "mm_hf_taps"


@dataclass
class LocationOutput:
    """What one forward tells about a batch and its locations.

    Attributes:
        logits: (b, c), the model's own.
        token_logits: (b, r, c), the model's head applied at every location; None where only logits were asked for.
        mask: (b, r), True where a location is one of the example (not padding, not a special token).
        attention: (b, r) in float32, zero off the mask, summing to 1 for each example that has locations.
    """

    logits: Tensor
    token_logits: Tensor | None = None
    mask: Tensor | None = None
    attention: Tensor | None = None


def extract(model: nn.Module, attention: str = "auto", **inputs: Any) -> LocationOutput:
    """Logits, per-location logits, mask and attention of a batch, from one forward of an unmodified model.

    The first call probes the model (a second, small forward) and proves the plan it finds; later ones check it against
    the clean logits in evaluation mode.

    Args:
        model: A Transformers classification model.
        attention: "cls", "gap", "cam" (needs `labels`), "uniform", or "auto": "cls" where the head reads a single
            token, else "gap".
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
    installed = model.__dict__.get(TAPS)
    if installed is not None:
        return _forward(model, installed, attention, labels, inputs)
    plan = _plans.get(model)
    if plan is not None:
        with tapped(model, plan) as taps:
            try:
                return _forward(model, taps, attention, labels, inputs)
            except StalePlanError:
                pass  # the model has changed since: look again
    plan = _plans[model] = probe(model, inputs)
    with tapped(model, plan) as taps:
        return _forward(model, taps, attention, labels, inputs)


_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


class StalePlanError(LocationError):
    """A plan that was right once no longer reproduces the model's logits."""


def _forward(
    model: nn.Module, taps: Taps, attention: str, labels: Tensor | None, inputs: dict[str, Any]
) -> LocationOutput:
    kind = resolve_attention(attention, taps.plan)
    with taps.listening(inputs, with_row=kind == "cls"):
        logits = plain_call(model, inputs).logits
        output = taps.read(model, logits, inputs, kind, labels, detach=True)
        if not model.training:
            taps.check(model, logits, inputs)
    return output


@contextmanager
def tapped(model: nn.Module, plan: Plan) -> Iterator[Taps]:
    """Install a plan's taps for a while."""
    taps = Taps(model, plan)
    try:
        yield taps
    finally:
        taps.remove(model)


class Taps:
    """The one hook and the one attention tap that a plan needs. They stay installed and listen only when told to.

    A hook that comes and goes breaks torch.compile's graph each time; one that is installed before the first compiled
    call and looks at a flag does not. Nothing here refers to the model: a copy of the model has taps of its own.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.plan = plan
        self.active = False
        self.source: Tensor | None = None
        self.row: AttentionTap | None = None
        self._hook = model.get_submodule(plan.source).register_forward_hook(self._capture, with_kwargs=True)
        if plan.attention is not None and plan.query is not None:
            assert plan.attention_base is not None
            self.row = AttentionTap(model.get_submodule(plan.attention), plan.attention_base, plan.query)
        model.__dict__[TAPS] = self

    def remove(self, model: nn.Module) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        if self.row is not None:
            assert self.plan.attention is not None
            self.row.remove(model.get_submodule(self.plan.attention))
        model.__dict__.pop(TAPS, None)

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # The head is called again on every token, and then this is not the call that is meant.
        if not self.active or self.source is not None:
            return
        if self.plan.side == "input":
            self.source = args[0] if args else next(iter(kwargs.values()))
        else:
            self.source = output if self.plan.key is None else output[self.plan.key]

    @contextmanager
    def listening(self, inputs: Mapping[str, Any], with_row: bool, detach: bool = True) -> Iterator[None]:
        """Keep the tokens of the forward inside, and one row of attention if asked for; forget both afterwards."""
        row = self.row if with_row else None
        self.active = True
        if row is not None:
            row.active, row.detach = True, detach
            if self.plan.query == "last":
                words = inputs.get("attention_mask", inputs.get("input_ids"))
                attended = None if words is None else attended_mask(inputs, words.shape[1])
                row.query = -1 if attended is None else last_attended(attended)
        try:
            yield
        finally:
            self.active, self.source = False, None
            if row is not None:
                row.active, row.row = False, None

    def read(
        self,
        model: nn.Module,
        logits: Tensor,
        inputs: Mapping[str, Any],
        kind: str,
        labels: Tensor | None,
        detach: bool,
    ) -> LocationOutput:
        """Turn what was kept of the forward into locations. Call while `listening`."""
        assert self.source is not None
        plan = self.plan
        tokens = as_tokens(self.source)
        attended = attended_mask(inputs, tokens.shape[1])
        here = tokens[:, plan.prefix :]
        mask = torch.ones(here.shape[:2], dtype=torch.bool, device=here.device)
        if plan.text:
            mask = self._text_mask(inputs, mask if attended is None else attended)
        seen = here
        if "|" in plan.pool:
            first = pool_tokens(tokens, plan.pool.split("|")[0], attended)
            seen = torch.cat([first[:, None].expand_as(here), here], dim=-1)
        token_logits = score_tokens(model, plan, seen)
        row = None
        if kind == "cls":
            assert self.row is not None and self.row.row is not None
            row = self.row.row[:, plan.prefix :]
        weights = confidence(kind, row, here * mask[..., None], token_logits, labels)
        attention = normalise(weights.detach() if detach else weights, mask)
        return LocationOutput(logits, token_logits, mask, attention)

    def _text_mask(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Tokens that are words: attended to, not special, and not the one that stands for the whole."""
        ids = inputs.get("input_ids")
        if ids is not None:
            for special in self.plan.special_ids:
                mask = mask & (ids != special)
        if self.plan.pool.startswith("token[0]"):
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) > 0)
        return mask

    def check(self, model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]) -> None:
        """Raise unless the plan reproduces the clean logits of this forward. Call while `listening`, in eval mode."""
        assert self.source is not None
        tokens = as_tokens(self.source)
        with torch.no_grad():
            expected = pooled_logits(model, self.plan, tokens, attended_mask(inputs, tokens.shape[1]))
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
    readable = plan.attention is not None and plan.query is not None
    if kind == "auto":
        return "cls" if readable and plan.pool.startswith("token") else "gap"
    if kind == "cls" and not readable:
        why = "its head reads no single token" if plan.attention is not None else "its attention cannot be read"
        raise LocationError(
            f'attention="cls" needs a CLS token whose attention can be read, and {plan.model_class} has none: {why}. '
            'Use attention="gap", "cam" or "uniform", or "auto" to have one chosen.'
        )
    return kind
