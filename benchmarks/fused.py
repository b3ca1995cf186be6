"""Time and memory of the Dense MultiMix loss and its gradient, against a literal implementation that mixes features.

The literal implementation is vectorized (einsum) and computes the (locations, mixed, features) tensor of the paper's
formulas. Both include the classifier. A third run, "products", computes only the matrix products that dense factors
require. The implementations alternate in one process, with a new process for each row. The table
benchmarks/results/fused.csv has the median of the ratios per round, their quartiles, and the extra memory of one step:
the peak resident size of a process that runs it, minus that of a process that runs a step of a tiny problem.

    python -m benchmarks.fused [--steps 15]
    python -m benchmarks.fused --growth     # seconds against n, r, b and c: results/growth.csv, docs/images/growth.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from mm_hf import dense_multimix_loss, sample_factors
from mm_hf.functional.factors import SparseFactors, alpha_for, sample_permutations, sample_sparse_factors

SHAPES = [(128, 49, 384, 100, 1000), (32, 49, 768, 1000, 500), (64, 196, 384, 100, 1000)]
FACTORS = ("alpha = 1", "3 examples")
TINY = (4, 2, 8, 4, 8)
PLOT = Path(__file__).parents[1] / "docs" / "images" / "growth.png"


def problem(shape: tuple[int, ...], kind: str) -> dict[str, Any]:
    """Draw features, a classifier, labels, attention, factors and permutations."""
    torch.manual_seed(0)
    b, r, d, c, n = shape
    factors: Tensor | SparseFactors = sample_factors(b, n, 1.0)
    if kind == "3 examples":  # the default of DenseMultiMix
        factors = sample_sparse_factors(b, n, alpha_for(3, min(8, b)), examples_per_mix=min(8, b))
    return {
        "features": torch.randn(b, r, d, requires_grad=True),
        "weight": (0.05 * torch.randn(c, d)).requires_grad_(),
        "bias": torch.zeros(c, requires_grad=True),
        "labels": torch.randint(c, (b,)),
        "attention": torch.rand(b, r),
        "factors": factors,
        "permutations": sample_permutations(r, b),
    }


def literal(p: dict[str, Any]) -> Tensor:
    """Mix features and labels at each location, apply the classifier and weigh by attention."""
    matrix = p["factors"].dense() if isinstance(p["factors"], SparseFactors) else p["factors"]
    factors = torch.stack([matrix[permutation] for permutation in p["permutations"]])
    mixing = p["attention"].T[..., None] * factors
    mass = mixing.sum(dim=1)
    mixing = mixing / mass[:, None].clamp(min=1e-30)
    mixed = torch.einsum("rbn,brd->rnd", mixing, p["features"])
    logits = mixed @ p["weight"].T + p["bias"]
    targets = torch.einsum("rbn,bc->rnc", mixing, F.one_hot(p["labels"], len(p["bias"])).float())
    losses = -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)
    return ((losses * mass).sum(dim=1) / mass.sum(dim=1)).mean()


def ours(p: dict[str, Any]) -> Tensor:
    """Apply the classifier at each location and compute the package's loss."""
    logits = p["features"] @ p["weight"].T + p["bias"]
    return dense_multimix_loss(logits, p["labels"], p["attention"], p["factors"], permutations=p["permutations"])


def products(p: dict[str, Any]) -> None:
    """Compute the matrix products only: the classifier, mixing, and their gradients."""
    with torch.no_grad():
        features, factors = p["features"].flatten(0, 1), p["matrix"]
        logits = features @ p["weight"].T
        mixed = logits.view(-1, len(factors)) @ factors
        logits_grad = mixed @ factors.T
        _ = logits_grad.view_as(logits) @ p["weight"], logits.T @ features


def step(loss: Any, p: dict[str, Any]) -> None:
    """Run a forward and backward pass."""
    torch.autograd.grad(loss(p), [p["features"], p["weight"], p["bias"]])


def one_step(name: str | None, shape: tuple[int, ...], kind: str) -> None:
    """Draw the inputs, run a step of a tiny problem, and a step of the real one if `name` is given."""
    loss = ours if name == "ours" else literal
    step(loss, problem(TINY, kind))
    p = problem(shape, kind)
    if name is not None:
        step(loss, p)


