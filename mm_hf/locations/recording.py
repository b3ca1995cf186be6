"""Record one forward of an unmodified model: arguments and results of its modules, and its attention.

record(model, batch)
    few examples, varied so that different pools read different tokens      probe_inputs.py
    one forward in evaluation mode, with hooks on all modules               modes.py
    every call of an attention function                                     attention/recording.py
  -> Recording(model, inputs, logits, calls, attention_calls, prefixes, operations)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .attention.recording import AttentionCall, OpenCall, record_attention
from .modes import probing_mode
from .operations import OperationCounter
from .plan import LocationError
from .prefix import PrefixMode
from .probe_inputs import batch_size, few_examples, num_labels_of, varied_examples
from .tolerance import relative_error, within_rounding

CROSS_ATTENTION_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
SUPPORTED = (
    "MultiMix trains classification models: AutoModelForImage-, Sequence-, Audio- and VideoClassification, with logits "
    "of shape (batch, labels), and AutoModelForTokenClassification and SemanticSegmentation, which label locations. "
    "Models for generation, masked language modeling or embeddings have no labels to mix"
)


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: Name of the module.
        began: Position of the call's beginning among all beginnings and ends of calls.
        ended: Position of its end.
        argument: The first tensor argument with features, or None.
        results: Tensors with features in the output, by field or index; under None if the output is one tensor.
    """

    name: str
    began: int
    ended: int
    argument: Tensor | None
    results: dict[str | int | None, Tensor]

    @property
    def result(self) -> Tensor | None:
        """The output, or the first one of several in a tuple, or None."""
        return self.results.get(None, self.results.get(0))

    def returns(self, target: Tensor) -> bool:
        """Return True if the output is `target` (b, d) up to rounding."""
        return within_rounding(self.error(target), target.dtype)

    def error(self, target: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> float:
        """Return the relative error of the output, after an activation, against `target` (b, d)."""
        result = self._vectors(target)
        if result is None:
            return math.inf
        return relative_error(result if activation is None else activation(result), target)

    def scale_to(self, target: Tensor) -> float | None:
        """Return the number by which the output was multiplied to give `target` (b, d), or None if it was not."""
        result = self._vectors(target)
        if result is None:
            return None
        result, expected = result.detach().double(), target.detach().double()
        scale = round(float((result * expected).sum() / result.square().sum().clamp(min=1e-30)), 6)
        error = relative_error(scale * result, expected)
        return scale if scale and within_rounding(error, target.dtype) else None

    def _vectors(self, target: Tensor) -> Tensor | None:
        """Return the output as one vector per example, or None if it has not the shape of `target`."""
        result = self.result
        if result is None or not is_vector(result):
            return None
        vectors = result.flatten(1)
        return vectors if vectors.shape == target.shape else None


@dataclass
class Recording:
    """One recorded forward on a few examples.

    Attributes:
        model: The model.
        inputs: Keyword arguments of the forward.
        logits: The model's logits.
        calls: Calls of its modules, in the order in which they ended.
        attention_calls: Calls of functions that compute attention.
        prefixes: Number of tokens before those of the input, such as a CLS token, by the length of the sequence.
        operations: Number of floating-point operations of the forward.
    """

    model: nn.Module
    inputs: dict[str, Any]
    logits: Tensor
    calls: list[Call]
    attention_calls: list[AttentionCall]
    prefixes: dict[int, int]
    operations: int

    def prefix_length(self, n: int) -> int:
        """Return how many of n tokens are not from the input; n if the model has split these off by themselves."""
        return self.prefixes.get(n, n if n in self.prefixes.values() else 0)

    @property
    def input_pointers(self) -> set[int]:
        """Addresses of the inputs: a module's argument at one of them is an input and not a feature."""
        return {v.data_ptr() for v in self.inputs.values() if isinstance(v, Tensor)}


def record(model: nn.Module, inputs: Mapping[str, Any]) -> Recording:
    """Record one forward on a few examples in evaluation mode.

    The examples are varied where heads would be indistinguishable on the batch as it is, see `varied_examples`.

    Raises:
        LocationError: The output has no logits of a kind that mixing can use.
    """
    few = few_examples(inputs)
    varied = varied_examples(model, few)
    if varied is not None:
        try:
            recording = _record_forward(model, varied)
            if recording.logits.isfinite().all():
                return recording
        except LocationError:
            raise
        except Exception:  # The model does not accept the varied batch: record the original one.
            pass
    return _record_forward(model, few)


def _record_forward(model: nn.Module, inputs: dict[str, Any]) -> Recording:
    """Record a forward and count its operations; without counting if the model does not accept a counter."""
    try:
        return _record_calls(model, inputs, OperationCounter())
    except LocationError:
        raise
    except Exception:  # of flex attention, for example: torch.compile does not support a counter of operations
        return _record_calls(model, inputs, None)


def _record_calls(model: nn.Module, inputs: dict[str, Any], counter: OperationCounter | None) -> Recording:
    calls: list[Call] = []
    stack: list[OpenCall] = []
    clock = itertools.count()

    def on_begin(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stack.append(OpenCall(name, module, next(clock), _is_cross_attention(module, args, kwargs)))

        return hook

    def on_end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = stack.pop()
        argument = next((x for x in (*args, *kwargs.values()) if is_features(x)), None)
        calls.append(Call(call.name, call.began, next(clock), argument, _feature_tensors(output)))

    handles: list[Any] = []
    try:
        with (
            probing_mode(model),
            record_attention(lambda: stack[-1] if stack else None) as attention_calls,
            PrefixMode() as prefix_mode,
        ):
            for name, module in model.named_modules():
                if name:
                    handles.append(module.register_forward_pre_hook(on_begin(name), with_kwargs=True))
                    handles.append(module.register_forward_hook(on_end, with_kwargs=True))
            with contextlib.nullcontext() if counter is None else counter:
                output = original_forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    logits = _checked_logits(model, output, inputs)
    operations = 0 if counter is None else counter.operations
    return Recording(model, inputs, logits, calls, attention_calls, prefix_mode.lengths, operations)


def original_forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run the forward of the model's class, not one that Accelerate or mixing has put in its place."""
    forward = functools.partial(type(model).forward, model) if "forward" in model.__dict__ else model
    return forward(**inputs, **({"return_dict": True} if takes_return_dict(type(model).forward) else {}))


def takes_return_dict(forward: Callable[..., Any]) -> bool:
    """Return True if a forward has the argument `return_dict`, as those of Transformers' own models."""
    parameters = inspect.signature(forward).parameters.values()
    return any(p.name == "return_dict" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def logits_of(output: Any) -> Any:
    """Return the logits of a model's output, or None. (b, 1, c) is returned as (b, c).

    They are the output itself if it is a tensor, the field `logits` or the only field of a dictionary, and the first
    tensor with a dimension beyond that of the batch in a tuple.
    """
    logits: Any = None
    if isinstance(output, Tensor):
        logits = output
    elif isinstance(output, Mapping):
        logits = output.get("logits", next(iter(output.values())) if len(output) == 1 else None)
    elif isinstance(output, (tuple, list)):
        logits = next((x for x in output if isinstance(x, Tensor) and x.ndim > 1), None)
    return logits.squeeze(1) if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[1] == 1 else logits


def _checked_logits(model: nn.Module, output: Any, inputs: Mapping[str, Any]) -> Tensor:
    logits = logits_of(output)
    batch, labels = batch_size(inputs), num_labels_of(model)
    fits = isinstance(logits, Tensor) and len(logits) == batch
    if fits and (logits.ndim == 2 or (logits.ndim in (3, 4) and logits.shape[-1 if logits.ndim == 3 else 1] == labels)):
        return logits
    got = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
    raise LocationError(f"{type(model).__name__} returns {got} for {batch} examples and {labels} labels. {SUPPORTED}.")


def _is_cross_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if the call gets other tokens to attend to than its own."""
    parameters = inspect.signature(type(module).forward).parameters
    arguments = {**dict(zip(list(parameters)[1:], args)), **kwargs}
    return any(isinstance(arguments.get(name), Tensor) for name in CROSS_ATTENTION_ARGUMENTS)


def _feature_tensors(output: Any) -> dict[str | int | None, Tensor]:
    """Return the tensors with features in a module's output, by field or index; under None if it is one tensor."""
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Tensor):
        items = [(None, output)]
    elif isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    return {k: v for k, v in items if is_features(v)}


def is_features(x: Any) -> bool:
    """Return True if `x` may hold features of a batch of examples."""
    return isinstance(x, Tensor) and x.is_floating_point() and 2 <= x.ndim <= 5


def is_vector(x: Tensor) -> bool:
    """Return True for one vector per example, with or without dimensions of size 1 for a single token or pixel."""
    return x.ndim == 2 or (x.ndim == 3 and 1 in x.shape[1:]) or (x.ndim == 4 and x.shape[2:] == (1, 1))
