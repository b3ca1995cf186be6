"""Dense MultiMix's loss, forward and backward, against a literal implementation that mixes features: time and memory.

The literal one is vectorised (einsum) and makes the (locations, mixed, features) tensor that the paper's formulas say; both
include the classifier. A third, "products", does nothing but the matrix products that ours cannot do without. They run in turn in one process, a step each, so that drifts of the machine's speed hit both alike.
Written to benchmarks/results/loss.csv: medians of the step-by-step ratios, their quartiles, and the extra memory of one
step (peak resident size of a process that does it, less that of one that only makes the inputs).

    python benchmarks/loss.py [--steps 9]
"""

import argparse
import csv
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mm_hf import dense_multimix_loss, sample_factors
from mm_hf.sampling import alpha_for, sample_orders

RESULTS = Path(__file__).parent / "results"
SHAPES = [(128, 49, 384, 100, 1000), (32, 49, 768, 1000, 500), (64, 196, 384, 100, 1000)]
FACTORS = ("alpha = 1", "3 examples")


def problem(shape: tuple[int, ...], kind: str) -> dict[str, Tensor]:
    """Random features, classifier, labels, attention and factors; orders and what they make of the factors."""
    torch.manual_seed(0)
    b, r, d, c, n = shape
    factors = sample_factors(b, n, 1.0 if kind == "alpha = 1" else alpha_for(3, b))
    return {
        "features": torch.randn(b, r, d, requires_grad=True),
        "weight": (0.05 * torch.randn(c, d)).requires_grad_(),
        "bias": torch.zeros(c, requires_grad=True),
        "labels": torch.randint(c, (b,)),
        "attention": torch.rand(b, r),
        "factors": factors,
        "orders": sample_orders(r, b),
    }


def literal(p: dict[str, Tensor]) -> Tensor:
    """Mix features and labels at each location, apply the classifier, weigh by attention."""
    factors = torch.stack([p["factors"][order] for order in p["orders"]])
    mixing = p["attention"].T[..., None] * factors
    mass = mixing.sum(dim=1)
    mixing = mixing / mass[:, None]
    mixed = torch.einsum("rbn,brd->rnd", mixing, p["features"])
    logits = mixed @ p["weight"].T + p["bias"]
    targets = torch.einsum("rbn,bc->rnc", mixing, F.one_hot(p["labels"], len(p["bias"])).float())
    losses = -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)
    return ((losses * mass).sum(dim=1) / mass.sum(dim=1)).mean()


def ours(p: dict[str, Tensor]) -> Tensor:
    """The classifier at each location, and the package's loss."""
    logits = p["features"] @ p["weight"].T + p["bias"]
    return dense_multimix_loss(logits, p["labels"], p["attention"], p["factors"], orders=p["orders"])


def products(p: dict[str, Tensor]) -> float:
    """Seconds of the products alone: the classifier and its two gradients, mixing logits and its gradient."""
    with torch.no_grad():
        features, factors = p["features"].flatten(0, 1), p["factors"]
        start = time.perf_counter()
        logits = features @ p["weight"].T
        stacked = logits.view(-1, len(factors))
        mixed = stacked @ factors
        back = mixed @ factors.T
        _ = back.view_as(logits) @ p["weight"], logits.T @ features
        return time.perf_counter() - start


def step(loss: object, p: dict[str, Tensor]) -> float:
    """Seconds of a forward and backward pass."""
    start = time.perf_counter()
    torch.autograd.grad(loss(p), [p["features"], p["weight"], p["bias"]])  # type: ignore[operator]
    return time.perf_counter() - start


def _peak(
    name: str | None, shape: tuple[int, ...], kind: str, threads: int, queue: "multiprocessing.Queue[int]"
) -> None:
    torch.set_num_threads(threads)
    p = problem(shape, kind)
    if name is not None:
        step({"literal": literal, "ours": ours}[name], p)
    # Not getrusage: its peak is that of the parent, too.
    status = Path("/proc/self/status").read_text()
    queue.put(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))


def extra_memory(name: str, shape: tuple[int, ...], kind: str) -> float:
    """Megabytes of peak memory that one step adds to its inputs, each measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    for what in (name, None):
        queue: multiprocessing.Queue[int] = context.Queue()
        process = context.Process(target=_peak, args=(what, shape, kind, torch.get_num_threads(), queue))
        process.start()
        peaks.append(queue.get())
        process.join()
    return (peaks[0] - peaks[1]) / 1024


def main() -> None:
    """Measure all shapes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9)
    steps = parser.parse_args().steps
    rows = []
    for shape in SHAPES:
        for kind in FACTORS:
            p = problem(shape, kind)
            assert abs(float((literal(p) - ours(p)).detach())) < 1e-4
            seconds = np.array([[step(literal, p), step(ours, p), products(p)] for _ in range(steps + 2)][2:])
            ratios = seconds[:, 0] / seconds[:, 1]
            memory = [extra_memory(name, shape, kind) for name in ("literal", "ours")]
            low, middle, high = np.percentile(ratios, [25, 50, 75])
            row = dict(zip("brdcn", shape, strict=True)) | {
                "factors": kind,
                "literal_ms": round(1e3 * float(np.median(seconds[:, 0]))),
                "ours_ms": round(1e3 * float(np.median(seconds[:, 1]))),
                "products_ms": round(1e3 * float(np.median(seconds[:, 2]))),
                "times_faster": round(float(middle), 1),
                "quartiles": f"{low:.1f} to {high:.1f}",
                "literal_extra_mb": round(memory[0]),
                "ours_extra_mb": round(memory[1]),
            }
            rows.append(row)
            print(row, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "loss.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
