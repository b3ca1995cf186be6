"""One forward of an unmodified model on a few examples: what each module took and gave, and who attended to what."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention.capture import AttentionCall, Running, watch_attention
from .modes import probing_mode
from .plan import LocationError
from .pools import MASKS

PROBE_EXAMPLES = 4
NOT_INPUTS = ("labels", "num_items_in_batch")
CROSS = ("key_value_states", "encoder_hidden_states")
SUPPORTED = (
    "MultiMix trains models that classify: AutoModelForImage-, Sequence-, Audio- and VideoClassification, whose logits "
    "have the shape (batch, labels), and AutoModelForTokenClassification and SemanticSegmentation, which label locations. "
    "Models that generate, fill masks or compare embeddings have no labels to mix"
)


@dataclass
class Call:
    """One call of a module: its first tensor argument, its tensor results, and when it began and ended."""

    name: str
    began: int
    ended: int
    argument: Tensor | None
    results: dict[str | int | None, Tensor]


@dataclass
class Recording:
    """What one forward on a few examples showed."""

    model: nn.Module
    inputs: dict[str, Any]
    logits: Tensor
    calls: list[Call]
    attention_calls: list[AttentionCall]

    @property
    def input_pointers(self) -> set[int]:
        """Where the inputs lie in memory: what a module got of them unchanged is no feature."""
        return {v.data_ptr() for v in self.inputs.values() if isinstance(v, Tensor)}


def record(model: nn.Module, inputs: Mapping[str, Any]) -> Recording:
    """Run one forward on a few examples in evaluation mode and keep what the modules took and gave.

    Examples are changed a little where that tells apart heads that are the same on the batch at hand: see `_varied`.

    Raises:
        LocationError: The output has no logits of a kind that mixing can use.
    """
    inputs = _few_examples({k: v for k, v in inputs.items() if k not in NOT_INPUTS})
    varied = _varied(model, inputs)
    if varied is not None:
        try:
            recording = _record(model, varied)
            if recording.logits.isfinite().all():
                return recording
        except LocationError:
            raise
        except Exception:  # a model that does not take such a batch: then as it came
            pass
    return _record(model, inputs)


def _record(model: nn.Module, inputs: dict[str, Any]) -> Recording:
    calls: list[Call] = []
    running: list[Running] = []
    clock = itertools.count()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append(Running(name, module, next(clock), _attends_elsewhere(module, args, kwargs)))

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        this = running.pop()
        argument = next((x for x in (*args, *kwargs.values()) if is_features(x)), None)
        calls.append(Call(this.name, this.began, next(clock), argument, _tensors(output)))

    handles: list[Any] = []
    try:
        with probing_mode(model), watch_attention(lambda: running[-1] if running else None) as attention_calls:
            for name, module in model.named_modules():
                if name:
                    handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
                    handles.append(module.register_forward_hook(after, with_kwargs=True))
            output = plain_call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Recording(model, inputs, _logits(model, output, inputs), calls, attention_calls)


def plain_call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's own forward: not one that was put in its place, with autocast (accelerate) or mixing."""
    forward = functools.partial(type(model).forward, model) if "forward" in model.__dict__ else model
    return forward(**inputs, return_dict=True)


def logits_of(output: Any) -> Any:
    """A model's logits in its output: by their name, or the only thing there is; (b, 1, c) as (b, c)."""
    logits = output.get("logits", next(iter(output.values())) if len(output) == 1 else None)
    return logits.squeeze(1) if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[1] == 1 else logits


def _logits(model: nn.Module, output: Any, inputs: Mapping[str, Any]) -> Tensor:
    logits = logits_of(output)
    batch, labels = batch_size(inputs), model.config.num_labels  # type: ignore[union-attr]
    fits = isinstance(logits, Tensor) and len(logits) == batch
    if fits and (logits.ndim == 2 or (logits.ndim in (3, 4) and logits.shape[-1 if logits.ndim == 3 else 1] == labels)):
        return logits
    said = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
    raise LocationError(f"{type(model).__name__} returns {said} for {batch} examples and {labels} labels. {SUPPORTED}.")


