"""Time and peak memory of a training step with mixing, relative to plain training.

A step is forward, backward and AdamW on random inputs. All methods run alternately in one process. benchmarks/results/
step.csv gets the medians and quartiles of the ratios to plain training per round, and the ratio of the peak memory of
two processes that run two steps each. Cases that are not measured keep their rows.

    python -m benchmarks.step [--steps 5] [--cases small vit vit1000 bert b4c10 ... b32c1000]

"literal" is a direct implementation of the paper's formulas: a Dirichlet sample for each location and mixed example,
mixed features, and attention from `output_attentions=True`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from benchmarks import harness
from mm_hf import ERM, DenseMultiMix, Mixing, Mixup, MultiMix, wrap_model

VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
VIT_S |= {"image_size": 224, "patch_size": 16, "num_labels": 100}
SMALL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
SMALL |= {"image_size": 32, "patch_size": 4, "num_labels": 10}


def images(b: int, side: int, classes: int) -> dict[str, Tensor]:
    """Return a random mini-batch of images."""
    return {"pixel_values": torch.randn(b, 3, side, side), "labels": torch.randint(classes, (b,))}


def texts(classes: int) -> dict[str, Tensor]:
    """Return a random mini-batch of 32 texts of 128 tokens."""
    ids = torch.randint(1000, 30000, (32, 128))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(classes, (32,))}


class Kornia:
    """Plain training on batches mixed by kornia's MixUp and CutMix alternately."""

    def __init__(self) -> None:
        from kornia import augmentation

        self.mixes = [
            augmentation.RandomMixUpV2(data_keys=["input", "class"], p=1.0),
            augmentation.RandomCutMixV2(data_keys=["input", "class"], p=1.0, use_correct_lambda=True),
        ]
        self.step = 0

    def __call__(self, model: Any, pixel_values: Tensor, labels: Tensor) -> Tensor:
        mix = self.mixes[self.step % 2]
        self.step += 1
        mixed, pairs = mix(pixel_values, labels)
        pairs = pairs.reshape(-1, pairs.shape[-1])
        logits = model(pixel_values=mixed).logits
        share = pairs[:, 2]
        own = F.cross_entropy(logits, pairs[:, 0].long(), reduction="none")
        other = F.cross_entropy(logits, pairs[:, 1].long(), reduction="none")
        return ((1 - share) * own + share * other).mean()


def literal(model: Any, pixel_values: Tensor, labels: Tensor, n: int = 1000) -> Tensor:
    """Return the loss of plain training and of Dense MultiMix in a literal implementation."""
    output = model.vit(pixel_values, output_attentions=True)
    features = output.last_hidden_state[:, 1:]
    attention = output.attentions[-1][:, :, 0, 1:].mean(dim=1).detach()
    attention = attention / attention.sum(dim=1, keepdim=True)
    b, r, _ = features.shape
    factors = torch.distributions.Dirichlet(torch.ones(r, n, b, device=features.device)).sample()
    mixing = attention.T[:, None] * factors
    mass = mixing.sum(dim=-1)
    mixing = mixing / mass[..., None]
    logits = model.classifier(torch.einsum("rnb,brd->rnd", mixing, features))
    targets = mixing @ F.one_hot(labels, logits.shape[-1]).float()
    losses = -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)
    dense = ((losses * mass).sum(dim=1) / mass.sum(dim=1)).mean()
    return F.cross_entropy(model.classifier(output.last_hidden_state[:, 0]), labels) + dense


def bert(classes: int) -> Callable[[], nn.Module]:
    """Return a function that builds BERT-base."""
    return lambda: BertForSequenceClassification(BertConfig(num_labels=classes))


def vit(classes: int = 100, attention: str = "sdpa") -> Callable[[], nn.Module]:
    """Return a function that builds ViT-S/16."""
    return lambda: ViTForImageClassification(
        ViTConfig(**{**VIT_S, "num_labels": classes}, attn_implementation=attention)  # type: ignore[arg-type]
    )


def small() -> nn.Module:
    """Build a ViT of 5 million parameters for 32x32 images."""
    return ViTForImageClassification(ViTConfig(**SMALL))  # type: ignore[arg-type]


