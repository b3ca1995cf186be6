"""Checks at the first mini-batch of what would otherwise fail, or mix nothing, at a later step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import Criterion
from ..locations import Plan
from ..locations.attention.weights import NO_CLASSES, READ_KINDS
from ..locations.pools import MASKS
from ..locations.probe_inputs import config_of


def check_attention(attention: str, criterion: Criterion) -> None:
    """Check that the labels have classes if the attention depends on them.

    Raises:
        ValueError: They are those of a regression.
    """
    if attention == "cam" and criterion == "mse":
        raise ValueError(NO_CLASSES)


def check_words(inputs: Mapping[str, Any], plan: Plan) -> None:
    """Check that the texts of the first mini-batch have other tokens than special ones.

    Raises:
        ValueError: All of their tokens are special tokens, which are no locations.
    """
    ids = inputs.get("input_ids")
    if not plan.special_ids or not isinstance(ids, Tensor):
        return
    special = torch.isin(ids, torch.tensor(plan.special_ids, device=ids.device))
    masks = [inputs[name] for name in MASKS if isinstance(inputs.get(name), Tensor)]
    padding = masks[0] == 0 if masks and masks[0].shape == ids.shape else torch.zeros_like(special)
    if bool((special | padding).all()):
        first = ", ".join(map(str, plan.special_ids[:5])) + (", ..." if len(plan.special_ids) > 5 else "")
        raise ValueError(
            f"All tokens of the first mini-batch are special tokens, which are not mixed: the tokenizer and the config "
            f"declare {len(plan.special_ids)} special ids ({first}). Add words to the tokenizer as ordinary tokens, or "
            "use MultiMix, which mixes complete texts."
        )


def check_layerdrop(model: nn.Module, method: str, plan: Plan | None = None, attention: str | None = None) -> None:
    """Check that a model does not skip a layer at random whose features or attention the method needs.

    Args:
        model: The model.
        method: Name of the method.
        plan: Plan of the model's locations; None for a method that mixes the input of a layer.
        attention: Kind of attention that the method reads.

    Raises:
        ValueError: It does, with a probability that the message names.
    """
    share = _layerdrop(model)
    needed = plan is None or attention in READ_KINDS or any(part.isdigit() for part in plan.source.split("."))
    if share and needed:
        raise ValueError(
            f"{type(model).__name__} skips each layer with probability {share:g} in training (layerdrop), and {method} "
            "needs every layer: load the model with layerdrop=0, as in from_pretrained(..., layerdrop=0.0)."
        )


def _layerdrop(model: nn.Module) -> float:
    """Return the largest probability with which a module skips layers: its own, or that of the config."""
    found = [module.__dict__.get("layerdrop") for module in model.modules()]
    found.append(getattr(config_of(model), "layerdrop", None))
    return max((float(value) for value in found if isinstance(value, (int, float))), default=0.0)
