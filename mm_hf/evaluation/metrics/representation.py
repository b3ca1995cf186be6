"""What a representation is like: alignment, uniformity, the spread of classes, and the features themselves.

Features are projected to the unit sphere, in float64, and every pair of examples counts: nothing is sampled. Memory does
not grow faster than the number of examples; time grows with its square.
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

CHUNK = 2**22  # distances at a time, 32 MB


def alignment(features: Any, labels: Any) -> float:
    """Mean squared distance between two examples of the same class, in [0, 4]; 0 if each class is a single point.

    Args:
        features: (n, d), of any length: they are normalised here.
        labels: (n,) class indices; -100 is left out.

    Raises:
        ValueError: No two examples share a class, a feature is zero or no number, or labels do not fit.

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
        raise ValueError(f"alignment needs two examples of one class, and these {len(x)} are of as many classes.")
    # Over all ordered pairs of a class of m unit vectors, sum |x - y|^2 = 2 m^2 - 2 |sum x|^2: no pair is formed.
    total = 2 * (count.square() - sums.square().sum(dim=1)).clamp(min=0).sum()
    return float(total / pairs)


def pair_alignment(first: Any, second: Any) -> float:
    """Mean squared distance between the two features of each positive pair, say two views of one image, in [0, 4].

    Args:
        first: (n, d), of any length: they are normalised here.
        second: (n, d), in the same order.

    Raises:
        ValueError: The shapes differ, or a feature is zero or no number.

    Source:
        Wang and Isola, ICML 2020, with alpha = 2.

    Example:
        >>> pair_alignment([[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]])
        1.0
    """
    x, _ = _on_sphere(first, None)
    y, _ = _on_sphere(second, None)
    if x.shape != y.shape:
        raise ValueError(f"first and second must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    return float((x - y).square().sum(dim=1).mean())


def uniformity(features: Any, t: float = 2.0) -> float:
    """Logarithm of the mean of exp(-t |x - y|^2) over all pairs of examples, in [-4 t, 0]; lower is more uniform.

    Args:
        features: (n, d), n >= 2, of any length: they are normalised here.
        t: > 0.

    Raises:
        ValueError: There is no pair, a feature is zero or no number, or t is not positive.

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
        raise ValueError("uniformity needs two examples at least, got one.")
    total = 0.0
    for rows, squared in _squared_distances(x):
        similar = (-t * squared).exp()
        similar[torch.arange(len(rows)), rows] = 0  # an example is no pair with itself
        total += float(similar.sum())
    return math.log(total / (len(x) * (len(x) - 1)))


def class_spread(features: Any, labels: Any) -> dict[str, float]:
    """How far apart examples are within classes and between them.

    Args:
        features: (n, d), of any length: they are normalised here.
        labels: (n,) class indices; -100 is left out.

    Returns:
        `intra_class_distance` and `inter_class_distance`, the mean distances (not squared) of two examples of the same
        and of different classes, in [0, 2], good to 1e-8, and `class_spread`, the first divided by the second: 0 if each
        class is a single point, 1 if classes make no difference.

    Raises:
        ValueError: There is no pair within a class or between classes, a feature is zero or no number, or labels do not
            fit.

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
            f"class_spread needs two examples of one class and two of different ones, and these {n} are "
            + ("all of one class." if same_pairs else "of as many classes.")
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
    """What the last linear layer of a model reads of each example.

    The layer is found by looking at the first batch, as the mixing does, and never by the model's architecture. Where it
    scores every token and the head reads some of the scores, features are pooled as the scores are.

    Args:
        model: A Transformers classification model, wrapped or not; its own forward runs, in evaluation mode.
        batches: Mappings with the model's inputs and, in all or none, `labels`.

    Returns:
        Features (n, d) and labels (n,), or None without labels, on the CPU.

    Raises:
        LocationError: The logits leave no linear layer, or two whose results are averaged, or there is a label for every
            location.
        ValueError: There is no batch, or labels come with some batches only.

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
    """As [`features`], with the logits (n, c) of the same pass between the features and the labels."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("batches is empty: there are no features to give.")
    kept: list[Tensor] = []
    found: list[Tensor] = []
    logits: list[Tensor] = []
    labels: list[Tensor | None] = []
    with evaluation_mode(model) as device:
        name, plan = _last_linear(model, split_batch(first, device, labelled=False)[0])

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(args[0] if args else next(iter(kwargs.values())))

        hook = model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                for batch in chain([first], rest):
                    inputs, y = split_batch(batch, device, labelled=False)
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
            f"{len(labels) - len(given)} of {len(labels)} batches have no labels: give them to all or to none."
        )
    return torch.cat(found), torch.cat(logits), torch.cat(given) if given else None


def _last_linear(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, Plan | None]:
    """Name of the last linear layer and, where it scores every token, the plan that says which of them the head reads."""
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
        f"{type(model).__name__} has no last linear layer that reads one vector of each example, and so no features.\n{plan}"
    )


def _on_sphere(features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    if labels is None:
        x = as_tensor(features, "features")
        labels = torch.zeros(x.shape[:1], dtype=torch.long)
    x, y = vectors_and_labels(features, labels, "features")
    if not x.isfinite().all():
        raise ValueError(
            f"{int((~x.isfinite()).any(dim=1).sum())} of {len(x)} features hold values that are no numbers."
        )
    length = x.norm(dim=1, keepdim=True)
    if not length.all():
        raise ValueError(f"{int((length == 0).sum())} of {len(x)} features are zero, which has no place on the sphere.")
    return x / length, y


def _squared_distances(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the matrix of all squared distances of unit vectors, a few at a time."""
    for rows in torch.arange(len(x)).split(max(CHUNK // len(x), 1)):
        yield rows, (2 - 2 * x[rows] @ x.T).clamp_(min=0)
