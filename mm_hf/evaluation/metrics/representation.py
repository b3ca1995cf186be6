"""Metrics of a representation (alignment, uniformity, class spread), and extraction of features from a model.

Features are projected to the unit sphere, in float64, and all pairs of examples are used, without sampling. Memory
grows at most linearly with the number of examples, time quadratically.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ...locations import LocationError, Plan, probe
from ...locations.head import affine_layer, check_head
from ...locations.modes import evaluation_mode, nonzero_head_weights
from ...locations.plan import as_tokens
from ...locations.pools import pool_tokens
from ...locations.recording import is_vector, record
from .base import as_tensor, vectors_and_labels
from .batches import model_logits, split_batch

CHUNK = 2**22  # distances per chunk, 32 MB


def alignment(features: Any, labels: Any) -> float:
    """Return the mean squared distance between two examples of the same class, in [0, 4].

    Args:
        features: (n, d), normalized here.
        labels: (n,) class indices; -100 is ignored.

    Returns:
        0 if each class is a single point.

    Raises:
        ValueError: No two examples share a class, a feature is zero or not finite, or the labels do not match.

    Source:
        Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020, with alpha = 2 and all pairs of a class as positive pairs.

    Example:
        >>> alignment([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]], [0, 0, 1])
        2.0
    """
    x, y = _on_sphere(features, labels)
    count = torch.bincount(y).double()
    sums = x.new_zeros(len(count), x.shape[1]).index_add_(0, y, x)
    pairs = (count * (count - 1)).sum()
    if not pairs:
        raise ValueError(f"alignment needs two examples of one class, but the {len(x)} examples have {len(x)} classes.")
    # Over all ordered pairs of a class of m unit vectors, sum |x - y|^2 = 2 m^2 - 2 |sum x|^2.
    total = 2 * (count.square() - sums.square().sum(dim=1)).clamp(min=0).sum()
    return float(total / pairs)


def pair_alignment(first: Any, second: Any) -> float:
    """Return the mean squared distance between the features of positive pairs (two views of an image), in [0, 4].

    Args:
        first: (n, d), normalized here.
        second: (n, d), in the same order.

    Raises:
        ValueError: The shapes differ, or a feature is zero or not finite.

    Source:
        Wang and Isola, ICML 2020, with alpha = 2.

    Example:
        >>> pair_alignment([[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]])
        1.0
    """
    x, _ = _on_sphere(first, None)
    y, _ = _on_sphere(second, None)
    if x.shape != y.shape:
        raise ValueError(f"first and second must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    return float((x - y).square().sum(dim=1).mean())


def uniformity(features: Any, t: float = 2.0) -> float:
    """Return the logarithm of the mean of exp(-t |x - y|^2) over all pairs, in [-4 t, 0]; lower is more uniform.

    Args:
        features: (n, d) with n >= 2, normalized here.
        t: Inverse width of the kernel, positive.

    Raises:
        ValueError: There are fewer than two examples, a feature is zero or not finite, or `t` is not positive.

    Source:
        Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020.

    Example:
        >>> round(uniformity([[1.0, 0.0], [-1.0, 0.0]]), 6)  # the only pair is at distance 2
        -8.0
    """
    if not t > 0:
        raise ValueError(f"t must be positive, but is {t}.")
    x, _ = _on_sphere(features, None)
    if len(x) < 2:
        raise ValueError("uniformity needs at least two examples, got one.")
    total = 0.0
    for rows, squared in _squared_distances(x):
        similar = (-t * squared).exp()
        similar[torch.arange(len(rows)), rows] = 0  # exclude the pair of an example with itself
        total += float(similar.sum())
    return math.log(total / (len(x) * (len(x) - 1)))


def class_spread(features: Any, labels: Any) -> dict[str, float]:
    """Return the mean distances of examples within classes and between classes, and their ratio.

    Args:
        features: (n, d), normalized here.
        labels: (n,) class indices; -100 is ignored.

    Returns:
        `intra_class_distance` and `inter_class_distance`, the mean distances (not squared) of two examples of the same
        and of different classes, in [0, 2], accurate to 1e-8, and `class_spread`, the first divided by the second: 0 if
        each class is a single point, 1 if distances do not depend on the class.

    Raises:
        ValueError: There is no pair within a class or between classes, a feature is zero or not finite, or the labels
            do not match.

    Example:
        >>> spread = class_spread([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], [0, 0, 1])
        >>> spread["intra_class_distance"], spread["inter_class_distance"]
        (0.0, 2.0)
    """
    x, y = _on_sphere(features, labels)
    count = torch.bincount(y)
    n, same_pairs = len(x), int((count * (count - 1)).sum())
    other_pairs = n * (n - 1) - same_pairs
    if not same_pairs or not other_pairs:
        raise ValueError(
            f"class_spread needs two examples of one class and two of different classes, but the {n} examples have "
            + ("one class." if same_pairs else f"{n} classes.")
        )
    intra = inter = 0.0
    for rows, squared in _squared_distances(x):
        squared[torch.arange(len(rows)), rows] = 0
        distance, same_class = squared.sqrt(), y[rows][:, None] == y
        intra += float(distance[same_class].sum())
        inter += float(distance[~same_class].sum())
    intra, inter = intra / same_pairs, inter / other_pairs
    ratio = intra / inter if inter else math.nan
    return {"intra_class_distance": intra, "inter_class_distance": inter, "class_spread": ratio}


def features(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor | None]:
    """Return the inputs of a model's last linear layer, one vector per example.

    The layer is found by a probe on the first batch, as in training with mixing, not by the model's architecture. If it
    scores every token and the head pools the scores, features are pooled in the same way.

    Args:
        model: A Transformers classification model, wrapped or not. Its own forward runs, in evaluation mode.
        batches: Mappings with the model's inputs and, in all or none of them, `labels`.

    Returns:
        Features (n, d) and labels (n,), or None without labels, on the CPU.

    Raises:
        LocationError: The logits are not the output of one linear layer, or the model labels every location.
        ValueError: `batches` is empty, or only some batches have labels.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from mm_hf.evaluation.metrics import features
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                                             intermediate_size=16, image_size=8, patch_size=4, num_labels=3))
        >>> vectors, labels = features(model, [{"pixel_values": torch.randn(4, 3, 8, 8)}])
        >>> vectors.shape, labels
        (torch.Size([4, 16]), None)
    """
    vectors, _, labels = features_and_logits(model, batches)
    return vectors, labels


def features_and_logits(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the [`features`], the logits (n, c) of the same forward pass, and the labels."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("batches is empty; give at least one batch.")
    kept: list[Tensor] = []
    found: list[Tensor] = []
    logits: list[Tensor] = []
    labels: list[Tensor | None] = []
    with evaluation_mode(model) as device:
        name, plan = _last_linear(model, split_batch(first, device, labeled=False)[0])

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(args[0] if args else next(iter(kwargs.values())))

        hook = model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                for batch in chain([first], rest):
                    inputs, y = split_batch(batch, device, labeled=False)
                    kept.clear()
                    logits.append(model_logits(model, **inputs).cpu())
                    x = kept[-1]
                    vectors = (
                        x.flatten(1) if plan is None else pool_tokens(as_tokens(x, plan.layout), plan.pool, inputs)
                    )
                    found.append(vectors.cpu())
                    labels.append(None if y is None else y.cpu())
        finally:
            hook.remove()
    given = [y for y in labels if y is not None]
    if given and len(given) < len(labels):
        raise ValueError(
            f"{len(labels) - len(given)} of {len(labels)} batches have no labels; all or none of them must have labels."
        )
    return torch.cat(found), torch.cat(logits), torch.cat(given) if given else None


def _last_linear(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, Plan | None]:
    """Return the name of the last linear layer and, if it scores every token, the plan by which the head pools them."""
    with torch.inference_mode(False), torch.enable_grad(), nonzero_head_weights(model):
        recording = record(model, inputs)
        check_head(recording)
        last = affine_layer(recording, recording.logits)
        if last is not None and last.argument is not None and is_vector(last.argument):
            return last.name, None
        plan = probe(model, inputs)
        calls = (c for c in reversed(recording.calls) if c.name == plan.source and plan.side == "output")
        scores = next((c.results.get(plan.key) for c in calls), None)
        if recording.logits.ndim == 2 and plan.layout == "sequence" and not plan.chain and scores is not None:
            last = affine_layer(recording, scores)
            if last is not None:
                return last.name, plan
    raise LocationError(
        f"{type(model).__name__} has no last linear layer with one input vector per example, and thus no features.\n"
        f"{plan}"
    )


def _on_sphere(features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    if labels is None:
        x = as_tensor(features, "features")
        labels = torch.zeros(x.shape[:1], dtype=torch.long)
    x, y = vectors_and_labels(features, labels, "features")
    if not x.isfinite().all():
        raise ValueError(
            f"features must be finite, but {int((~x.isfinite()).any(dim=1).sum())} of {len(x)} contain NaN or infinity."
        )
    length = x.norm(dim=1, keepdim=True)
    if not length.all():
        raise ValueError(
            f"features must not be zero, but {int((length == 0).sum())} of {len(x)} are; zero has no direction."
        )
    return x / length, y


def _squared_distances(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices of examples and the rows of their squared distances to all others, in chunks."""
    for rows in torch.arange(len(x)).split(max(CHUNK // len(x), 1)):
        yield rows, (2 - 2 * x[rows] @ x.T).clamp_(min=0)
