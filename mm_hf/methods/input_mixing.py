"""Input mixing of MultiMix and Dense MultiMix: mini-batches that get mixup or CutMix instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import is_distributed, raise_if_uneven_inputs
from .base import Mixing
from .cutmix import CutMix
from .mixup import Mixup, real_inputs

INPUT_METHODS: dict[str, tuple[Mixing, ...]] = {
    "none": (),
    "mixup": (Mixup(),),
    "cutmix": (CutMix(),),
    "mixup_cutmix": (Mixup(), CutMix()),
}
SIGNALS = {"pixel_values", "pixel_values_videos", "input_values", "input_features"}  # images, videos, audio


def is_mixable(inputs: Mapping[str, Any], labels: Tensor) -> bool:
    """Return True for images, videos or audio with one label per example, which DenseMultiMix mixes by default."""
    one_per_example = labels.ndim == 1 or labels.is_floating_point()
    text = any(inputs.get(name) is not None for name in ("input_ids", "inputs_embeds"))
    # Rows of patches of images of different shapes (NaFlex) do not correspond to the same place in each image.
    variable_shapes = inputs.get("spatial_shapes") is not None
    signals = SIGNALS & set(real_inputs(inputs, len(labels)))
    return one_per_example and len(labels) > 1 and bool(signals) and not text and not variable_shapes


def rising_share(epoch: float, start: float) -> float:
    """Return the share 1 - start / epoch, which is 0 until epoch `start` and then rises towards 1."""
    return max(0.0, 1.0 - start / epoch) if epoch > 0 else float(start == 0)


def draw_input_method(methods: Sequence[Mixing], prob: float, same_on_all_ranks: bool = False) -> Mixing | None:
    """Return one of the methods with probability `prob`, each equally likely, else None.

    With `same_on_all_ranks`, all ranks return the choice of rank 0.
    """
    choice = None
    # Drawn on the CPU on every device: Python branches on the result, and a draw on a GPU would synchronize.
    if prob and float(torch.rand(())) < prob:
        choice = 0 if len(methods) == 1 else int(torch.randint(len(methods), ()))
    if same_on_all_ranks and is_distributed():  # different choices would deadlock
        raise_if_uneven_inputs("One choice of input mixing for all ranks", 'use input_mixing="none"')
        choices = [choice]
        torch.distributed.broadcast_object_list(choices)
        (choice,) = choices
    return None if choice is None else methods[choice]
