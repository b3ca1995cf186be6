"""Interpolation factors: the time of drawing them, and the variance of the gradient when fewer are drawn.

Time: all factors of one step with b = 128 examples, n = 1,000 mixed examples and r = 49 locations, compared with
`torch.distributions.Dirichlet`, which draws factors for each location.

Variance: over draws of the factors for a fixed mini-batch, of the gradient of all parameters of a small ViT. Factors at
r locations are drawn for each location ("independent"), drawn once and permuted at each location ("permutations"),
drawn once ("shared"), or drawn as in `DenseMultiMix()`, with permutations and 2 k + 2 examples per mixed example for k
effective examples ("few examples"). The table has the trace of the gradient's covariance relative to "independent", and
the norm of the difference of the mean gradients in units of its standard error. A difference is expected for "few
examples", whose factors have a different, similar distribution.

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


def dirichlet(b: int, n: int, r: int) -> None:
    """Draw factors literally: a Dirichlet draw for each location and mixed example."""
    alpha = torch.empty(r, n, 1).uniform_(0.5, 2.0).expand(r, n, b)
    torch.distributions.Dirichlet(alpha, validate_args=False).sample()


def drawing(method: DenseMultiMix, b: int, r: int) -> None:
    """Draw the factors and permutations of one step of the method."""
    method.sample(b, torch.device("cpu"))
    sample_permutations(r, b)


def time_draws(steps: int) -> None:
    """Measure all samplers and write the ratios to `torch.distributions.Dirichlet`."""
    b, n, r = SIZES.values()
    runs = {
        "torch.distributions.Dirichlet": lambda: dirichlet(b, n, r),
        "sample_factors for each location": lambda: sample_factors(b, n, (0.5, 2.0), num_locations=r),
        "DenseMultiMix(alpha=(0.5, 2))": lambda: drawing(DenseMultiMix(alpha=(0.5, 2.0), num_mixed=n), b, r),
        "DenseMultiMix()": lambda: drawing(DenseMultiMix(num_mixed=n), b, r),
    }
    seconds = harness.alternate(runs, steps)
    rows = []
    for name, times in seconds.items():
        faster, quartiles = harness.ratio(next(iter(seconds.values())), times, 1)
        milliseconds = round(1e3 * float(np.median(times)), 2)
        rows.append({"factors": name, "ms": milliseconds, "times_faster": faster, "quartiles": quartiles})
        print(rows[-1], flush=True)
    harness.write("sampling.csv", rows)


def variance(draws: int) -> None:
    """Measure the variance of the gradient for several numbers of mixed and effective examples."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
                       image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1)  # fmt: skip
    model = ViTForImageClassification(config)
    data = load_digits()
    images, labels = torch.tensor(data.images[:64, None] / 8 - 1).float(), torch.tensor(data.target[:64])
    output = extract(model, pixel_values=images)
    assert output.token_logits is not None and output.attention is not None
    b, r, _ = output.token_logits.shape
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(way: str, n: int, k: float) -> np.ndarray:
        factors = sample_factors(b, n, alpha_for(k, b), num_locations=r if way == "independent" else None)
        if way == "few examples":
            factors = DenseMultiMix(num_mixed=n, effective_examples=k).sample(b, torch.device("cpu"))
        permutations = sample_permutations(r, b) if way in ("permutations", "few examples") else None
        loss = dense_multimix_loss(output.token_logits, labels, output.attention, factors, permutations=permutations)
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([p.flatten() for p in parts if p is not None]).numpy()

    rows = []
    for n in (10, 100, 1000):
        for k in (3, 10):
            first = None
            for way in ("independent", "permutations", "shared", "few examples"):
                grads = np.stack([gradient(way, n, k) for _ in range(draws)])
                mean, spread = grads.mean(axis=0), grads.var(axis=0).sum()
                first = first or (mean, spread)
                error = np.sqrt((spread + first[1]) / draws)
                bias = np.linalg.norm(mean - first[0]) / error
                size = np.linalg.norm(mean - first[0]) / np.linalg.norm(first[0])
                row = {"n": n, "effective_examples": k, "way": way, "variance": round(float(spread / first[1]), 2)}
                row["difference_in_standard_errors"] = round(float(bias), 2)
                rows.append({**row, "difference_of_means": round(float(size), 3)})
                print(rows[-1], flush=True)
    harness.write("gradient_variance.csv", rows)


def main() -> None:
    """Measure and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--draws", type=int, default=200)
    args = parser.parse_args()
    print(harness.machine())
    time_draws(args.steps)
    variance(args.draws)


if __name__ == "__main__":
    main()
