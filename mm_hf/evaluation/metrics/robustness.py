"""Accuracy of image models under adversarial attacks: FGSM and PGD.

Both attacks bound the change of every pixel by `epsilon`, in units of pixels in [0, 1], independently of the model's
normalization, and return valid images. Modes of the model's modules and gradients of its parameters do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...locations.modes import evaluation_mode
from .batches import image_batch, model_logits
from .normalization import Normalization

NO_NORMALIZATION = Normalization()
ATTACKS = ("fgsm", "pgd")


def fgsm(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    normalization: Normalization = NO_NORMALIZATION,
    **inputs: Any,
) -> Tensor:
    """Attack images by one step of size `epsilon` along the sign of the gradient of the loss.

    Args:
        model: A Transformers image classification model, wrapped or not. Its own forward runs, in evaluation mode.
        pixel_values: (b, channels, h, w), the model's input.
        labels: (b,) class indices.
        epsilon: Largest change of a pixel, in units of pixels in [0, 1], for example 8/255.
        normalization: Map from pixels to `pixel_values`, `Normalization.of(processor)`. Default: identity.
        inputs: Other arguments of the model's forward.

    Returns:
        Pixel values of the attacked images, of the same shape and dtype, on the model's device.

    Raises:
        ValueError: `epsilon` is not in [0, 1], `pixel_values` are outside of the range of pixels, or labels do not
            match.

    Source:
        Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from mm_hf.evaluation.metrics import fgsm
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                                             intermediate_size=16, image_size=8, patch_size=4, num_labels=3))
        >>> images = torch.rand(2, 3, 8, 8)
        >>> changed = fgsm(model, images, torch.tensor([0, 1]), epsilon=8 / 255)
        >>> bool((changed - images).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    return _attack(model, pixel_values, labels, epsilon, 1, epsilon, None, normalization, inputs)


def pgd(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    normalization: Normalization = NO_NORMALIZATION,
    generator: torch.Generator | None = None,
    **inputs: Any,
) -> Tensor:
    """Attack images by projected gradient descent: several steps from a random start, each projected to `epsilon`.

    Args:
        model: A Transformers image classification model, wrapped or not. Its own forward runs, in evaluation mode.
        pixel_values: (b, channels, h, w), the model's input.
        labels: (b,) class indices.
        epsilon: Largest change of a pixel, in units of pixels in [0, 1], for example 8/255.
        steps: Number of steps.
        step_size: Size of each step, in units of `epsilon`. Default: 2.5 epsilon / steps.
        normalization: Map from pixels to `pixel_values`, `Normalization.of(processor)`. Default: identity.
        generator: Generator of the random start, on the CPU. Default: the global one.
        inputs: Other arguments of the model's forward.

    Returns:
        Pixel values after the last step, of the same shape and dtype, on the model's device.

    Raises:
        ValueError: `epsilon` is not in [0, 1], `steps` is less than 1, `pixel_values` are outside of the range of
            pixels, or labels do not match.

    Source:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from mm_hf.evaluation.metrics import pgd
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                                             intermediate_size=16, image_size=8, patch_size=4, num_labels=3))
        >>> images = torch.rand(2, 3, 8, 8)
        >>> changed = pgd(model, images, torch.tensor([0, 1]), epsilon=8 / 255)
        >>> bool((changed - images).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, but is {steps}.")
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    start = 2 * torch.rand(pixel_values.shape, generator=generator) - 1
    return _attack(model, pixel_values, labels, epsilon, steps, step_size, start, normalization, inputs)


def robust_accuracy(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    epsilon: float,
    *,
    attack: str = "pgd",
    steps: int = 10,
    step_size: float | None = None,
    normalization: Normalization = NO_NORMALIZATION,
    seed: int = 0,
) -> dict[str, float]:
    """Return the accuracy on images before and after an attack.

    An image counts as robust if it is classified correctly both before and after the attack, since the original image
    lies within `epsilon`, too.

    Args:
        model: A Transformers image classification model, wrapped or not.
        batches: Mappings with `pixel_values`, `labels` (b,) and other inputs of the model; -100 is ignored.
        epsilon: Largest change of a pixel, in units of pixels in [0, 1], for example 8/255.
        attack: "pgd" or "fgsm".
        steps: Number of steps of PGD.
        step_size: Size of the steps of PGD. Default: 2.5 epsilon / steps.
        normalization: Map from pixels to `pixel_values`, `Normalization.of(processor)`. Default: identity.
        seed: Seed of the random starts of PGD. Global generators are not used.

    Returns:
        `accuracy` and `robust_accuracy`, in [0, 1].

    Raises:
        ValueError: The attack is unknown, no image has a label, or an argument is invalid for the attack.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from mm_hf.evaluation.metrics import robust_accuracy
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                                             intermediate_size=16, image_size=8, patch_size=4, num_labels=3))
        >>> batch = {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
        >>> accuracies = robust_accuracy(model, [batch], epsilon=8 / 255)
        >>> accuracies["robust_accuracy"] <= accuracies["accuracy"]
        True
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {attack!r}.")
    generator = torch.Generator().manual_seed(seed)
    count = correct = robust = 0
    with evaluation_mode(model) as device:
        for batch in batches:
            images, inputs, labels = image_batch(batch, device)
            if not len(images):
                continue
            if attack == "pgd":
                changed = pgd(
                    model, images, labels, epsilon, steps=steps, step_size=step_size, normalization=normalization,
                    generator=generator, **inputs,
                )  # fmt: skip
            else:
                changed = fgsm(model, images, labels, epsilon, normalization=normalization, **inputs)
            with torch.no_grad():
                before, after = (
                    model_logits(model, pixel_values=x, **inputs).argmax(dim=-1) == labels for x in (images, changed)
                )
            count, correct, robust = (
                count + len(images),
                correct + int(before.sum()),
                robust + int((before & after).sum()),
            )
    if not count:
        raise ValueError("batches must contain at least one image with a label.")
    return {"accuracy": correct / count, "robust_accuracy": robust / count}


def _attack(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
    start: Tensor | None,
    normalization: Normalization,
    inputs: dict[str, Any],
) -> Tensor:
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], in units of pixels in [0, 1] (8/255, not 8), got {epsilon}.")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != pixel_values.shape[:1]:
        found = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        raise ValueError(f"labels must be one class index per image, of shape ({len(pixel_values)},), got {found}.")
    with evaluation_mode(model) as device, torch.inference_mode(False), torch.enable_grad():
        # Autograd cannot save tensors that were created in inference mode.
        inputs = {k: v.to(device).clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        given, labels = pixel_values.detach().to(device).clone(), labels.to(device).clone()
        if epsilon == 0 or not len(given):
            return given
        clean = normalization.to_pixels(given)
        low, high = (clean - epsilon).clamp(min=0), (clean + epsilon).clamp(max=1)
        pixels = clean if start is None else (clean + epsilon * start.to(device)).clamp(low, high)
        for _ in range(steps):
            pixels = pixels.detach().requires_grad_()
            logits = model_logits(model, pixel_values=normalization.to_values(pixels).to(given.dtype), **inputs)
            # `autograd.grad` does not accumulate gradients in the parameters.
            (gradient,) = torch.autograd.grad(_log_odds_against_label(logits, labels), pixels)
            pixels = (pixels.detach() + step_size * gradient.sign()).clamp(low, high)
        return normalization.to_values(pixels).to(given.dtype)


def _log_odds_against_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the objective of the attacks: log odds against the label, summed over examples.

    Its gradient is that of cross-entropy divided by the probability of the other classes. The sign, which determines
    the steps, is the same, but the gradient does not vanish for confident predictions.
    """
    if logits.ndim != 2 or logits.shape[-1] < 2:
        raise ValueError(
            f"Attacks need logits of shape (images, classes) with at least two classes, got {tuple(logits.shape)}."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[-1]:
        raise ValueError(
            f"labels must be class indices of the model, from 0 to {logits.shape[-1] - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    if not logits.requires_grad:
        raise ValueError(
            "The model's logits do not depend differentiably on pixel_values, so gradient attacks are not possible."
        )
    logits = logits.float()
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(dim=-1)
    return (others - logits.gather(1, labels[:, None])[:, 0]).sum()
