"""Accuracy of image models under small changes of the pixels that are made to mislead them: FGSM and PGD.

Both attacks bound the change of every pixel by `epsilon`, in the units of pixels in [0, 1], whatever the model's
normalisation is; the changed image is a valid one. The model is left as it was: its modes, and its parameters'
gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...locations.modes import evaluation_mode
from .batches import image_batch, model_logits
from .normalisation import Normalisation

NO_NORMALISATION = Normalisation()
ATTACKS = ("fgsm", "pgd")


def fgsm(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    normalisation: Normalisation = NO_NORMALISATION,
    **inputs: Any,
) -> Tensor:
    """One step of size `epsilon` along the sign of the loss's gradient.

    Args:
        model: A Transformers image classification model, wrapped or not; its own forward is attacked, in evaluation mode.
        pixel_values: (b, channels, h, w), what the model takes.
        labels: (b,) class indices.
        epsilon: Largest change of a pixel, in units of pixels in [0, 1]: 8/255, not 8.
        normalisation: How `pixel_values` came from pixels, `Normalisation.of(processor)`. Default: they are pixels.
        inputs: Other arguments of the model's forward.

    Returns:
        Changed pixel values, of the shape and type of those given, on the model's device.

    Raises:
        ValueError: `epsilon` is not in [0, 1], `pixel_values` are not those of pixels in [0, 1], or labels do not fit.

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
    return _attack(model, pixel_values, labels, epsilon, 1, epsilon, None, normalisation, inputs)


def pgd(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    normalisation: Normalisation = NO_NORMALISATION,
    generator: torch.Generator | None = None,
    **inputs: Any,
) -> Tensor:
    """Projected gradient descent: several smaller steps from a random start, each brought back to within `epsilon`.

    Args:
        model: A Transformers image classification model, wrapped or not; its own forward is attacked, in evaluation mode.
        pixel_values: (b, channels, h, w), what the model takes.
        labels: (b,) class indices.
        epsilon: Largest change of a pixel, in units of pixels in [0, 1]: 8/255, not 8.
        steps: Number of steps.
        step_size: Of each step, in the units of `epsilon`. Default: 2.5 epsilon / steps.
        normalisation: How `pixel_values` came from pixels, `Normalisation.of(processor)`. Default: they are pixels.
        generator: Of the random start, on the CPU. Default: the global one.
        inputs: Other arguments of the model's forward.

    Returns:
        Changed pixel values after the last step, of the shape and type of those given, on the model's device.

    Raises:
        ValueError: `epsilon` is not in [0, 1], there is no step, `pixel_values` are not those of pixels in [0, 1], or
            labels do not fit.

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
    return _attack(model, pixel_values, labels, epsilon, steps, step_size, start, normalisation, inputs)


def robust_accuracy(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    epsilon: float,
    *,
    attack: str = "pgd",
    steps: int = 10,
    step_size: float | None = None,
    normalisation: Normalisation = NO_NORMALISATION,
    seed: int = 0,
) -> dict[str, float]:
    """Share of images that are classified rightly, as they are and after an attack.

    An image counts as robust if the model is right about it as it is and after the attack: the unchanged image is one of
    those within `epsilon`, too.

    Args:
        model: A Transformers image classification model, wrapped or not.
        batches: Mappings with `pixel_values`, `labels` (b,) and whatever else the model takes; -100 is left out.
        epsilon: Largest change of a pixel, in units of pixels in [0, 1]: 8/255, not 8.
        attack: "pgd" or "fgsm".
        steps: Of PGD.
        step_size: Of PGD. Default: 2.5 epsilon / steps.
        normalisation: How `pixel_values` came from pixels, `Normalisation.of(processor)`. Default: they are pixels.
        seed: Of PGD's random starts; no global generator is drawn from.

    Returns:
        `accuracy` and `robust_accuracy`, in [0, 1].

    Raises:
        ValueError: Another attack, no labelled image, or what the attacks refuse.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from mm_hf.evaluation.metrics import robust_accuracy
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                                             intermediate_size=16, image_size=8, patch_size=4, num_labels=3))
        >>> batch = {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
        >>> figures = robust_accuracy(model, [batch], epsilon=8 / 255)
        >>> figures["robust_accuracy"] <= figures["accuracy"]
        True
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {attack!r}.")
    generator = torch.Generator().manual_seed(seed)
    seen = right = robust = 0
    with evaluation_mode(model) as device:
        for batch in batches:
            images, inputs, labels = image_batch(batch, device)
            if not len(images):
                continue
            if attack == "pgd":
                changed = pgd(
                    model, images, labels, epsilon, steps=steps, step_size=step_size, normalisation=normalisation,
                    generator=generator, **inputs,
                )  # fmt: skip
            else:
                changed = fgsm(model, images, labels, epsilon, normalisation=normalisation, **inputs)
            with torch.no_grad():
                before, after = (
                    model_logits(model, pixel_values=x, **inputs).argmax(dim=-1) == labels for x in (images, changed)
                )
            seen, right, robust = seen + len(images), right + int(before.sum()), robust + int((before & after).sum())
    if not seen:
        raise ValueError("There is no labelled image in batches: nothing to attack.")
    return {"accuracy": right / seen, "robust_accuracy": robust / seen}


def _attack(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
    start: Tensor | None,
    normalisation: Normalisation,
    inputs: dict[str, Any],
) -> Tensor:
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], in units of pixels in [0, 1] (8/255, not 8), but is {epsilon}.")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != pixel_values.shape[:1]:
        said = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        raise ValueError(f"labels must be one class index for each of {len(pixel_values)} images, got {said}.")
    with evaluation_mode(model) as device, torch.inference_mode(False), torch.enable_grad():
        # Cloned: tensors made in inference mode take no part in a backward pass.
        inputs = {k: v.to(device).clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        given, labels = pixel_values.detach().to(device).clone(), labels.to(device).clone()
        if epsilon == 0 or not len(given):
            return given
        clean = normalisation.to_pixels(given)
        low, high = (clean - epsilon).clamp(min=0), (clean + epsilon).clamp(max=1)
        pixels = clean if start is None else (clean + epsilon * start.to(device)).clamp(low, high)
        for _ in range(steps):
            pixels = pixels.detach().requires_grad_()
            logits = model_logits(model, pixel_values=normalisation.to_values(pixels).to(given.dtype), **inputs)
            # The parameters' gradients are no part of this: nothing is accumulated in them.
            (gradient,) = torch.autograd.grad(_log_odds_against_label(logits, labels), pixels)
            pixels = (pixels.detach() + step_size * gradient.sign()).clamp(low, high)
        return normalisation.to_values(pixels).to(given.dtype)


def _log_odds_against_label(logits: Tensor, labels: Tensor) -> Tensor:
    """What the attacks raise: log of the odds against the label, summed over the examples.

    Its gradient is that of cross-entropy, divided by the probability of the other classes: the same sign, on which the
    steps depend, but it does not vanish, and leave the image as it is, where the model is sure.
    """
    if logits.ndim != 2 or logits.shape[-1] < 2:
        raise ValueError(
            f"Attacks are for models with logits (images, classes), two classes or more, got {tuple(logits.shape)}."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[-1]:
        raise ValueError(
            f"labels must be from 0 to {logits.shape[-1] - 1}, the classes of the model, got {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    if not logits.requires_grad:
        raise ValueError("The model's logits have no gradient with respect to pixel_values: it cannot be attacked.")
    logits = logits.float()
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(dim=-1)
    return (others - logits.gather(1, labels[:, None])[:, 0]).sum()
