"""Small models of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig


def class_mappings(class_names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a configuration that name the classes."""
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
    }


def small_vit(
    image_size: Any, patch_size: Any, class_names: Sequence[str], width: int = 64, layers: int = 4
) -> ViTConfig:
    """Return the configuration of the demo's ViT.

    The default standard deviation of initial weights, 0.02, is meant for widths of 768; a small model learns slowly
    with it.
    """
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=image_size,
        patch_size=patch_size,
        num_channels=1,
        initializer_range=0.1,
        **class_mappings(class_names),
    )


def small_resnet(class_names: Sequence[str]) -> ResNetConfig:
    """Return the configuration of a ResNet with three stages of one block each."""
    return ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        **class_mappings(class_names),
    )


# Transformers selects the loss of a model by the end of its class's name: subclasses keep ForImageClassification.
class SmallResNetForImageClassification(ResNetForImageClassification):
    """ResNet with a stem for small images: its stages reduce 28x28 pixels to 14x14 and 7x7."""

    def __init__(self, config: ResNetConfig):
        super().__init__(config)
        # Stride and pooling of the original stem are for large images and would leave 2x2 locations.
        self.resnet.embedder.pooler = nn.Identity()
        stem = self.resnet.embedder.embedder.convolution
        self.resnet.embedder.embedder.convolution = nn.Conv2d(
            stem.in_channels, stem.out_channels, kernel_size=3, padding=1, bias=False
        )
