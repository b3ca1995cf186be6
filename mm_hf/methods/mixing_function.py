"""Input mixing by any function: torchvision's MixUp and CutMix, timm's Mixup, kornia's, or one of your own."""

from __future__ import annotations

import copy
import functools
import importlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import rank_seed
from ..functional import Criterion
from ..locations.modes import restore_random_state
from ..locations.probe_inputs import num_labels_of
from .mixup import real_inputs
from .pairs import PairMixing, targets_of
from .settings import setting

if TYPE_CHECKING:
    Function = str | Callable[[Tensor, Tensor], Any]
else:  # HfArgumentParser reads an import path
    Function = str

WAYS = (
    "function must return the mixed inputs and their labels, which are class probabilities (b, classes), class indices "
    "(b,), pairs of class indices and the weight of the second (b, 3) as kornia's, or two tensors of class indices and "
    "the weight of the first"
)


@dataclass(eq=False)
class InputMixing(PairMixing):
    """Mixing by a function of inputs and labels: torchvision's, timm's, kornia's, or your own.

    The function is called with the inputs (b, ...) and the labels of each mini-batch in training: class indices (b,) as
    int64, or the labels as they are if they are class probabilities. What it returns decides how its labels are read:

    - inputs and class probabilities (b, classes): `torchvision.transforms.v2.MixUp` and `CutMix`, `timm.data.Mixup`;
    - inputs and (b, 3), the classes of two examples and the weight of the second: `kornia.augmentation.RandomMixUpV2`;
    - inputs and (k, b, 3), the same for each of k cuts: `kornia.augmentation.RandomCutMixV2`. Its weight is the share
      of the cut or of the rest, depending on `use_correct_lambda`. The pixels that change determine which of the two;
    - inputs and class indices (b,), for augmentation that keeps the labels;
    - inputs, two tensors of class indices (b,) and the weight of the first, as `mixup_data` of the authors of mixup.

    The function gets a copy of the inputs and may change it in place. The global random generators of PyTorch, NumPy
    and Python are seeded for each mini-batch and rank and restored afterwards, so that ranks draw different numbers and
    a resumed training run draws the same ones. The method is shared by models that are wrapped with it, not copied.

    Args:
        function: The function, or its import path "module:name". kornia's classes need `data_keys=["input", "class"]`,
            and torchvision's and timm's need `num_classes` equal to the number of labels of the model. timm's smooths
            labels by 0.1 by default, and needs mini-batches of an even size (`dataloader_drop_last=True`).

    Raises:
        ValueError: `function` is not callable or cannot be imported; or, at the first mini-batch, there is not exactly
            one input to mix; or the function raises an error or returns something else.

    Example:
        >>> import torch
        >>> def mix(images, labels):
        ...     partner = images.flip(0)
        ...     return images.lerp(partner, 0.3), labels, labels.flip(0), 0.7
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                                             intermediate_size=16, image_size=8, patch_size=4, num_labels=3))
        >>> images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
        >>> inputs, targets = InputMixing(mix).mix_inputs({"pixel_values": images}, labels, model)
        >>> targets
        tensor([[0.7000, 0.0000, 0.3000],
                [0.3000, 0.0000, 0.7000]])
    """

    name: ClassVar[str] = "input_mixing"

    function: Function = setting(MISSING, "Import path of the mixing function, module:name.", required=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function) and not isinstance(self.function, str):
            raise ValueError(f"function must be callable or its import path, 'module:name', got {self.function!r}.")

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        load_function(self.function)
        input_to_mix(inputs)

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Call the function, and return its inputs and its labels as targets."""
        function, name = load_function(self.function), input_to_mix(inputs)
        given = inputs[name]
        labels = labels if labels.is_floating_point() else labels.long()
        with rank_random_state(given.device):
            try:
                returned = function(given.clone(), labels.clone())
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                raise ValueError(_failure(error, name, given, labels)) from error
        if not isinstance(returned, (tuple, list)) or len(returned) not in (2, 4):
            raise ValueError(f"{WAYS}; it returned {_shown(returned)}.{_remedy(returned)}")
        mixed, *rest = returned
        if not isinstance(mixed, Tensor) or not mixed.is_floating_point() or mixed.shape[:1] != given.shape[:1]:
            raise ValueError(
                f"function must return floating-point inputs of {len(given)} examples, got {_shown(mixed)}."
            )
        found = rest[0] if len(rest) == 1 else tuple(rest)
        return {**inputs, name: mixed}, as_targets(found, given, mixed, labels, model, criterion)

    def to_dict(self) -> dict[str, Any]:
        """Return the method's name, and the import path of the function or else a description of it."""
        described = copy.copy(self)
        described.function = path_of(self.function)
        return super(InputMixing, described).to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InputMixing) and self.to_dict() == other.to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> InputMixing:
        return copy.copy(self)


