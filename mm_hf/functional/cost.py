"""Cost of mixing in operations of the model, by which `num_mixed="auto"` selects the number of mixed examples.

A training step is counted in the floating-point operations of its matrix products, convolutions and attention. Mixing
also computes exponentials and other functions of single numbers, which take far more time than an operation of a matrix
product. Two constants for each kind of device convert its work to operations of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .mixers import SPARSE_SHARE


@dataclass(frozen=True)
class OperationCost:
    """Cost of the work of mixing, relative to one operation of the model.

    Attributes:
        product: An operation of the matrix products with interpolation factors.
        exponential: Normalizing, exponentiating and subtracting one mixed logit, and storing the intermediate results.
        logit: Converting one logit of an example at a location, and its gradient.
    """

    product: float
    exponential: float
    logit: float


# Measured: 1,000 mixed examples of 196 patches and 1,000 classes add 0.42 times a plain step of ViT-S/16 with b = 8,
# 9,000 of 100 classes 0.11 times one with b = 32 (docs/performance.md). This is 360 to 480 for each mixed logit.
CPU = OperationCost(product=1, exponential=500, logit=500)
# Measured on an H200 with ViT-B/16, 128 images and 1,000 classes in bfloat16 (docs/gpu.md): the model does 280
# operations in a picosecond, and the products of mixing 40, in float32. The other work takes 14 picoseconds for each
# mixed logit, and 16 for each logit of an example at a location.
ACCELERATOR = OperationCost(product=7, exponential=4000, logit=4500)


def operations_per_mixed_example(
    num_examples: int,
    num_locations: int,
    num_classes: int,
    *,
    examples_per_mix: int | None = None,
    ranks: int = 1,
    device: torch.device | str = "cpu",
) -> float:
    """Return the cost of one mixed example at all locations, in operations of the model.

    Args:
        num_examples: Number of examples in the mini-batch (b).
        num_locations: Number of locations (r).
        num_classes: Number of classes (c).
        examples_per_mix: Number of examples that have a factor. Default: all.
        ranks: Number of ranks whose mini-batches are mixed as one. Each computes its share of the mixed examples.
        device: The device. On a CPU, factors of few examples are applied without a matrix product.

    Returns:
        The cost on one rank, of the loss and its gradient.

    Example:
        >>> operations_per_mixed_example(num_examples=8, num_locations=196, num_classes=1000)
        107411136.0
    """
    is_cpu = torch.device(device).type == "cpu"
    cost = CPU if is_cpu else ACCELERATOR
    examples = float(num_examples * ranks)
    if is_cpu and examples_per_mix is not None:
        # Adding up the rows of the examples is slower per operation. `SPARSE_SHARE` is where both take as long.
        examples = min(examples, examples_per_mix / SPARSE_SHARE)
    products = (6 * num_classes + 2) * examples * cost.product
    return num_locations * (products + num_classes * cost.exponential) / ranks


def operations_of_locations(
    num_examples: int,
    num_locations: int,
    num_classes: int,
    *,
    head_operations: float = 0.0,
    ranks: int = 1,
    device: torch.device | str = "cpu",
) -> float:
    """Return the cost of the logits of all locations, which any number of mixed examples shares.

    Args:
        num_examples: Number of examples in the mini-batch (b).
        num_locations: Number of locations (r).
        num_classes: Number of classes (c).
        head_operations: Operations of the head at one location.
        ranks: Number of ranks whose mini-batches are mixed as one. Each receives the logits of all ranks.
        device: The device.

    Returns:
        The cost on one rank, in operations of the model: of the head, its gradient, and the conversion of the logits.

    Example:
        >>> operations_of_locations(num_examples=8, num_locations=196, num_classes=1000, head_operations=768_000)
        4396672000
    """
    cost = CPU if torch.device(device).type == "cpu" else ACCELERATOR
    return num_examples * num_locations * (3 * head_operations + ranks * num_classes * cost.logit)
