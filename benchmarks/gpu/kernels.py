"""Time and peak memory of the loss and its gradient alone, for each kernel (`dense_multimix_loss(kernel=...)`)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.setup import Rows, Setup, describe, device_cell, measure, memory_cell, time_cell
from mm_hf.functional import dense_multimix_loss, sample_factors
from mm_hf.functional.factors import sample_permutations

FILE, MINUTES = "gpu_kernels.csv", 3.0
KERNELS = ("eager", "compile", "triton")
SHAPES = (  # b, r, c, n
    (128, 196, 1000, 100),
    (128, 196, 1000, 1000),
    (128, 196, 100, 1000),
    (32, 196, 1000, 32),
    (8, 196, 1000, 32),
    (8, 196, 10, 1000),
    (32, 196, 21_841, 32),
)
MINIATURE = ((4, 16, 10, 20),)


def make_step(setup: Setup, shape: tuple[int, int, int, int], kernel: str) -> Callable[[], object]:
    """Return a function that computes the loss and the gradient of the per-location logits, in float32."""
    b, r, c, n = shape
    torch.manual_seed(0)
    logits = torch.randn(b, r, c, device=setup.device, requires_grad=True)
    labels = torch.randint(c, (b,), device=setup.device)
    attention = torch.rand(b, r, device=setup.device)
    factors = sample_factors(b, n, 1.0, device=setup.device)
    options: dict[str, Any] = {"permutations": sample_permutations(r, b, device=setup.device), "validate_args": False}

    def step() -> None:
        loss = dense_multimix_loss(logits, labels, attention, factors, kernel=kernel, **options)  # type: ignore[arg-type]
        torch.autograd.grad(loss, logits)

    return step


def run(setup: Setup) -> None:
    """Measure the shapes and kernels that have no row yet."""
    rows = Rows(setup, FILE, ("b", "r", "c", "n", "kernel"))
    for shape in MINIATURE if setup.rehearse else SHAPES:
        for kernel in KERNELS:
            key = dict(zip("brcn", shape, strict=True)) | {"kernel": kernel}
            if rows.has(**key) or setup.seconds_left < 10:
                continue
            start = time.monotonic()
            step = make_step(setup, shape, kernel)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()  # compiles and compares with "eager"
                setup.synchronize()
            first = time.monotonic() - start
            replaced = [str(item.message) for item in caught if "is not used" in str(item.message)]
            # The counter of a CPU is a dispatch mode, in which the eager operations replace a compiled function.
            counts = setup.device.type == "cuda" or kernel == "eager"
            found = measure(setup, step, rounds=2 if setup.rehearse else 20, counts=counts)
            note = replaced[0] if replaced else ""
            rows.add({**key, **found, "first_s": f"{first:.1f}", "note": note, "device": describe(setup.device)})


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table of docs/gpu.md."""
    found = [
        ["b", "r", "c", "n", "kernel", "loss and gradient", "against eager", "kernels' time", "against eager",
         "kernels", "peak memory", "first call"]
    ]  # fmt: skip
    sizes = ("b", "r", "c", "n")
    eager = {tuple(row[k] for k in sizes): row for row in rows if row["kernel"] == "eager"}
    for row in rows:
        base = eager.get(tuple(row[k] for k in sizes))
        ratio = "" if base is None else f"{float(row['ms']) / float(base['ms']):.2f}x"
        busy_ratio = ""
        if base is not None and row["device_ms"]:
            busy_ratio = f"{float(row['device_ms']) / float(base['device_ms']):.2f}x"
        if row["note"]:
            ratio = "replaced by eager"
        found.append(
            [
                row["b"], row["r"], f"{int(row['c']):,}", f"{int(row['n']):,}", f"`{row['kernel']}`",
                time_cell(row), ratio, device_cell(row), busy_ratio, row["kernels"], memory_cell(row),
                f"{row['first_s']} s",
            ]
        )  # fmt: skip
    return found
