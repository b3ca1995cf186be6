"""What a step of Dense MultiMix costs each GPU, from 8 to 1,024 of them, by formulas that are held against the code.

    python benchmarks/scaling.py            # the tables of docs/scaling.md, from the formulas: seconds
    python benchmarks/scaling.py --check    # holds them against what the code does, benchmarks/results/scaling.csv: a minute

Two kinds of checks. Tensors without values (PyTorch's meta device) take the way that a GPU's take: products, kernels that would
be started and bytes alive at a time are counted, for any size. One, two and three real processes (gloo) on the CPU: numbers
sent and memory are measured. No GPU is used, and nothing is said about time but what an assumed GPU would need.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import multiprocessing
import os
import socket
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import tables
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mm_hf.distributed import GlobalBatch
from mm_hf.functional import dense_multimix_loss
from mm_hf.functional.mixers import DenseMixer

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MODELS = {  # hidden size, layers, heads, intermediate size, patch
    "ViT-B/16": (768, 12, 12, 3072, 16),
    "ViT-L/16": (1024, 24, 16, 4096, 16),
    "ViT-H/14": (1280, 32, 16, 5120, 14),
    "ViT-g/14": (1408, 40, 16, 6144, 14),
}
CLASSES = (10, 100, 1000, 21_841)
GPUS = (8, 64, 256, 1024)
BATCH, NUM_MIXED = 128, 1000
SECONDS_PER_START = 5e-6  # of a kernel: assumed, not measured
# Counted (--check).
STARTS_OF_A_BLOCK, STARTS_OF_A_PART = 35, 18


# ---- the formulas ----


def products(b: int, r: int, c: int, n: int, processes: int = 1) -> int:
    """Operations of mixing logits and labels and of the gradient, 2 r n b c each, and of all mixed examples' masses.

    With `processes`, their mini-batches of b each are mixed as one and each process computes its share of the n.
    """
    return 6 * r * n * b * c + 2 * r * n * b * processes


def head(b: int, r: int, d: int, c: int) -> int:
    """Operations of the classifier at every location, and of its two gradients."""
    return 6 * b * r * d * c


def blocks(b: int, r: int, c: int, n: int) -> tuple[int, int]:
    """How many locations and mixed examples the loss takes at a time."""
    return DenseMixer(torch.empty(1, b, n, device="meta")).blocks(r, c)


def starts(b: int, r: int, c: int, n: int) -> int:
    """Kernels that a GPU has to start for the loss and its gradient."""
    locations, mixed = blocks(b, r, c, n)
    walked = math.ceil(r / locations)
    return 20 + walked * (STARTS_OF_A_BLOCK + STARTS_OF_A_PART * math.ceil(n / mixed))


def memory(b: int, r: int, c: int, n: int, logit: int = 2, processes: int = 1) -> int:
    """Bytes of the loss's tensors that are alive at a time; a logit has 2 or 4.

    The largest of three: while all logits are gathered; in the walk, the logits, their gradient in float32 and what is made
    of the block and the part at hand; in the backward pass, the gradient, its product with that of the loss, and that in the
    type of the logits, or added up over the processes.
    """
    global_batch = b * processes * r * c
    locations, mixed = blocks(b * processes, r, c, n)
    block, part = locations * b * processes * c, locations * min(mixed, math.ceil(n / processes)) * c
    own = logit * b * r * c
    walk = global_batch * (logit + 4) + 4 * (8 * block + 4 * part)
    backward = global_batch * (4 + 4 + (logit if logit < 4 else 0))
    if processes == 1:
        return max(walk, own + backward)
    gathering = own + 2 * logit * global_batch
    return own + max(gathering, walk, backward, global_batch * (4 + 2 * logit))


def received(b: int, r: int, c: int, processes: int) -> int:
    """Numbers that each process has after the all-gathers of a step: sizes, and of all examples labels, attention, logits."""
    return 3 * processes + b * processes * (1 + r + r * c)


def reduced(b: int, r: int, c: int, processes: int) -> int:
    """Numbers that are summed over the processes: the gradient of all logits, and how many examples have a clean loss."""
    return 1 + b * processes * r * c


# ---- models, counted ----


@functools.cache
def counted(name: str) -> dict[str, float]:
    """Parameters, operations of one image's forward pass and locations of a ViT for 224 pixels, without its classifier."""
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
    """What the models are without mixing."""
    table = [
        ["model", "parameters", "locations r", "operations of a step for 128 images", "weights, gradient and AdamW"]
    ]
    for name in MODELS:
        m = counted(name)
        step = f"{3 * BATCH * m['flops'] / 1e12:.1f} TFLOP"
        table.append(
            [name, f"{m['parameters'] / 1e6:,.0f} M", f"{m['r']}", step, f"{16 * m['parameters'] / 1e9:.1f} GB"]
        )
    return table


