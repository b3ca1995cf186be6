"""Cost of Dense MultiMix per training step and GPU on 8 to 1,024 GPUs, by formulas that are checked against the code.

    python -m benchmarks.scaling            # tables of docs/scaling.md from the formulas: seconds
    python -m benchmarks.scaling --check    # checks the formulas against the code, writes results/scaling.csv: a minute

There are two kinds of checks. Tensors on PyTorch's meta device, which have shapes but no values, take the same code
path as on a GPU: matrix products, kernel launches and bytes in memory are counted for any size. One, two and three real
processes (gloo) on the CPU measure the numbers sent and the memory. No GPU is used. Statements about time are limited
to what an assumed GPU would need.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import socket
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, tables
from mm_hf.distributed import GlobalBatch
from mm_hf.functional import dense_multimix_loss
from mm_hf.functional.mixers import DenseMixer
from mm_hf.locations.operations import ForwardSize
from mm_hf.methods import DenseMultiMix
from mm_hf.wrapping.auto_num_mixed import AutoNumMixed

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MODELS = {  # hidden size, layers, heads, intermediate size, patch
    "ViT-S/16": (384, 12, 6, 1536, 16),
    "ViT-B/16": (768, 12, 12, 3072, 16),
    "ViT-L/16": (1024, 24, 16, 4096, 16),
    "ViT-H/14": (1280, 32, 16, 5120, 14),
    "ViT-g/14": (1408, 40, 16, 6144, 14),
}
CLASSES = (10, 100, 1000, 21_841)
GPUS = (8, 64, 256, 1024)
BATCH, NUM_MIXED = 128, 1000
SECONDS_PER_LAUNCH = 5e-6  # of a kernel: assumed, not measured
# Kernel launches per step, per chunk of locations, and per chunk of mixed examples in it, as counted by --check.
LAUNCHES, LAUNCHES_PER_LOCATIONS, LAUNCHES_PER_MIXED = 12, 17, 14


# ---- the formulas ----


def products(b: int, r: int, c: int, n: int) -> int:
    """Return the operations of mixing: 2 r n b c each for logits, labels and gradient.

    With several processes, their mini-batches of b each are mixed as one, and each process computes its share of the n
    mixed examples.
    """
    return 6 * r * n * b * c


def head(b: int, r: int, d: int, c: int) -> int:
    """Return the operations of the classifier at every location and of its two gradients."""
    return 6 * b * r * d * c


def chunk_sizes(b: int, r: int, c: int, n: int) -> tuple[int, int]:
    """Return the number of locations and of mixed examples that the loss processes at a time."""
    return DenseMixer(torch.empty(1, b, n, device="meta")).chunk_sizes(r, c)


def kernel_launches(b: int, r: int, c: int, n: int) -> int:
    """Return the number of kernel launches of the loss and its gradient."""
    locations, mixed = chunk_sizes(b, r, c, n)
    chunks = math.ceil(r / locations)
    return LAUNCHES + chunks * (LAUNCHES_PER_LOCATIONS + LAUNCHES_PER_MIXED * math.ceil(n / mixed))


def memory(b: int, r: int, c: int, n: int, logit: int = 2, processes: int = 1) -> int:
    """Return the peak memory of the loss's tensors in bytes; a logit has 2 or 4 bytes.

    It is the largest of three: the memory while all logits are gathered; the memory of the forward computation at the
    last chunk, with the logits, their gradient in float32 and the tensors of the chunk; and the memory of the backward
    pass, with the gradient and its copy in the type of the logits, which is summed over processes.
    """
    global_batch, total = b * processes * r * c, b * processes
    locations, mixed = chunk_sizes(total, r, c, n)
    inputs, outputs = locations * total * c, locations * min(mixed, math.ceil(n / processes)) * c
    chunk = 4 * (3 * inputs + 4 * outputs + 2 * locations * total * n + total * c)
    own = logit * b * r * c
    forward = logit * global_batch + 4 * (global_batch - inputs) + chunk
    backward = global_batch * (4 + logit)
    if processes == 1:
        return max(forward, own + backward)
    gathering = own + 2 * logit * global_batch
    return own + max(gathering, forward, global_batch * (4 + 2 * logit))


def received(b: int, r: int, c: int, processes: int) -> int:
    """Return the numbers received per process: sizes, and labels, attention and logits of all examples."""
    return 3 * processes + b * processes * (1 + r + r * c)


def reduced(b: int, r: int, c: int, processes: int) -> int:
    """Return the numbers summed over processes: the gradient of all logits, and three numbers of the clean loss."""
    return 3 + b * processes * r * c


# ---- counted models ----


@functools.cache
def counted(name: str) -> dict[str, float]:
    """Count parameters, forward operations per image and locations of a ViT for 224 pixels, without its classifier."""
    from transformers import ViTConfig, ViTModel

    hidden, layers, heads, intermediate, patch = MODELS[name]
    config = ViTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate,
        patch_size=patch,
    )  # fmt: skip
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = ViTModel(config, add_pooling_layer=False)
        model(torch.empty(1, 3, 224, 224))
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "flops": counter.get_total_flops(), "r": (224 // patch) ** 2, "d": hidden}


# ---- the tables ----


def models() -> list[list[str]]:
    """Return the table of the models without mixing."""
    table = [["model", "parameters", "locations r", "operations per step of 128 images", "weights, gradient and AdamW"]]
    for name in MODELS:
        m = counted(name)
        step = f"{3 * BATCH * m['flops'] / 1e12:.1f} TFLOP"
        table.append(
            [name, f"{m['parameters'] / 1e6:,.0f} M", f"{m['r']}", step, f"{16 * m['parameters'] / 1e9:.1f} GB"]
        )
    return table


def step() -> list[list[str]]:
    """Return the table of one GPU's step, in which each GPU mixes its own mini-batch."""
    heads = [
        "c",
        "n",
        "chunk size",
        "the model",
        "classifier at all locations",
        "mixing",
        "kernel launches",
        "launch time",
    ]
    table = [["model", *heads, "memory"]]
    for name in ("ViT-B/16", "ViT-g/14"):
        m = counted(name)
        r, d = int(m["r"]), int(m["d"])
        for c in CLASSES:
            for n, chunk in [
                (NUM_MIXED, 20),
                *([(NUM_MIXED, 25)] if c == 1000 else [(100, 20), (100, 25)] if c > 1000 else []),
            ]:
                with mock.patch("mm_hf.functional.devices.chunk_elements", return_value=1 << chunk):
                    launches, held = kernel_launches(BATCH, r, c, n), memory(BATCH, r, c, n)
                flops = [3 * BATCH * m["flops"], head(BATCH, r, d, c), products(BATCH, r, c, n)]
                sizes = [name, f"{c:,}", f"{n:,}", f"2^{chunk}", *(f"{x / 1e12:,.2f} TFLOP" for x in flops)]
                launch_time = f"{1e3 * SECONDS_PER_LAUNCH * launches:,.0f} ms"
                table.append([*sizes, f"{launches:,}", launch_time, f"{held / 1e9:,.2f} GB"])
    return table


