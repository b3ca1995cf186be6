"""Time, peak memory and kernels of a training step for growing numbers of mixed examples."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu import step
from benchmarks.gpu.setup import Rows, Setup, describe, device_cell, measure, memory_cell, time_cell
from mm_hf import DenseMultiMix

FILE, MINUTES = "gpu_growth.csv", 3.0
NUMBERS = (0, 10, 32, 100, 316, 1000, 3162, 10_000)  # 0: plain training
MODEL, B, C = "ViT-B/16", 128, 1000


def run(setup: Setup) -> None:
    """Measure the numbers that have no row yet."""
    rows = Rows(setup, FILE, ("n",))
    b, c, numbers = (4, 10, (0, 10, 50)) if setup.rehearse else (B, C, NUMBERS)
    for n in numbers:
        if rows.has(n=n) or setup.seconds_left < 10:
            continue
        method = DenseMultiMix(num_mixed=n) if n else step.plain
        found = measure(setup, step.make_step(setup, MODEL, b, c, False, method), rounds=2 if setup.rehearse else 10)
        rows.add({"model": MODEL, "b": b, "c": c, "n": n, **found, "device": describe(setup.device)})


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table of docs/gpu.md."""
    found = [["model", "b", "c", "n", "step", "against plain", "kernels' time", "kernels", "peak memory"]]
    plain = next((row for row in rows if row["n"] == "0"), None)
    for row in rows:
        ratio = "" if plain is None else f"{float(row['ms']) / float(plain['ms']):.3f}x"
        n = f"{int(row['n']):,}" if row["n"] != "0" else "plain training"
        found.append(
            [
                row["model"], row["b"], f"{int(row['c']):,}", n, time_cell(row), ratio, device_cell(row),
                row["kernels"], memory_cell(row),
            ]
        )  # fmt: skip
    return found