def time_row(shape: tuple[int, ...], kind: str, steps: int) -> dict[str, np.ndarray]:
    """Return the seconds of each implementation in each round."""
    p = problem(shape, kind)
    p["matrix"] = p["factors"].dense() if isinstance(p["factors"], SparseFactors) else p["factors"]
    assert abs(float((literal(p) - ours(p)).detach())) < 1e-4
    runs = {"literal": lambda: step(literal, p), "ours": lambda: step(ours, p), "products": lambda: products(p)}
    return harness.alternate(runs, steps)


def compare(steps: int) -> None:
    """Measure all `SHAPES` and write the table."""
    rows = []
    for shape in SHAPES:
        for kind in FACTORS:
            seconds, _ = harness.in_process(time_row, shape, kind, steps)
            faster, quartiles = harness.ratio(seconds["literal"], seconds["ours"], 1)
            memory = {name: harness.peak_memory(one_step, name, shape, kind) for name in ("literal", "ours", None)}
            rows.append(
                {
                    **dict(zip("brdcn", shape, strict=True)),
                    "factors": kind,
                    **{f"{name}_ms": round(1e3 * float(np.median(s))) for name, s in seconds.items()},
                    "times_faster": faster,
                    "quartiles": quartiles,
                    "literal_extra_mb": round(memory["literal"] - memory[None]),
                    "ours_extra_mb": round(memory["ours"] - memory[None]),
                }
            )
            print(rows[-1], flush=True)
    harness.write("fused.csv", rows)


def loss_alone(p: dict[str, Any]) -> None:
    """Compute the loss and its gradient without the classifier."""
    loss = dense_multimix_loss(p["logits"], p["labels"], p["attention"], p["factors"], permutations=p["permutations"])
    torch.autograd.grad(loss, p["logits"])


def growth(repeats: int) -> None:
    """Measure the loss and its gradient against each size; the other sizes are those of the first shape."""
    sizes = {
        "n": [250, 500, 1000, 2000, 4000, 8000],
        "r": [16, 32, 64, 128, 256],
        "b": [16, 32, 64, 128, 256, 512],
        "c": [25, 50, 100, 200, 400, 800],
    }
    base = {"b": 128, "r": 49, "d": 1, "c": 100, "n": 1000}
    rows = []
    for kind in FACTORS:
        for name, values in sizes.items():
            runs = {}
            for value in values:
                shape = {**base, name: value}
                p = problem(tuple(shape.values()), kind)
                p["logits"] = torch.randn(shape["b"], shape["r"], shape["c"], requires_grad=True)
                runs[str(value)] = lambda p=p: loss_alone(p)
            seconds = harness.alternate(runs, repeats)
            times = [float(np.median(seconds[str(value)])) for value in values]
            exponent = float(np.polyfit(np.log(values), np.log(times), 1)[0])
            for value, seconds in zip(values, times, strict=True):
                row = {"factors": kind, "size": name, "value": value, "ms": round(1e3 * seconds, 2)}
                rows.append({**row, "exponent": round(exponent, 2)})
            print(f"{kind:12s} {name}: exponent {exponent:.2f}", flush=True)
    harness.write("growth.csv", rows)
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    """Plot seconds against each size on logarithmic axes, with a line of slope 1."""
    from matplotlib import pyplot as plt

    names = {"n": "mixed examples n", "r": "locations r", "b": "mini-batch b", "c": "classes c"}
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), sharey=True, layout="constrained")
    for axis, (size, label) in zip(axes, names.items(), strict=True):
        for kind, color, marker in zip(FACTORS, ("#0072B2", "#D55E00"), "os", strict=True):
            selected = [row for row in rows if row["size"] == size and row["factors"] == kind]
            x, y = [row["value"] for row in selected], [row["ms"] for row in selected]
            axis.loglog(x, y, marker=marker, ms=4, color=color, label=f"{kind}: slope {selected[0]['exponent']:.2f}")
        x = [x[0], x[-1]]
        axis.loglog(x, [y[-1] * v / x[-1] for v in x], ":", color="0.5", label="slope 1")
        ticks = [row["value"] for row in selected]
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.legend(fontsize=7, frameon=False, loc="upper left")
        axis.grid(which="both", color="0.92")
    axes[0].set_ylim(top=3 * max(row["ms"] for row in rows))  # space for the legends
    axes[0].set_ylabel("loss and gradient (ms)")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=150)


def main() -> None:
    """Measure all shapes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--growth", action="store_true")
    args = parser.parse_args()
    print(harness.machine())
    growth(args.steps) if args.growth else compare(args.steps)


if __name__ == "__main__":
    main()
