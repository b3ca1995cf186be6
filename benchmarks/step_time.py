"""What a training step costs with each method, relative to plain training, side by side in one process.

Forward, backward and an AdamW step of a small ViT (5 M parameters, 32x32 images in 64 patches, 10 classes, mini-batch of
64), methods in turn, one step each, so that drifts of the machine's speed hit all alike. Printed: the median of the
step-by-step ratios to plain training and their quartiles.

    python benchmarks/step_time.py [--steps 20]
"""

import argparse
import time

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from mm_hf import ERM, DenseMultiMix, Mixup, MultiMix, wrap_model

METHODS = {
    "erm (plain training)": ERM(),
    "mixup (input space)": Mixup(),
    "multimix, n = 1,000": MultiMix(),
    "dense_multimix, n = 100": DenseMultiMix(num_mixed=100),
    "dense_multimix, n = 1,000": DenseMultiMix(),
}


def main() -> None:
    """Time and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    config = ViTConfig(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024,
                       image_size=32, patch_size=4, num_labels=10)  # fmt: skip
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    runs = []
    for method in METHODS.values():
        torch.manual_seed(0)
        model = ViTForImageClassification(config).train()
        wrap_model(model, method)
        runs.append((model, torch.optim.AdamW(model.parameters())))
    seconds = np.zeros((steps, len(runs)))
    for step in range(-3, steps):  # three to warm up
        for i, (model, optimizer) in enumerate(runs):
            start = time.perf_counter()
            model(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= 0:
                seconds[step, i] = time.perf_counter() - start
    ratios = seconds / seconds[:, :1]
    print(f"{torch.get_num_threads()} CPU threads; plain step: median {np.median(seconds[:, 0]) * 1e3:.0f} ms")
    for i, name in enumerate(METHODS):
        low, middle, high = np.percentile(ratios[:, i], [25, 50, 75])
        print(f"{name:28s} {middle:.2f}x  (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
