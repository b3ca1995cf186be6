"""Training runs of a ViT on all of Fashion-MNIST: plain, CutMix and the default, three seeds.

The images stay in the device's memory. A mini-batch is shifted by up to two pixels and mirrored at random. All methods
of a seed start from the same weights and use the same mini-batches. Several runs share the device at a time, because
launching the kernels of so small a model takes longer than running them.
"""

from __future__ import annotations

import gzip
import math
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.gpu.setup import Rows, Setup, describe
from mm_hf import ERM, CutMix, DenseMultiMix, Mixing, wrap_model
from mm_hf.evaluation.metrics.classification import accuracy, calibration_error, negative_log_likelihood

FILE, MINUTES, PROCESSES = "gpu_training.csv", 13.0, 3
DIRECTORY = Path(os.environ.get("FASHION_MNIST_DIR", "/usr/share/datasets/fashion-mnist"))
METHODS: dict[str, Mixing] = {"plain training": ERM(), "CutMix()": CutMix(), "DenseMultiMix()": DenseMultiMix()}
SEEDS, BATCH = (0, 1, 2), 1024
LEARNING_RATE, WARM_UP_EPOCHS = 2e-3, 5
SIZES = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
MINIATURE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
Data = tuple[Tensor, Tensor]


def load(setup: Setup) -> dict[str, Data]:
    """Return images and labels of both splits on the device; in a rehearsal, random ones.

    Raises:
        FileNotFoundError: The files of Fashion-MNIST do not exist.
    """
    if setup.rehearse:
        torch.manual_seed(0)
        return {split: (torch.randn(32, 1, 28, 28), torch.randint(10, (32,))) for split in ("train", "t10k")}
    if not DIRECTORY.is_dir():
        raise FileNotFoundError(
            f"{DIRECTORY} does not exist: install the Debian package dataset-fashion-mnist, or set FASHION_MNIST_DIR "
            "to a directory with the four .gz files of Fashion-MNIST."
        )
    data = {}
    for split in ("train", "t10k"):
        images, labels = (
            torch.from_numpy(_read(DIRECTORY / f"{split}-{name}-ubyte.gz", header))
            for name, header in (("images-idx3", 16), ("labels-idx1", 8))
        )
        images = images.view(-1, 1, 28, 28).to(setup.device).float().div_(127.5).sub_(1)
        data[split] = (images, labels.long().to(setup.device))
    return data


def _read(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()


def augment(images: Tensor) -> Tensor:
    """Shift the images of a mini-batch together by up to two pixels, and mirror each with a probability of 1/2."""
    down, right = torch.randint(5, (2,)).tolist()
    images = F.pad(images, (2, 2, 2, 2), value=-1)[..., down : down + 28, right : right + 28]
    mirrored = torch.rand(len(images)).to(images.device)[:, None, None, None] < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def train(setup: Setup, data: dict[str, Data], method: Mixing, seed: int, epochs: int) -> nn.Module:
    """Train a model from scratch."""
    torch.manual_seed(seed)
    sizes = MINIATURE if setup.rehearse else SIZES
    config = ViTConfig(**sizes, image_size=28, patch_size=4, num_channels=1, num_labels=10)  # type: ignore[arg-type]
    model = ViTForImageClassification(config).to(setup.device).train()
    images, labels = data["train"]
    batch = min(BATCH, len(images) // 2)
    steps = len(images) // batch * epochs
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=setup.device.type == "cuda")
    warm_up = max(1, steps * WARM_UP_EPOCHS // epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * t / steps))
    )
    with wrap_model(model, method) as handle:
        for step in range(steps):
            if step % (steps // epochs) == 0:
                order = torch.randperm(len(images)).to(setup.device)
            chosen = order[step % (steps // epochs) * batch :][:batch]
            handle.epoch = epochs * step / steps
            with setup.autocast():
                loss = model(pixel_values=augment(images[chosen]), labels=labels[chosen]).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> dict[str, float]:
    """Return accuracy, NLL and the expected calibration error (15 bins) in float32."""
    logits = torch.cat([model(pixel_values=part).logits.float() for part in data[0].split(1000)]).cpu()
    labels = data[1].cpu()
    metrics = {"accuracy": accuracy, "nll": negative_log_likelihood, "calibration_error": calibration_error}
    return {name: round(float(metric(logits, labels)), 5) for name, metric in metrics.items()}


def train_and_evaluate(setup: Setup, name: str, seed: int, epochs: int) -> dict[str, Any]:
    """Return the row of a run."""
    data = load(setup)
    found = evaluate(train(setup, data, METHODS[name], seed, epochs), data["t10k"])
    return {"method": name, "seed": seed, "epochs": epochs, **found, "device": describe(setup.device)}


def run(setup: Setup) -> None:
    """Train the runs that have no row yet, several at a time. Those that do not finish in time are stopped."""
    rows = Rows(setup, FILE, ("method", "seed", "epochs"))
    epochs, seeds = (1, SEEDS[:1]) if setup.rehearse else (setup.epochs, SEEDS)
    missing = [(n, s, epochs) for s in seeds for n in METHODS if not rows.has(method=n, seed=s, epochs=epochs)]
    if not missing:
        return
    load(setup)  # missing files are reported here
    if setup.rehearse:
        for case in missing:
            rows.add(train_and_evaluate(setup, *case))
        return
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        try:
            for future in as_completed(
                [pool.submit(train_and_evaluate, setup, *c) for c in missing], setup.seconds_left
            ):
                rows.add(future.result())
        finally:
            for process in pool._processes.values():
                process.terminate()


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table of docs/gpu.md: means over the seeds, with standard deviations."""
    found = [["epochs", "method", "seeds", "accuracy, %", "NLL", "calibration error"]]
    for epochs, name in product(dict.fromkeys(row["epochs"] for row in rows), METHODS):
        runs = [row for row in rows if row["method"] == name and row["epochs"] == epochs]
        cells = [
            _mean([scale * float(row[key]) for row in runs], digits)
            for key, scale, digits in (("accuracy", 100, 2), ("nll", 1, 3), ("calibration_error", 1, 4))
            if runs
        ]
        if runs:
            found.append([epochs, f"`{name}`" if "(" in name else name, f"{len(runs)}", *cells])
    return found


def _mean(values: list[float], digits: int) -> str:
    x = torch.tensor(values, dtype=torch.float64)
    deviation = f" ± {float(x.std()):.{digits}f}" if len(x) > 1 else ""
    return f"{float(x.mean()):.{digits}f}{deviation}"
