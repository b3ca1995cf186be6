"""Models by name, and small batches of noise or sample sentences for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from ..training.pretrained import CLASSES, from_pretrained, model_classes
from .images import ImageTransform
from .models import image_sides, num_channels

SENTENCES = (
    "The second act drags, but the last twenty minutes are worth the whole evening.",
    "Not bad.",
    "A dull book with a beautiful cover, and I read it to the end only because the train stood still for hours.",
    "She paints what others overlook: the corner of a kitchen, a coat on a chair.",
    "Too loud, too long, too expensive.",
    "It works as the manual says, which is more than can be said of the one that I had before.",
    "The soup was cold and the waiter colder.",
    "I would see it again tomorrow, and take my children with me.",
)
MAX_TOKENS = 64
SECONDS = 1.0  # maximum duration of a waveform
PROCESSORS: dict[str, Any] = {"image": AutoImageProcessor, "text": AutoTokenizer, "audio": AutoFeatureExtractor}


def detect_task(name_or_path: str, **hub: Any) -> str:
    """Return the task of a model according to its configuration: "image", "text" or "audio" classification.

    Args:
        name_or_path: Hub name or directory.
        hub: Keyword arguments of `from_pretrained` that concern the Hub.

    Raises:
        ValueError: The architecture supports none of the tasks, or several and the configuration does not name a class.
    """
    config = from_pretrained(AutoConfig, name_or_path, **hub)
    supported = {
        task: {cls.__name__ for cls in classes}
        for task, auto in CLASSES.items()
        if (classes := model_classes(config, auto))
    }
    named = [task for task, names in supported.items() if names & set(config.architectures or ())]
    if len(named) == 1 or len(supported) == 1:
        return (named or list(supported))[0]
    if not supported:
        raise ValueError(
            f"{name_or_path} is a {config.model_type}, for which Transformers has no image, text or audio "
            "classification class: mm-hf models lists the supported classes."
        )
    raise ValueError(f"{name_or_path} supports the tasks {' and '.join(supported)}: choose one with --task.")


def load(name_or_path: str, task: str, **hub: Any) -> tuple[Any, Any]:
    """Load a classification model in evaluation mode, and its processor, tokenizer or feature extractor.

    Args:
        name_or_path: Hub name or directory.
        task: "image", "text" or "audio".
        hub: Keyword arguments of `from_pretrained` that concern the Hub.

    Returns:
        The model, and its processor or None if it has none.

    Raises:
        ValueError: The architecture does not support the task.
    """
    config = from_pretrained(AutoConfig, name_or_path, **hub)
    if not model_classes(config, CLASSES[task]):
        raise ValueError(
            f"{name_or_path} is a {config.model_type}, which does not support {task} classification: choose another "
            "--task."
        )
    model = from_pretrained(CLASSES[task], name_or_path, **hub).eval()
    try:
        processor = from_pretrained(PROCESSORS[task], name_or_path, **hub)
    except (OSError, ValueError, KeyError):  # the directory contains only the model
        processor = None
    if task == "text" and processor is not None and processor.pad_token is None:
        processor.pad_token = processor.eos_token
    if task == "text" and getattr(model.config, "pad_token_id", None) is None and processor is not None:
        model.config.pad_token_id = processor.pad_token_id
    return model, processor


def example_batch(model: Any, processor: Any, task: str, size: int, seed: int = 0) -> dict[str, Tensor]:
    """Create a batch of inputs and random labels for a model. The same seed gives the same batch.

    Args:
        model: Model from [`load`].
        processor: Processor from [`load`]. None: use noise or random tokens with the sizes of the configuration.
        task: "image", "text" or "audio".
        size: Batch size.
        seed: Seed of the noise, the lengths and the labels.

    Raises:
        ValueError: The model requires a feature extractor and has none, or the tokenizer does not match the model.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                                             intermediate_size=16, image_size=8, patch_size=4))
        >>> {name: tuple(x.shape) for name, x in example_batch(model, None, "image", 2).items()}
        {'pixel_values': (2, 3, 8, 8), 'labels': (2,)}
    """
    random = np.random.default_rng(seed)
    inputs = MAKERS[task](model, processor, size, random)
    device = next(model.parameters()).device
    inputs = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    floats = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return {k: v.to(device) for k, v in {**floats, "labels": _labels(model.config, size, random)}.items()}


def _labels(config: Any, size: int, random: np.random.Generator) -> Tensor:
    if getattr(config, "problem_type", None) == "multi_label_classification":
        return torch.from_numpy(random.integers(0, 2, (size, config.num_labels))).float()
    if config.num_labels == 1:
        return torch.from_numpy(random.standard_normal((size, 1))).float()
    return torch.from_numpy(random.integers(0, config.num_labels, size))


def _images(model: Any, processor: Any, size: int, random: np.random.Generator) -> Mapping[str, Any]:
    channels = num_channels(model.config)
    if processor is None:
        shape = (size, channels, *image_sides(model.config))
        return {"pixel_values": torch.from_numpy(random.standard_normal(shape)).float()}
    noise = random.integers(0, 256, (size, 64, 64, 3), dtype=np.uint8)
    transform = ImageTransform(processor, num_channels=channels)
    rows = transform({"image": [Image.fromarray(image) for image in noise], "label": [0] * size})
    return {name: torch.stack(values) for name, values in rows.items() if name != "labels"}


def _texts(model: Any, tokenizer: Any, size: int, random: np.random.Generator) -> Mapping[str, Any]:
    config = model.config.get_text_config()
    if tokenizer is not None:
        texts = [SENTENCES[int(random.integers(len(SENTENCES)))] for _ in range(size)]
        longest = min(
            tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or MAX_TOKENS, MAX_TOKENS
        )
        found = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        if int(found["input_ids"].max()) >= config.vocab_size:
            raise ValueError(
                f"The tokenizer does not match the model: it returns token ids up to {int(found['input_ids'].max())}, "
                f"but the vocabulary of the model has {config.vocab_size} tokens."
            )
        return found
    length = min(24, getattr(config, "max_position_embeddings", None) or 24)
    pad = getattr(config, "pad_token_id", None) or 0
    ids = torch.from_numpy(random.integers(min(200, config.vocab_size // 2), config.vocab_size, (size, length)))
    mask = torch.arange(length) < torch.from_numpy(random.integers(length // 2, length + 1, size))[:, None]
    return {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long()}


def _sounds(model: Any, extractor: Any, size: int, random: np.random.Generator) -> Mapping[str, Any]:
    rate = getattr(extractor, "sampling_rate", 16_000)
    lengths = (rate * SECONDS * random.uniform(0.6, 1.0, size)).astype(int)
    waves = [0.1 * random.standard_normal(n).astype(np.float32) for n in lengths]
    if extractor is not None:
        return extractor(waves, sampling_rate=rate, padding=True, return_tensors="pt")
    if model.main_input_name != "input_values":
        raise ValueError(
            f"{type(model).__name__} requires a feature extractor for {model.main_input_name}, but has none: save one "
            "with the model (preprocessor_config.json)."
        )
    return {"input_values": torch.stack([torch.from_numpy(wave[: min(lengths)]) for wave in waves])}


MAKERS: dict[str, Any] = {"image": _images, "text": _texts, "audio": _sounds}
