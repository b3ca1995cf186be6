"""CutMix: a region of another example pasted into each example."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed import rank_generator
from ..functional import Criterion
from ..locations.pools import MASKS
from ..locations.probe_inputs import config_of
from .pairs import PairMixing, draw_factor, draw_partners, targets_of
from .settings import setting

Span = tuple[int, int]  # start and end on one axis
Box = tuple[int, int, int, int]  # top, bottom, left and right of a rectangle


@dataclass
class CutMix(PairMixing):
    """CutMix: a random region of each example is replaced by that of another one; labels are mixed by its exact share.

    In images (batch, channels, height, width) and videos (batch, frames, channels, height, width), the region is a
    rectangle, the same in all frames. In sequences and audio, it is a contiguous stretch of time: (batch, time),
    (batch, features, time), (batch, time, features), and images with a height or width of 1. Texts are not supported.

    One region is drawn per mini-batch. Its center lies anywhere, so that the border may clip it. An example keeps the
    share of its label that is left of it after clipping.

    The time axis of a three-dimensional input is the one that the attention mask fits; else not the one of length
    `config.num_mel_bins`; else the longer one.

    With an attention mask (batch, time), the stretch is drawn over the padded length, and only time that is valid in
    both examples is replaced. The mask stays as it is, and the share of the label is that of the example's own valid
    time.

    Args:
        alpha: Parameter of the symmetric Beta distribution of the share that an example keeps before clipping.

    Raises:
        ValueError: `alpha` is not positive; or, at the first mini-batch, the inputs cannot be cut.

    Source:
        Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.
        The stretch of time is our choice.

    Example:
        >>> CutMix().to_dict()
        {'method': 'cutmix', 'alpha': 1.0}
    """

    name: ClassVar[str] = "cutmix"

    alpha: float = setting(1.0, "Parameter of the Beta distribution of the share that is kept.", within="(0, inf)")

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        signal_of(inputs, model, type(self).__name__)

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Paste the region, and mix the labels by its share."""
        pasted = self.paste(inputs, model)
        targets = targets_of(labels, model, criterion)
        return pasted.inputs, targets.lerp(targets[pasted.partner], pasted.share)

    def paste(self, inputs: dict[str, Any], model: nn.Module) -> Pasted:
        """Draw a region and partners, and paste."""
        signal = signal_of(inputs, model, type(self).__name__)
        x: Tensor = inputs[signal.name]
        generator = rank_generator("cpu")
        sizes = [x.shape[axis] for axis in signal.axes]
        spans = draw_spans(sizes, draw_factor(self.alpha, generator), generator)
        partner = draw_partners(len(x), generator, x.device)
        share: float | Tensor
        if signal.mask is None:
            region = [slice(None)] * x.ndim
            for axis, span in zip(signal.axes, spans, strict=True):
                region[axis] = slice(*span)
            mixed = x.clone()
            mixed[tuple(region)] = x[tuple(region)][partner]
            share = math.prod(end - start for start, end in spans) / math.prod(sizes)
        else:
            valid = signal.mask.bool()
            replaced = valid & valid[partner]
            start, end = spans[0]
            replaced[:, :start] = replaced[:, end:] = False
            share = (replaced.sum(dim=1) / valid.sum(dim=1).clamp(min=1))[:, None]
            mixed = torch.where(_along(replaced, x, signal.axes[0]), x[partner], x)
        cut = dict(zip(signal.axes, spans, strict=True))
        return Pasted({**inputs, signal.name: mixed}, partner, cut, share)


@dataclass(frozen=True)
class Pasted:
    """A mini-batch with a pasted region.

    Attributes:
        inputs: Inputs of the model's forward.
        partner: (b,) the example that each region comes from.
        spans: Start and end of the region on each axis that is cut; axes count from the last one, -1.
        share: Share of each example that was replaced: one number, or (b, 1).
    """

    inputs: dict[str, Any]
    partner: Tensor
    spans: dict[int, Span]
    share: float | Tensor


@dataclass(frozen=True)
class Signal:
    """The input that is cut.

    Attributes:
        name: Its name.
        axes: Axes that are cut: height and width, or time; they count from the last one, -1.
        mask: (b, time) mask of valid time, if there is one.
    """

    name: str
    axes: tuple[int, ...]
    mask: Tensor | None = None