def _attends_elsewhere(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module was given other tokens to attend to than its own: cross-attention."""
    parameters = inspect.signature(type(module).forward).parameters
    given = {**dict(zip(list(parameters)[1:], args)), **kwargs}
    return any(isinstance(given.get(name), Tensor) for name in CROSS)


def _few_examples(inputs: dict[str, Any]) -> dict[str, Any]:
    batch = batch_size(inputs)
    # Cloned: tensors made in inference mode take no part in a backward pass.
    return {
        k: v[:PROBE_EXAMPLES].clone() if isinstance(v, Tensor) and v.ndim > 0 and len(v) == batch else v
        for k, v in inputs.items()
    }


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Number of examples in the keyword arguments of a forward."""
    batch = next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 0), None)
    if batch is None:
        raise ValueError(f"The inputs {sorted(inputs)} hold no tensor to probe the model with.")
    return batch


def _varied(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The batch with two examples changed so that different pools read different tokens, or None if it has no padding.

    In a batch without padding the last token, the last word and the end of the sentence are all the same; in a later
    batch they are not. So one example is cut shorter and padded, and in one the end of the sentence is moved forward and
    what follows left out of the attention mask.
    """
    b = batch_size(inputs)
    inputs = {
        k: v[torch.arange(PROBE_EXAMPLES, device=v.device) % b]
        if isinstance(v, Tensor) and v.ndim and len(v) == b
        else v
        for k, v in inputs.items()
    }
    ids = inputs.get("input_ids")
    name = next((k for k in MASKS if isinstance(inputs.get(k), Tensor) and inputs[k].ndim == 2), None)
    shortened, moved = PROBE_EXAMPLES - 2, PROBE_EXAMPLES - 1
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        if name is None:
            return None
        inputs[name] = inputs[name].clone()
        inputs[name][shortened:, 2 * inputs[name].shape[1] // 3 :] = 0
        return inputs
    n = ids.shape[1]
    mask = inputs[name].bool() if name is not None and inputs[name].shape == ids.shape else torch.ones_like(ids).bool()
    left = bool((~mask[:, 0]).any())
    order = torch.arange(n, device=ids.device).repeat(PROBE_EXAMPLES, 1)
    real = [row.nonzero()[:, 0] for row in mask]
    if min(len(real[shortened]), len(real[moved])) < 6:
        return None
    kept = torch.cat(
        [real[shortened][: len(real[shortened]) // 2 - 1], real[shortened][len(real[shortened]) // 2 + 1 :]]
    )
    padding = torch.zeros_like(ids).bool()
    place = slice(n - len(kept), n) if left else slice(0, len(kept))
    padding[shortened] = True
    padding[shortened, place] = False
    order[shortened, place] = kept
    last = real[moved]
    order[moved, last[-3:]] = last[[-1, -3, -2]]
    for k, v in inputs.items():
        if isinstance(v, Tensor) and v.shape[:2] == ids.shape:
            index = order.view(*order.shape, *[1] * (v.ndim - 2)).expand_as(v)
            inputs[k] = v.gather(1, index)
    pad = pad_id(model)
    if pad is not None:
        inputs["input_ids"] = inputs["input_ids"].masked_fill(padding, pad)
    if name is not None and inputs[name].shape == ids.shape:
        inputs[name] = inputs[name].masked_fill(padding, 0)
        inputs[name][moved, last[-1]] = 0
    return inputs


def pad_id(model: nn.Module) -> int | None:
    config: Any = model.config
    return getattr(config.get_text_config(), "pad_token_id", None)


def _tensors(output: Any) -> dict[str | int | None, Tensor]:
    """Floating tensors of a module's output by field or index; None for an output that is a tensor itself."""
    if isinstance(output, Tensor):
        items: list[tuple[Any, Any]] = [(None, output)]
    elif isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    else:
        items = []
    return {k: v for k, v in items if is_features(v)}


def is_features(x: Any) -> bool:
    """Whether something that a module takes or gives may be features of a batch of examples."""
    return isinstance(x, Tensor) and x.is_floating_point() and 2 <= x.ndim <= 5