# Case -> (title, mini-batch, method by name -> (model, method or literal loss)); the first method is plain training.
Run = tuple[Callable[[], nn.Module], Any]
CASES: dict[str, tuple[str, Callable[[], dict[str, Tensor]], dict[str, Run]]] = {
    "small": (
        "ViT, 5 M parameters, 32 px, 64 patches, b = 128, c = 10",
        lambda: images(128, 32, 10),
        {
            "plain training": (small, ERM()),
            "Mixup()": (small, Mixup()),
            "MultiMix(num_mixed=1000)": (small, MultiMix(num_mixed=1000)),
            "DenseMultiMix()": (small, DenseMultiMix()),
            "DenseMultiMix(num_mixed=1000)": (small, DenseMultiMix(num_mixed=1000)),
            "DenseMultiMix(num_mixed=1000, alpha=(0.5, 2))": (small, DenseMultiMix(num_mixed=1000, alpha=(0.5, 2.0))),
            "DenseMultiMix(num_mixed=10_000)": (small, DenseMultiMix(num_mixed=10_000)),
        },
    ),
    "vit": (
        "ViT-S/16, 224 px, 196 patches, b = 32, c = 100",
        lambda: images(32, 224, 100),
        {
            "plain training": (vit(), ERM()),
            "DenseMultiMix()": (vit(), DenseMultiMix()),
            "DenseMultiMix(num_mixed=1000)": (vit(), DenseMultiMix(num_mixed=1000)),
            "DenseMultiMix(num_mixed=10_000)": (vit(), DenseMultiMix(num_mixed=10_000)),
            "kornia MixUp and CutMix": (vit(), Kornia()),
            "literal, n = 1,000": (vit(attention="eager"), literal),
        },
    ),
    "vit1000": (
        "ViT-S/16, 224 px, 196 patches, b = 32, c = 1,000",
        lambda: images(32, 224, 1000),
        {
            "plain training": (vit(1000), ERM()),
            "DenseMultiMix()": (vit(1000), DenseMultiMix()),
            "DenseMultiMix(num_mixed=1000)": (vit(1000), DenseMultiMix(num_mixed=1000)),
        },
    ),
    "bert": (
        "BERT-base, 128 tokens, b = 32",
        lambda: texts(2),
        {
            "plain training": (bert(2), ERM()),
            "DenseMultiMix(num_mixed=1000), c = 2": (bert(2), DenseMultiMix(num_mixed=1000)),
            "DenseMultiMix(num_mixed=1000), c = 20": (bert(20), DenseMultiMix(num_mixed=1000)),
        },
    ),
}


def default_case(b: int, classes: int) -> tuple[str, Callable[[], dict[str, Tensor]], dict[str, Run]]:
    """Return the case that compares the default of `num_mixed`, "auto", with plain training of ViT-S/16."""
    runs: dict[str, Run] = {"plain training": (vit(classes), ERM()), "DenseMultiMix()": (vit(classes), DenseMultiMix())}
    return f"ViT-S/16, 224 px, 196 patches, b = {b}, c = {classes:,}", lambda: images(b, 224, classes), runs


# Small mini-batches, as on one GPU: mixing costs the same for any b.
for classes in (10, 100, 1000):
    for b in (4, 8, 16, 32):
        title = default_case(b, classes)[0]
        if title not in {known for known, _, _ in CASES.values()}:  # b = 32 has cases with more methods
            CASES[f"b{b}c{classes}"] = default_case(b, classes)


def stepper(case: str, name: str) -> Callable[[], None]:
    """Return a function that runs one training step of a case and method."""
    torch.manual_seed(0)
    _, batch, methods = CASES[case]
    build, method = methods[name]
    model, inputs = build().train(), batch()
    is_literal = not isinstance(method, Mixing)
    if not is_literal:
        wrap_model(model, method)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        loss = method(model, **inputs) if is_literal else model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def two_steps(case: str, name: str) -> None:
    """Run two steps, for peak memory."""
    step = stepper(case, name)
    step()
    step()


def main() -> None:
    """Measure the chosen cases and update step.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    print(harness.machine())
    rows = []
    for case in args.cases:
        title, _, methods = CASES[case]
        print(title, flush=True)
        steps = {name: stepper(case, name) for name in methods}
        rounds = args.steps * (4 if case == "small" else 1)
        seconds = harness.alternate(steps, rounds, 1)
        del steps
        plain = next(iter(methods))
        memory = {name: harness.peak_memory(two_steps, case, name) for name in methods}
        for name in methods:
            middle, quartiles = harness.ratio(seconds[name], seconds[plain])
            row: dict[str, object] = {
                "case": title,
                "method": name,
                "median_ms": round(1e3 * float(np.median(seconds[name]))),
                "time": middle,
                "quartiles": quartiles,
                "rounds": rounds,
            }
            row |= {"peak_mb": round(memory[name]), "memory": round(memory[name] / memory[plain], 2)}
            rows.append(row)
            print(row, flush=True)
    titles = [title for title, _, _ in CASES.values()]
    kept = [row for row in harness.read("step.csv") if row["case"] not in {row["case"] for row in rows}]
    harness.write("step.csv", sorted([*kept, *rows], key=lambda row: titles.index(row["case"])))


if __name__ == "__main__":
    main()