def signal_of(inputs: Mapping[str, Any], model: nn.Module | None, method: str) -> Signal:
    """Find the one input that can be cut.

    Raises:
        ValueError: None or several inputs can be cut, or there are others that a cut would not fit.
    """
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    masks = [v for k, v in tensors.items() if k in MASKS]
    names = [k for k, v in tensors.items() if v.is_floating_point() and k not in (*MASKS, "inputs_embeds")]
    if len(names) == 1 and len(masks) <= 1 and len(names) + len(masks) == len(tensors):
        x, mask = tensors[names[0]], masks[0] if masks else None
        if x.ndim in (4, 5) and mask is None:
            return Signal(names[0], tuple(axis for axis in (-2, -1) if x.shape[axis] > 1) or (-1,))
        if x.ndim == 2 and (mask is None or mask.shape == x.shape):
            return Signal(names[0], (-1,), mask)
        if x.ndim == 3:
            axis = time_axis(x, mask, getattr(config_of(model), "num_mel_bins", None))
            if axis is not None:
                return Signal(names[0], (axis,), mask)
            raise ValueError(
                f"{method} cannot tell time from features in {names[0]} {tuple(x.shape)}: give an attention_mask "
                "(batch, time), or use Mixup, ManifoldMixup, MultiMix or DenseMultiMix."
            )
    raise _cannot_cut(
        method,
        "images (batch, channels, height, width), videos (batch, frames, channels, height, width) or audio and "
        "sequences (batch, time), (batch, features, time) or (batch, time, features)",
        tensors,
    )


def can_cut(inputs: Mapping[str, Any]) -> bool:
    """Return True if the inputs have one signal that can be cut, whatever the model."""
    try:
        signal_of(inputs, None, CutMix.__name__)
    except ValueError:
        return False
    return True


def time_axis(x: Tensor, mask: Tensor | None = None, num_features: int | None = None) -> int | None:
    """Return the axis of time, -1 or -2, of an input (b, features, time) or (b, time, features); None if it is unclear.

    Example:
        >>> import torch
        >>> time_axis(torch.zeros(4, 80, 3000)), time_axis(torch.zeros(4, 1024, 128))
        (-1, -2)
        >>> time_axis(torch.zeros(4, 50, 80)), time_axis(torch.zeros(4, 50, 80), num_features=80)
        (-1, -2)
    """
    axes = [-2, -1]
    if mask is not None:
        axes = [axis for axis in axes if mask.shape == (len(x), x.shape[axis])]
    of_features = [axis for axis in axes if x.shape[axis] == num_features]
    if len(axes) == 2 and len(of_features) == 1:
        axes.remove(of_features[0])
    if len(axes) == 2 and x.shape[-2] != x.shape[-1]:
        axes = [max(axes, key=lambda axis: x.shape[axis])]
    return axes[0] if len(axes) == 1 else None


def image_of(inputs: Mapping[str, Any], method: str) -> str:
    """Return the name of the one input that is images (b, channels, height, width).

    Raises:
        ValueError: There are other tensors, or none.
    """
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    images = [k for k, v in tensors.items() if v.is_floating_point() and v.ndim == 4]
    if len(images) == len(tensors) == 1:
        return images[0]
    raise _cannot_cut(method, "images (batch, channels, height, width)", tensors)


def _cannot_cut(method: str, kinds: str, tensors: Mapping[str, Tensor]) -> ValueError:
    has = ", ".join(f"{k} {tuple(v.shape)}" for k, v in tensors.items()) or "no tensor"
    return ValueError(
        f"{method} cuts and pastes {kinds} and nothing else, and this batch has {has}: use Mixup, ManifoldMixup, "
        "MultiMix or DenseMultiMix."
    )


def draw_spans(sizes: Sequence[int], kept: float, generator: torch.Generator) -> list[Span]:
    """Draw a region of the input's proportions and 1 - `kept` of its size, clipped: start and end on each axis.

    Example:
        >>> import torch
        >>> ((start, end),) = draw_spans([1000], 0.75, torch.Generator().manual_seed(0))
        >>> 125 <= end - start <= 250
        True
    """
    spans = []
    for size in sizes:
        half = int(size * (1 - kept) ** (1 / len(sizes))) // 2
        center = int(torch.randint(size, (), generator=generator))
        spans.append((max(center - half, 0), min(center + half, size)))
    return spans


def draw_box(height: int, width: int, kept: float, generator: torch.Generator) -> Box:
    """Draw a rectangle (top, bottom, left, right) of an image: see `draw_spans`.

    Example:
        >>> import torch
        >>> top, bottom, left, right = draw_box(32, 48, 0.75, torch.Generator().manual_seed(0))
        >>> bottom - top <= 16 and right - left <= 24
        True
    """
    (top, bottom), (left, right) = draw_spans([height, width], kept, generator)
    return top, bottom, left, right


def area(box: Box) -> int:
    """Return the number of pixels of a rectangle."""
    top, bottom, left, right = box
    return (bottom - top) * (right - left)


def _along(mask: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return a mask (b, time) with the dimensions of x, whose time is on an axis."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = mask.shape
    return mask.view(shape)