def num_mixed() -> list[list[str]]:
    """Return the table of the numbers that `num_mixed="auto"` selects, with the cost of mixing."""
    table = [["model", "device", "b", *(f"c = {c:,}" for c in CLASSES)]]
    for name in ("ViT-S/16", "ViT-B/16"):
        m = counted(name)
        for device, b in itertools.product(("cpu", "cuda"), (4, 8, 16, 32, BATCH)):
            cells = []
            for c in CLASSES:
                auto = AutoNumMixed()
                auto.count(b, ForwardSize(m["flops"], int(m["r"]), c, 2.0 * m["d"] * c))
                number = auto.select(DenseMultiMix(), b, torch.device(device))
                cells.append(f"{number:,} ({auto.share:.1%})")
            table.append([name, {"cpu": "CPU", "cuda": "accelerator"}[device], f"{b}", *cells])
    return table


def gather() -> list[list[str]]:
    """Return the table of `gather_across_devices` with ViT-B/16, per GPU and step."""
    m = counted("ViT-B/16")
    r = int(m["r"])
    table = [
        ["GPUs", "classes", "logits received", "gradient summed", "memory", "gradient of the weights (for comparison)"]
    ]
    for processes in GPUS:
        for c in CLASSES:
            logits = 2 * BATCH * processes * r * c
            row = [f"{processes:,}", f"{c:,}", *(f"{x / 1e9:,.2f} GB" for x in (logits, logits))]
            held = memory(BATCH, r, c, NUM_MIXED, processes=processes)
            table.append([*row, f"{held / 1e9:,.2f} GB", f"{4 * m['parameters'] / 1e9:.2f} GB"])
    return table