def step() -> list[list[str]]:
    """Dense MultiMix in one GPU's step, mini-batches mixed by each GPU for itself."""
    heads = [
        "c",
        "n",
        "numbers at a time",
        "the model",
        "classifier at locations",
        "mixing",
        "kernels started",
        "that alone",
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
                with mock.patch("mm_hf.functional.mixers.chunk_elements", return_value=1 << chunk):
                    started, held = starts(BATCH, r, c, n), memory(BATCH, r, c, n)
                flops = [3 * BATCH * m["flops"], head(BATCH, r, d, c), products(BATCH, r, c, n)]
                sizes = [name, f"{c:,}", f"{n:,}", f"2^{chunk}", *(f"{x / 1e12:,.2f} TFLOP" for x in flops)]
                alone = f"{1e3 * SECONDS_PER_START * started:,.0f} ms"
                table.append([*sizes, f"{started:,}", alone, f"{held / 1e9:,.2f} GB"])
    return table


def gather() -> list[list[str]]:
    """`gather_across_devices` with ViT-B/16, for each GPU and step."""
    m = counted("ViT-B/16")
    r = int(m["r"])
    table = [
        ["GPUs", "classes", "logits received", "gradient summed", "memory", "gradient of the weights, for comparison"]
    ]
    for processes in GPUS:
        for c in CLASSES:
            logits = 2 * BATCH * processes * r * c
            row = [f"{processes:,}", f"{c:,}", *(f"{x / 1e9:,.2f} GB" for x in (logits, logits))]
            held = memory(BATCH, r, c, NUM_MIXED, processes=processes)
            table.append([*row, f"{held / 1e9:,.2f} GB", f"{4 * m['parameters'] / 1e9:.2f} GB"])
    return table


def checks() -> list[list[str]]:
    """The formulas against what was counted and measured."""
    table = [["what", "sizes", "formula", "the code", "how"]]
    for row in harness.read("scaling.csv"):
        numbers = [f"{int(row[key]):,}" for key in ("formula", "code")]
        table.append([row["what"], row["sizes"], *numbers, row["how"]])
    return table


def write() -> None:
    """Put the tables into the page."""
    tables.put(PAGE, models, step, gather, checks)


# ---- the checks ----


class Ledger(TorchDispatchMode):
    """Counts kernels that would be started and the bytes that are alive at a time, of tensors made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.starts = self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.starts += not function.is_view and "empty" not in str(function)
        for storage in [x.untyped_storage() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]:
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return made

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def _nothing(*_: Any, **__: Any) -> Any:
    return contextlib.nullcontext()


def without_values(b: int, r: int, c: int, n: int, logit: int, processes: int = 1) -> dict[str, int]:
    """What the loss and its gradient do with tensors that have no values, in one of so many processes."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[logit]
    global_batch = GlobalBatch([b] * processes, r, 0, torch.Generator())
    total = b * processes
    with torch.device("meta"):
        logits = torch.empty(b, r, c, dtype=dtype)
        labels, attention = torch.empty(b, dtype=torch.long), torch.empty(b, r)
        factors, permutations = torch.empty(total, n), torch.empty(r, total, dtype=torch.long)
    with contextlib.ExitStack() as stack:
        # There is no autocast of this device, and nobody to talk to.
        for name in ("autocast", "distributed.all_gather", "distributed.all_reduce"):
            stack.enter_context(mock.patch(f"torch.{name}", _nothing))
        counter = stack.enter_context(FlopCounterMode(display=False))
        ledger = stack.enter_context(Ledger())
        logits = logits.clone().requires_grad_()  # made while it is counted
        columns = None
        seen = logits
        if processes > 1:
            seen, labels, attention = (
                global_batch.gather(logits, r),
                global_batch.gather(labels),
                global_batch.gather(attention, r),
            )
            columns = global_batch.columns(n)
        loss = dense_multimix_loss(seen, labels, attention, factors, permutations=permutations, columns=columns)
        del seen
        loss.backward()
    return {"operations": counter.get_total_flops(), "starts": ledger.starts, "bytes": ledger.peak}


def real(rank: int, processes: int, port: int, sizes: tuple[int, int, int, int], results: Any) -> None:
    """One of so many processes: numbers that a step sends, and bytes of its tensors that are alive at a time."""
    from mm_hf.locations import LocationOutput
    from mm_hf.methods import DenseMultiMix

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
    with Ledger() as ledger:
        output = LocationOutput(
            torch.randn(b, c), torch.randn(b, r, c).requires_grad_(), torch.ones(b, r) > 0, torch.rand(b, r)
        )
        method.loss(output, torch.randint(c, (b,))).loss.backward()
    sent["bytes"] = ledger.peak
    if rank == 0:
        results.put(sent)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure(processes: int, sizes: tuple[int, int, int, int]) -> dict[str, int]:
    """What [`real`] finds."""
    os.environ["PYTHONPATH"] = ":".join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scaling"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    running = [context.Process(target=real, args=(i, processes, port, sizes, results)) for i in range(processes)]
    for process in running:
        process.start()
    found = results.get(timeout=300)
    for process in running:
        process.join()
    return found


def check() -> None:
    """Hold the formulas against the code; the rows of scaling.csv."""
    rows: list[dict[str, Any]] = []

    def add(what: str, sizes: str, formula: int, code: int, how: str) -> None:
        rows.append({"what": what, "sizes": sizes, "formula": formula, "code": code, "how": how})
        print(rows[-1], flush=True)

    counted_on = "counted, tensors without values"
    for b, r, c, n, logit in [(32, 16, 1000, 1000, 4), (128, 4, 21_841, 100, 2), (64, 49, 100, 300, 2)]:
        sizes = f"b={b}, r={r}, c={c:,}, n={n:,}, {'bfloat16' if logit == 2 else 'float32'}"
        found = without_values(b, r, c, n, logit)
        add("operations of mixing", sizes, products(b, r, c, n), found["operations"], counted_on)
        add("kernels started", sizes, starts(b, r, c, n), found["starts"], counted_on)
        add("bytes alive", sizes, memory(b, r, c, n, logit), found["bytes"], counted_on)
    for b, r, c, n, processes in [(16, 49, 1000, 96, 8), (4, 16, 1000, 1024, 1024)]:
        sizes = f"b={b}, r={r}, c={c:,}, n={n:,}, bfloat16, {processes:,} processes"
        found = without_values(b, r, c, n, 2, processes)
        add("operations of mixing", sizes, products(b, r, c, n, processes), found["operations"], counted_on)
        add("bytes alive", sizes, memory(b, r, c, n, 2, processes), found["bytes"], counted_on)
    b, r, c, n = shape = (16, 256, 1000, 60)
    for processes in (1, 2, 3):
        sizes = f"b={b}, r={r}, c={c:,}, n={n}, float32, {processes} process{'es' if processes > 1 else ''}"
        found = measure(processes, shape)
        volume = [received(b, r, c, processes), reduced(b, r, c, processes)] if processes > 1 else [0, 0]
        for key, formula in zip(("received", "reduced"), volume, strict=True):
            add(f"numbers {key}", sizes, formula, found[key], "measured, CPU")
        add("bytes alive", sizes, memory(b, r, c, n, 4, processes), found["bytes"], "measured, CPU")
    harness.write("scaling.csv", rows)


def main() -> None:
    """Check, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        print(harness.machine())
        check()
    write()


if __name__ == "__main__":
    main()