@contextmanager
def rank_random_state(device: torch.device) -> Iterator[None]:
    """Seed the global generators for this rank inside of a `with` statement, and restore them at its end.

    Args:
        device: Device whose generator is seeded besides that of the CPU.
    """
    seed = rank_seed()
    with restore_random_state(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def input_to_mix(inputs: Mapping[str, Any]) -> str:
    """Return the name of the one tensor among the inputs, which must be floating-point.

    Raises:
        ValueError: There are other tensors, or none.
    """
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    names = real_inputs(tensors, len(next(iter(tensors.values()), ())))
    if len(names) == len(tensors) == 1:
        return names[0]
    has = ", ".join(f"{k} {v.dtype} {tuple(v.shape)}" for k, v in tensors.items()) or "no tensor"
    raise ValueError(
        f"InputMixing mixes one floating-point input, such as pixel_values, and this batch has {has}: use Mixup, "
        "MultiMix or DenseMultiMix."
    )


def as_targets(
    found: Any, given: Tensor, mixed: Tensor, labels: Tensor, model: nn.Module, criterion: Criterion
) -> Tensor:
    """Return the labels that a mixing function returned as targets (b, c).

    Args:
        found: The labels: see [`InputMixing`].
        given: The inputs before mixing.
        mixed: The inputs after mixing.
        labels: The labels before mixing.
        model: The model.
        criterion: Criterion that the labels call for.

    Raises:
        ValueError: The labels have another form.
    """
    num_examples, num_labels = len(given), num_labels_of(model)

    def mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        """Mix labels, with the share (b,) of the second."""
        first, second = (targets_of(y, model, criterion) for y in (first, second))
        return first.lerp(second, share.to(first)[:, None])

    if isinstance(found, (tuple, list)) and len(found) == 3:
        first, second, kept = found
        if all(isinstance(y, Tensor) and y.shape == labels.shape and y.dtype == labels.dtype for y in (first, second)):
            kept = torch.as_tensor(kept, dtype=torch.float32, device=given.device)
            if kept.numel() in (1, num_examples):
                return mix(first, second, (1 - kept).flatten().expand(num_examples))
    if isinstance(found, Tensor):
        shape = tuple(found.shape)
        if shape == tuple(labels.shape) and found.is_floating_point() == labels.is_floating_point():
            return targets_of(found, model, criterion)
        if criterion == "cross_entropy" and found.is_floating_point():
            if shape == (num_examples, num_labels) != (num_examples, 3):
                return found
            if shape[1:] == (num_examples, 3):
                targets = targets_of(labels, model, criterion)
                for (_, second, _), share in zip(found.mT, partner_shares(found[..., 2], given, mixed), strict=True):
                    targets = targets.lerp(targets_of(_indices(second), model, criterion), share.to(targets)[:, None])
                return targets
            if shape == (num_examples, 3):
                if num_labels != 3:
                    return mix(_indices(found[:, 0]), _indices(found[:, 1]), found[:, 2])
                # Probabilities of three classes sum to 1. A pair of classes and a weight would do so in all examples
                # only for weights of exactly 0 or 1.
                is_soft = (found.sum(dim=1) - 1).abs().amax() < 1e-3
                first, second, share = found.masked_fill(is_soft, 0).unbind(dim=1)
                return torch.where(is_soft, found, mix(_indices(first), _indices(second), share))
    expected = f"The model has {num_labels} classes and the mini-batch {num_examples} examples"
    raise ValueError(f"{WAYS}. {expected}; it returned labels {_shown(found)}.")


def partner_shares(weights: Tensor, given: Tensor, mixed: Tensor) -> Tensor:
    """Return the shares (k, b) of each example that k cuts replace, from weights that are these shares or the rest.

    A cut changes at most the pixels that it covers. The reading of the weights is taken that no example contradicts;
    if none is contradicted, the one that is nearer to the share of changed pixels.
    """
    changed = (given != mixed).flatten(2).any(dim=1).float().mean(dim=-1) if given.shape == mixed.shape else 1.0
    readings = torch.stack([weights, 1 - weights])
    covered = 1 - (1 - readings).prod(dim=1)  # of each reading and example
    cost = (1e3 * (changed - covered).clamp(min=0) + (changed - covered).abs()).sum(dim=1)
    return torch.where(cost[0] <= cost[1], readings[0], readings[1])


def _indices(numbers: Tensor) -> Tensor:
    """Return class indices that a function has returned as floating-point numbers.

    Raises:
        ValueError: They are no integers; on a GPU, the check is asynchronous.
    """
    indices = numbers.round()
    equal = (indices == numbers).all()
    if numbers.device.type != "cpu":
        torch._assert_async(equal, "function must return class indices in the first two columns of labels (b, 3).")
    elif not bool(equal):
        raise ValueError(
            f"{WAYS}; it returned labels with 3 columns whose first two are no class indices. Class probabilities must "
            "have one column for each class of the model: set num_classes."
        )
    return indices.long()


def load_function(function: Function) -> Callable[[Tensor, Tensor], Any]:
    """Return a function, imported if its import path is given.

    Raises:
        ValueError: It cannot be imported.
    """
    if not isinstance(function, str):
        return function
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", function):
        raise ValueError(
            f"function must be callable or its import path, 'module:name', got {function!r}. A function that has no "
            "import path is only described in mixing.json and must be given again."
        )
    module, _, name = function.partition(":")
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"function {function!r} cannot be imported: {error}. Add the directory of {module} to PYTHONPATH."
        ) from error
    if not callable(found):
        raise ValueError(f"function {function!r} is not callable, but {type(found).__name__}.")
    return found


def path_of(function: Function) -> str:
    """Return the import path of a function, or a description if it has none, such as an instance.

    Example:
        >>> from torch.nn.functional import normalize
        >>> path_of(normalize), path_of(lambda images, labels: (images, labels))
        ('torch.nn.functional:normalize', '<function <lambda>>')
    """
    if isinstance(function, str):
        return function
    module, name = (getattr(function, attribute, None) for attribute in ("__module__", "__qualname__"))
    with suppress(ValueError):
        if load_function(f"{module}:{name}") is function:
            return f"{module}:{name}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(function))


def _failure(error: Exception, name: str, given: Tensor, labels: Tensor) -> str:
    reason = (str(error).splitlines() or [""])[0] or "no message"
    even = " Mini-batches of an even size: dataloader_drop_last=True." if len(given) % 2 else ""
    return (
        f"function raised {type(error).__name__} for {name} {tuple(given.shape)} and labels {labels.dtype} "
        f"{tuple(labels.shape)}: {reason.rstrip('.')}.{even}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of " + (" and ".join(_shown(x) for x in value) or "nothing")
    return type(value).__name__


def _remedy(returned: Any) -> str:
    return ' kornia\'s classes return labels with data_keys=["input", "class"].' if isinstance(returned, Tensor) else ""
