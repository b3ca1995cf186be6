"""Execute a plan in the model's own forward: one hook on the tokens and one on the attention."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attachments import ModuleHooks, attach, detach
from .attention.hook import AttentionHook
from .attention.weights import READ_KINDS, confidence, normalize, num_groups, resolve_attention, row_of_tokens
from .padding import mapped_mask
from .plan import EVERY, LocationError, Plan, as_tokens, pooled_logits, score_tokens
from .pools import attended, pool_rows, pool_tokens
from .probe import probe
from .probe_inputs import batch_size
from .recording import logits_of, original_forward
from .tolerance import relative_error, within_rounding

HOOKS = "mm_hf_hooks"  # the attribute of a model that holds its LocationHooks


class StalePlanError(LocationError):
    """The model has changed since it was probed, and its plan no longer reproduces its logits."""


@dataclass
class LocationOutput:
    """Output of one forward for a batch and its locations.

    Attributes:
        logits: (b, c), the model's own; (b, n, c) or (b, c, h, w) for a model that labels every location.
        token_logits: (b, r, c), the model's head applied at every location, or None if not requested.
        mask: (b, r), True for locations of the example; False for padding and special tokens.
        attention: (b, r) in float32, zero off the mask, with sum 1 for each example that has locations.
        labels: (b, r) for models that label every location, else None.
    """

    logits: Tensor
    token_logits: Tensor | None = None
    mask: Tensor | None = None
    attention: Tensor | None = None
    labels: Tensor | None = None


def extract(model: nn.Module, attention: str = "auto", **inputs: Any) -> LocationOutput:
    """Compute logits, per-location logits, mask and attention of a batch in one forward of an unmodified model.

    The first call probes the model, which takes a second, small forward. In evaluation mode, later calls compare the
    plan's logits with the model's and probe again if they differ.

    Args:
        model: A Transformers classification model.
        attention: Confidence of the locations. "cls": attention of the token that the head reads, or of the query by
            which it pools the tokens. "mean": mean attention of all tokens. "gap": similarity of a location's features
            to their mean. "cam": logit of the label, needs `labels`. "uniform": the same for all. "auto": "cls" if the
            head reads a single token or pools by attention, "uniform" if the model labels every location, else "gap".
        inputs: Keyword arguments of the model's forward. `labels` are used for "cam" and not passed to the model.

    Returns:
        The output, without a gradient in its attention.

    Raises:
        LocationError: The model gives no per-location logits, or does not have the requested attention.

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
    model = getattr(model, "_orig_mod", model)  # of a module that torch.compile returned
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
                pass
    plan = _plans[model] = probe(model, inputs)
    with temporary_hooks(model, plan) as hooks:
        return _forward(model, hooks, attention, labels, inputs)


_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def _forward(
    model: nn.Module, hooks: LocationHooks, attention: str, labels: Tensor | None, inputs: dict[str, Any]
) -> LocationOutput:
    kind = resolve_attention(attention, hooks.plan)
    with hooks.capture(inputs, kind):
        logits = logits_of(original_forward(model, inputs))
        output = hooks.to_output(model, logits, inputs, kind, labels, detach=True)
        if not model.training and hooks.plan.pool != EVERY:
            hooks.check(model, logits, inputs)
    return output


@contextmanager
def temporary_hooks(model: nn.Module, plan: Plan) -> Iterator[LocationHooks]:
    """Install the hooks of a plan and remove them on exit."""
    hooks = LocationHooks(model, plan)
    try:
        yield hooks
    finally:
        hooks.remove()


