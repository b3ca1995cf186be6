"""Sequences of mnist1d."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from benchmarks.evidence.data.examples import Examples, require_package


@cache
def mnist1d(number: int = 10_000) -> Examples:
    """Return sequences of 40 values from mnist1d's generator with its own seed, as images of one row.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    require_package("mnist1d", "mnist1d")
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples = number
    data = make_dataset(args)
    values, labels = (np.concatenate([data[name], data[f"{name}_test"]]) for name in ("x", "y"))
    return Examples(torch.tensor(labels), pixel_values=torch.tensor(values).float()[:, None, None])
