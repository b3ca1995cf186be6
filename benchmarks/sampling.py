"""Interpolation factors: what drawing them costs, and what ways to draw fewer of them cost the gradient.

Time: all factors of one step, b = 128 examples, n = 1,000 mixed ones, r = 49 locations, against
`torch.distributions.Dirichlet`, which has one for each location.

Variance: for a fixed mini-batch, over draws, of the gradient of all parameters of a small ViT. Ways to have factors at r
locations: a draw for each ("independent"), one draw in an order of examples of its own at each location ("permutations"), the
same factors everywhere ("shared"), and what `DenseMultiMix()` does: orders, and 2 k + 2 vertices for k effective examples in
place of the whole mini-batch ("vertices"). Printed is the trace of the gradient's covariance relative to "independent", and
the norm of the mean gradient's difference in units of its own standard error ("vertices" has another law, close to the
others': a difference is to be expected there).

    python -m benchmarks.sampling [--steps 15] [--draws 200]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from benchmarks import harness
from mm_hf import DenseMultiMix, dense_multimix_loss, extract, sample_factors
from mm_hf.functional.factors import alpha_for, sample_permutations

SIZES = {"b": 128, "n": 1000, "r": 49}


def peers(b: int, n: int, r: int) -> None:
    """What a script draws that follows the formulas: a Dirichlet for each location and mixed example."""
    alpha = torch.empty(r, n, 1).uniform_(0.5, 2.0).expand(r, n, b)
    torch.distributions.Dirichlet(alpha, validate_args=False).sample()


def drawing(method: DenseMultiMix, b: int, r: int) -> None:
    """What a step of the method draws."""
    method.sample(b, torch.device("cpu"))
    sample_permutations(r, b)


def time_draws(steps: int) -> None:
    """Ratios to `torch.distributions.Dirichlet`, side by side."""
    b, n, r = SIZES.values()
    runs = {
        "torch.distributions.Dirichlet": lambda: peers(b, n, r),
        "sample_factors for each location": lambda: sample_factors(b, n, (0.5, 2.0), num_locations=r),
        "DenseMultiMix(alpha=(0.5, 2))": lambda: drawing(DenseMultiMix(alpha=(0.5, 2.0), num_mixed=n), b, r),
        "DenseMultiMix()": lambda: drawing(DenseMultiMix(num_mixed=n), b, r),
    }
    seconds = harness.alternate(runs, steps)
    rows = []
    for name, times in seconds.items():
        faster, quartiles = harness.ratio(next(iter(seconds.values())), times, 1)
        rows.append({"factors": name, "ms": round(1e3 * float(np.median(times)), 2), "times_faster": faster, "quartiles": quartiles})  # fmt: skip
        print(rows[-1], flush=True)
    harness.write("sampling.csv", rows)


def variance(draws: int) -> None:
    """The gradient's variance for a few numbers of mixed and effective examples."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
                       image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1)  # fmt: skip
    model = ViTForImageClassification(config)
    data = load_digits()
    images, labels = torch.tensor(data.images[:64, None] / 8 - 1).float(), torch.tensor(data.target[:64])
    seen = extract(model, pixel_values=images)
    assert seen.token_logits is not None and seen.attention is not None
    b, r, _ = seen.token_logits.shape
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(way: str, n: int, k: float) -> np.ndarray:
        factors = sample_factors(b, n, alpha_for(k, b), num_locations=r if way == "independent" else None)
        if way == "vertices":
            factors = DenseMultiMix(num_mixed=n, effective_examples=k).sample(b, torch.device("cpu"))
        permutations = sample_permutations(r, b) if way in ("permutations", "vertices") else None
        loss = dense_multimix_loss(seen.token_logits, labels, seen.attention, factors, permutations=permutations)
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([p.flatten() for p in parts if p is not None]).numpy()

    rows = []
    for n in (10, 100, 1000):
        for k in (3, 10):
            first = None
            for way in ("independent", "permutations", "shared", "vertices"):
                grads = np.stack([gradient(way, n, k) for _ in range(draws)])
                mean, spread = grads.mean(axis=0), grads.var(axis=0).sum()
                first = first or (mean, spread)
                error = np.sqrt((spread + first[1]) / draws)
                bias = np.linalg.norm(mean - first[0]) / error
                size = np.linalg.norm(mean - first[0]) / np.linalg.norm(first[0])
                rows.append({"n": n, "effective_examples": k, "way": way, "variance": round(float(spread / first[1]), 2), "difference_in_standard_errors": round(float(bias), 2), "difference_of_means": round(float(size), 3)})  # fmt: skip
                print(rows[-1], flush=True)
    harness.write("gradient_variance.csv", rows)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--draws", type=int, default=200)
    args = parser.parse_args()
    print(harness.machine())
    time_draws(args.steps)
    variance(args.draws)


if __name__ == "__main__":
    main()