def checks() -> list[list[str]]:
    """Return the table of the formulas against counted and measured values."""
    table = [["quantity", "sizes", "formula", "code", "method"]]
    for row in harness.read("scaling.csv"):
        numbers = [f"{int(row[key]):,}" for key in ("formula", "code")]
        table.append([row["what"], row["sizes"], *numbers, row["how"]])
    return table


def write() -> None:
    """Update docs/scaling.md."""
    tables.update(PAGE, models, num_mixed, step, gather, checks)


# ---- the checks ----


WITHOUT_KERNEL = ("empty", "_unsafe_view", "promote_types")  # operations on memory and types only


class MemoryCounter(TorchDispatchMode):
    """Counter of kernel launches and of the peak memory of tensors that are created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.live = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.launches += not function.is_view and not any(name in str(function) for name in WITHOUT_KERNEL)
        for storage in [x.untyped_storage() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]:
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return made

    def _free(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.live -= size


def _null(*_: Any, **__: Any) -> Any:
    return contextlib.nullcontext()


def count_on_meta_device(b: int, r: int, c: int, n: int, logit: int, processes: int = 1) -> dict[str, int]:
    """Count operations, kernel launches and bytes of the loss and its gradient on the meta device, in one process."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[logit]
    global_batch = GlobalBatch([b] * processes, r, 0, torch.Generator())
    total = b * processes
    with torch.device("meta"):
        logits = torch.empty(b, r, c, dtype=dtype)
        labels, attention = torch.empty(b, dtype=torch.long), torch.empty(b, r)
        factors, permutations = torch.empty(total, n), torch.empty(r, total, dtype=torch.long)
    with contextlib.ExitStack() as stack:
        # The meta device has no autocast, and there are no other processes.
        for name in ("autocast", "distributed.all_gather", "distributed.all_reduce"):
            stack.enter_context(mock.patch(f"torch.{name}", _null))
        counter = stack.enter_context(FlopCounterMode(display=False))
        memory_counter = stack.enter_context(MemoryCounter())
        logits = logits.clone().requires_grad_()  # created while the counter is active
        columns = None
        gathered = logits
        if processes > 1:
            gathered, labels, attention = (
                global_batch.gather(logits, r),
                global_batch.gather(labels),
                global_batch.gather(attention, r),
            )
            columns = global_batch.columns(n)
        options = {"permutations": permutations, "columns": columns, "validate_args": False}  # as the methods call it
        loss = dense_multimix_loss(gathered, labels, attention, factors, **options)
        del gathered
        loss.backward()
    return {"operations": counter.get_total_flops(), "launches": memory_counter.launches, "bytes": memory_counter.peak}


