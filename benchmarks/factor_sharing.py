"""What it costs the gradient that locations share one draw of factors: variance over draws, for a fixed mini-batch.

Three ways to have factors at r locations: a draw for each ("independent"), one draw in an order of examples of its own
at each location ("orders", what DenseMultiMix does), and the same factors everywhere ("shared"). All have the same
expectation; printed is the trace of the covariance of the gradient of all parameters, relative to "independent", and the
norm of the mean gradient's difference in units of its own standard error.

    python benchmarks/factor_sharing.py [--draws 200]
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from mm_hf import dense_multimix_loss, extract, sample_factors
from mm_hf.sampling import alpha_for, sample_orders


def main() -> None:
    """Print a table for a few kinds of factors and numbers of mixed examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    draws = parser.parse_args().draws
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

    def gradient(way: str, n: int, alpha: float) -> np.ndarray:
        factors = sample_factors(b, n, alpha, num_locations=r if way == "independent" else None)
        orders = sample_orders(r, b) if way == "orders" else None
        loss = dense_multimix_loss(seen.token_logits, labels, seen.attention, factors, orders=orders)
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([p.flatten() for p in parts if p is not None]).numpy()

    print(f"{'n':>5} {'examples':>9} {'way':>12} {'variance':>9} {'bias / its standard error':>26}")
    for n in (10, 100, 1000):
        for k in (3, 10):
            first = None
            for way in ("independent", "orders", "shared"):
                grads = np.stack([gradient(way, n, alpha_for(k, b)) for _ in range(draws)])
                mean, variance = grads.mean(axis=0), grads.var(axis=0).sum()
                first = first or (mean, variance)
                error = np.sqrt((variance + first[1]) / draws)
                bias = np.linalg.norm(mean - first[0]) / error
                print(f"{n:>5} {k:>9} {way:>12} {variance / first[1]:>9.2f} {bias:>26.2f}")


if __name__ == "__main__":
    main()