class LocationHooks(ModuleHooks):
    """Hooks of a plan: one on the source of the tokens and, if the attention can be read, one on the attention module.

    They stay installed and are active only inside of `capture`. Installing a hook anew for each forward would make
    torch.compile recompile each time; a flag does not. A copy of the model has no hooks.

    Attributes:
        plan: The plan.
        modules: The modules with a hook.
        active: Capture the next forward.
        source: The tensor at the plan's source, after the forward inside of `capture`.
        attention_hook: Hook on the attention module, or None.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.plan = plan
        self.active = False
        self.source: Tensor | None = None
        self.attention_hook: AttentionHook | None = None
        self.model = model
        source = model.get_submodule(plan.source)
        self.modules = [source]
        self._handle = source.register_forward_hook(self._store_source, with_kwargs=True)
        attach(source)
        if plan.attention is not None:
            assert plan.attention_base is not None
            module = model.get_submodule(plan.attention)
            self.modules.append(module)
            self.attention_hook = AttentionHook(module, plan.attention_base)
        attach(model, **{HOOKS: self})

    def remove(self) -> None:
        """Restore the model."""
        self._handle.remove()
        if self.attention_hook is not None:
            self.attention_hook.remove()
        detach(self.modules[0])
        if self.model.__dict__.get(HOOKS) is self:
            detach(self.model, HOOKS)

    @contextmanager
    def capture(self, inputs: Mapping[str, Any], kind: str, detach: bool = True) -> Iterator[None]:
        """Store the tokens of the forward inside, and the attention that `kind` needs; delete both on exit.

        Args:
            inputs: Keyword arguments of the forward.
            kind: Kind of attention, as `resolve_attention` returns it.
            detach: Store the attention without a gradient.
        """
        hook = self.attention_hook if kind in READ_KINDS else None
        self.active = True
        try:
            if hook is not None:
                index = None if kind == "mean" else self._query_index(inputs)
                hook.begin(batch_size(inputs) * num_groups(self.plan.keys), index, detach)
            yield
        finally:
            self.active, self.source = False, None
            if hook is not None:
                hook.end()

    def _store_source(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Only the first call counts: `to_output` calls the head's modules again on every location.
        if not self.active or self.source is not None:
            return
        if self.plan.side == "input":
            self.source = args[0] if args else next(iter(kwargs.values()))
        else:
            self.source = output if self.plan.key is None else output[self.plan.key]

    def _query_index(self, inputs: Mapping[str, Any]) -> int | Tensor:
        """Return the position of the query whose attention is read, or one position per example."""
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
        """Convert what was captured to a `LocationOutput`. Call it inside of `capture`, after the forward.

        Args:
            model: The model.
            logits: Its logits.
            inputs: Keyword arguments of the forward.
            kind: Kind of attention, as `resolve_attention` returns it.
            labels: (b,) or (b, c), for "cam".
            detach: Return the attention without a gradient.
            score: Apply the head at every location. If False, it is not applied for attention that is read from the
                model.

        Raises:
            StalePlanError: The source was not called.
        """
        plan = self.plan
        if self.source is None:
            raise StalePlanError(
                f"{type(model).__name__} did not call {plan.source!r} in this forward, which returned the tokens when "
                "the model was probed: the model has changed, or skips layers at random (set layerdrop in its config "
                f"to 0). Remove the wrapping and wrap it again.\n{plan}"
            )
        tokens = as_tokens(self.source, plan.layout)
        row = None
        if kind in READ_KINDS:
            if self.attention_hook is None or self.attention_hook.row is None:
                raise LocationError(
                    f"{type(model).__name__} did not compute the attention of {plan.attention!r} in this forward. If "
                    "its config has a layerdrop, which skips layers at random, set it to 0; or use another attention."
                )
            row = row_of_tokens(self.attention_hook.row, tokens.shape[1], plan.keys)[:, plan.prefix :]
        token_logits: Tensor | None
        if plan.pool == EVERY:
            features = token_logits = logits if logits.ndim == 3 else logits.flatten(2).mT
            mask = attended(inputs, features)
        else:
            features = tokens[:, plan.prefix :]
            mask = self._location_mask(inputs, tokens)[:, plan.prefix :]
            scored = features
            if "|" in plan.pool:
                first = pool_tokens(tokens, plan.pool.split("|")[0], inputs)
                scored = torch.cat([first[:, None].expand_as(features), features], dim=-1)
            token_logits = score_tokens(model, plan, scored) if score or row is None else None
        weights = confidence(kind, row, features, mask, token_logits, labels)
        attention = normalize(weights.detach() if detach else weights, mask)
        return LocationOutput(logits, token_logits, mask, attention)

    def _location_mask(self, inputs: Mapping[str, Any], tokens: Tensor) -> Tensor:
        """Return the mask (b, n) of tokens that are attended to and, in a text, are not special tokens."""
        plan = self.plan
        mask = mapped_mask(inputs, tokens.shape[1], plan.padding)
        mask = attended(inputs, tokens) if mask is None else mask
        if plan.pool == "mean[nonzero]":
            mask = pool_rows(tokens, plan.pool, inputs)
        if plan.text or plan.padding == "last":
            ids = inputs.get("input_ids")
            if ids is not None:
                ids = F.pad(ids, (mask.shape[1] - ids.shape[1], 0), value=-1)  # virtual tokens come first
            for special in plan.special_ids if ids is not None else ():
                mask = mask & (ids != special)
            if plan.pool.startswith("token[0]"):  # a CLS token that special_ids may lack
                mask = mask & (torch.arange(mask.shape[1], device=mask.device) > 0)
        return mask

    def check(self, model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]) -> None:
        """Check that the plan reproduces the logits of this forward. Call it inside of `capture`, in evaluation mode.

        Raises:
            StalePlanError: It does not.
        """
        assert self.source is not None
        tokens = as_tokens(self.source, self.plan.layout)
        with torch.no_grad():
            error = relative_error(pooled_logits(model, self.plan, tokens, inputs), logits)
        if not within_rounding(error, logits.dtype, slack=10):
            raise StalePlanError(
                f"The plan of {type(model).__name__} misses its logits by {error:.1e} (relative): the model has "
                f"changed since it was probed.\n{self.plan}"
            )