def run_process(rank: int, processes: int, port: int, sizes: tuple[int, int, int, int], results: Any) -> None:
    """Run a step in one of several processes; put the numbers sent and the peak bytes into `results`."""
    from mm_hf.locations import LocationOutput

    torch.set_num_threads(1)
    sent = {"received": 0, "reduced": 0}
    if processes > 1:
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
        }
        os.environ.update(address)
        dist.init_process_group("gloo")
    b, r, c, n = sizes
    method = DenseMultiMix(num_mixed=n, alpha=0.5, gather_across_devices=True)
    all_gather, all_reduce = dist.all_gather, dist.all_reduce

    def gather_counted(parts: list[torch.Tensor], x: torch.Tensor) -> None:
        sent["received"] += sum(part.numel() for part in parts)
        all_gather(parts, x)

    def reduce_counted(x: torch.Tensor) -> None:
        sent["reduced"] += x.numel()
        all_reduce(x)

    dist.all_gather, dist.all_reduce = gather_counted, reduce_counted
    with MemoryCounter() as memory_counter:
        output = LocationOutput(
            torch.randn(b, c), torch.randn(b, r, c).requires_grad_(), torch.ones(b, r) > 0, torch.rand(b, r)
        )
        method.loss(output, torch.randint(c, (b,))).loss.backward()
    sent["bytes"] = memory_counter.peak
    if rank == 0:
        results.put(sent)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure(processes: int, sizes: tuple[int, int, int, int]) -> dict[str, int]:
    """Return the results of [`run_process`] in the given number of processes."""
    os.environ["PYTHONPATH"] = ":".join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.scaling"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    running = [context.Process(target=run_process, args=(i, processes, port, sizes, results)) for i in range(processes)]
    for process in running:
        process.start()
    found = results.get(timeout=300)
    for process in running:
        process.join()
    return found


def check() -> None:
    """Check the formulas against the code; write scaling.csv."""
    rows: list[dict[str, Any]] = []

    def add(what: str, sizes: str, formula: int, code: int, how: str) -> None:
        rows.append({"what": what, "sizes": sizes, "formula": formula, "code": code, "how": how})
        print(rows[-1], flush=True)

    counted_on = "counted, meta tensors"
    for b, r, c, n, logit in [(32, 16, 1000, 1000, 4), (128, 4, 21_841, 100, 2), (64, 49, 100, 300, 2)]:
        sizes = f"b={b}, r={r}, c={c:,}, n={n:,}, {'bfloat16' if logit == 2 else 'float32'}"
        found = count_on_meta_device(b, r, c, n, logit)
        add("operations of mixing", sizes, products(b, r, c, n), found["operations"], counted_on)
        add("kernel launches", sizes, kernel_launches(b, r, c, n), found["launches"], counted_on)
        add("peak bytes", sizes, memory(b, r, c, n, logit), found["bytes"], counted_on)
    for b, r, c, n, processes in [(16, 49, 1000, 96, 8), (4, 16, 1000, 1024, 1024)]:
        sizes = f"b={b}, r={r}, c={c:,}, n={n:,}, bfloat16, {processes:,} processes"
        found = count_on_meta_device(b, r, c, n, 2, processes)
        add("operations of mixing", sizes, products(b, r, c, n), found["operations"], counted_on)
        add("peak bytes", sizes, memory(b, r, c, n, 2, processes), found["bytes"], counted_on)
    b, r, c, n = shape = (16, 256, 1000, 60)
    for processes in (1, 2, 3):
        sizes = f"b={b}, r={r}, c={c:,}, n={n}, float32, {processes} process{'es' if processes > 1 else ''}"
        found = measure(processes, shape)
        volume = [received(b, r, c, processes), reduced(b, r, c, processes)] if processes > 1 else [0, 0]
        for key, formula in zip(("received", "reduced"), volume, strict=True):
            add(f"numbers {key}", sizes, formula, found[key], "measured, CPU")
        add("peak bytes", sizes, memory(b, r, c, n, 4, processes), found["bytes"], "measured, CPU")
    harness.write("scaling.csv", rows)


def main() -> None:
    """Check the formulas if asked to, and update the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check the formulas against the code")
    if parser.parse_args().check:
        print(harness.machine())
        check()
    write()


if __name__ == "__main__":
    main()
