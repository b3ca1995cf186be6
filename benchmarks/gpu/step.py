"""Time, peak memory and kernels of training steps: plain, Dense MultiMix, a literal implementation, other libraries.

A step is forward, backward and AdamW on random images, under autocast in bfloat16. The models that torch.compile has
compiled come last. A case that does not fit the memory has the entry "out of memory".
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.gpu.setup import Rows, Setup, describe, device_cell, measure, memory_cell, time_cell
from benchmarks.step import Kornia, images, literal
from mm_hf import DenseMultiMix, Mixing, wrap_model

FILE, MINUTES = "gpu_step.csv", 12.0
KEYS = ("model", "b", "c", "compiled", "method")
MODELS: dict[str, dict[str, int]] = {
    "ViT-B/16": {},
    "ViT-S/16": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
}
MINIATURE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BATCHES, CLASSES = (128, 32, 8), (1000, 100, 10, 21_841)
LITERAL_CLASSES = 1000  # with more, the mixed logits of all locations do not fit the memory
PLAIN = "plain training"
Step = Callable[..., Tensor]


class Torchvision:
    """Plain training on batches mixed by torchvision's MixUp and CutMix alternately."""

    def __init__(self, num_classes: int) -> None:
        from torchvision.transforms import v2

        self.mixes = [v2.MixUp(num_classes=num_classes), v2.CutMix(num_classes=num_classes)]
        self.step = 0

    def __call__(self, model: Any, pixel_values: Tensor, labels: Tensor) -> Tensor:
        mixed, targets = self.mixes[self.step % 2](pixel_values, labels)
        self.step += 1
        return F.cross_entropy(model(pixel_values=mixed).logits, targets)


def plain(model: Any, pixel_values: Tensor, labels: Tensor) -> Tensor:
    """Return the model's own loss."""
    return model(pixel_values=pixel_values, labels=labels).loss


def methods(classes: int, compiled: bool) -> Iterator[tuple[str, Mixing | Step]]:
    """Yield the methods by name: a mixing method, or a function that returns a loss."""
    yield PLAIN, plain
    yield "DenseMultiMix()", DenseMultiMix()
    yield "DenseMultiMix(num_mixed=1000)", DenseMultiMix(num_mixed=1000)
    if compiled:
        return
    if classes <= LITERAL_CLASSES:
        yield "literal, n = 1,000", literal
    for name, make in (("kornia", Kornia), ("torchvision", lambda: Torchvision(classes))):
        try:
            yield f"{name} MixUp and CutMix", make()
        except ImportError:
            print(f"{name} is not installed and is left out.")


def cases(setup: Setup) -> Iterator[tuple[str, int, int, bool]]:
    """Yield model, batch size, number of classes, and whether the model is compiled, the most important ones first."""
    if setup.rehearse:
        yield from [("ViT-B/16", 4, 10, False), ("ViT-B/16", 4, 10, True)]
        return
    eager = [(name, b, c, False) for b in BATCHES for c in CLASSES for name in MODELS]
    compiled = [(name, BATCHES[0], c, True) for c in CLASSES for name in MODELS]
    yield from [*eager[:2], compiled[0], *eager[2:], *compiled[1:]]


def make_step(
    setup: Setup, model_name: str, b: int, c: int, compiled: bool, method: Mixing | Step
) -> Callable[[], object]:
    """Return a function that runs one training step."""
    torch.manual_seed(0)
    sizes = MINIATURE if setup.rehearse else MODELS[model_name]
    side = 32 if setup.rehearse else 224
    attention = "eager" if method is literal else "sdpa"
    config = ViTConfig(**sizes, image_size=side, num_labels=c, attn_implementation=attention)  # type: ignore[arg-type]
    with setup.device:  # initializing on the device is faster
        model = ViTForImageClassification(config).train()
    batch = {k: v.to(setup.device) for k, v in images(b, side, c).items()}
    loss_of = plain if isinstance(method, Mixing) else method
    if isinstance(method, Mixing):
        wrap_model(model, method).prepare(batch)
    called: Any = model
    if compiled:
        called = torch.compile(model, backend="eager" if setup.rehearse else "inductor")
    optimizer = torch.optim.AdamW(model.parameters(), fused=setup.device.type == "cuda")

    def step() -> None:
        with setup.autocast():
            loss = loss_of(called, **batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def run(setup: Setup) -> None:
    """Measure the cases that have no row yet, until the time is over."""
    rows = Rows(setup, FILE, KEYS)
    for model, b, c, compiled in cases(setup):
        for name, method in methods(c, compiled):
            key = dict(zip(KEYS, (model, b, c, compiled, name)))
            if rows.has(**key) or setup.seconds_left < (60 if compiled and not setup.rehearse else 10):
                continue
            found: dict[str, Any] = {
                "ms": "out of memory",
                "quartiles": "",
                "peak_mb": "",
                "kernels": "",
                "device_ms": "",
            }
            try:
                step = make_step(setup, model, b, c, compiled, method)
                found = measure(setup, step, rounds=2 if setup.rehearse else 7, warm_up=1)
            except torch.OutOfMemoryError:
                pass
            step = None  # type: ignore[assignment]
            gc.collect()
            if setup.device.type == "cuda":
                torch.cuda.empty_cache()
            torch._dynamo.reset()
            rows.add({**key, **found, "device": describe(setup.device)})


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table of docs/gpu.md."""
    found = [
        ["model", "b", "c", "compiled", "method", "step", "against plain", "kernels' time", "against plain", "kernels",
         "peak memory"]
    ]  # fmt: skip
    plain_rows = {tuple(row[key] for key in KEYS[:-1]): row for row in rows if row["method"] == PLAIN}
    for row in rows:
        base = plain_rows.get(tuple(row[key] for key in KEYS[:-1]))
        time, ratio, device, device_ratio = row["ms"], "", "", ""
        if base is not None and row["kernels"] and base["kernels"]:
            time, ratio = time_cell(row), f"{float(row['ms']) / float(base['ms']):.2f}x"
            if row["device_ms"]:
                device = device_cell(row)
                device_ratio = f"{float(row['device_ms']) / float(base['device_ms']):.2f}x"
        compiled = "yes" if row["compiled"] == "True" else "no"
        found.append(
            [
                row["model"], row["b"], f"{int(row['c']):,}", compiled, row["method"], time, ratio, device,
                device_ratio, row["kernels"], memory_cell(row),
            ]
        )  # fmt: skip
    return found
