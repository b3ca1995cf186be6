"""A model by name, and a small batch for it that needs no data set: noise, or a few sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from .images import ImageTransform
from .models import CLASSES, image_sides

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
LONGEST = 64  # tokens
SECONDS = 1.0  # of the longest waveform
PROCESSORS: dict[str, Any] = {"image": AutoImageProcessor, "text": AutoTokenizer, "audio": AutoFeatureExtractor}


def task_of(name_or_path: str, **hub: Any) -> str:
    """What a model classifies, by its configuration: "image", "text" or "audio".

    Raises:
        ValueError: It is of an architecture that classifies nothing, or several things and does not say which.
    """
    config = AutoConfig.from_pretrained(name_or_path, **hub)
    fitting = {}
    for task, auto in CLASSES.items():
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            fitting[task] = {cls.__name__ for cls in (found if isinstance(found, (list, tuple)) else [found])}
    named = [task for task, names in fitting.items() if names & set(config.architectures or ())]
    if len(named) == 1 or len(fitting) == 1:
        return (named or list(fitting))[0]
    if not fitting:
        raise ValueError(
            f"{name_or_path} is a {config.model_type}, for which Transformers has no class that classifies images, texts or "
            "audio: mm-hf models lists those that it has."
        )
    raise ValueError(f"{name_or_path} may classify {' or '.join(fitting)}: give --task.")


def load(name_or_path: str, task: str, **hub: Any) -> tuple[Any, Any]:
    """A classification model in evaluation mode, and its processor, tokenizer or feature extractor; None without one.

    Raises:
        ValueError: The model does not classify such inputs.
    """
    config = AutoConfig.from_pretrained(name_or_path, **hub)
    if type(config) not in CLASSES[task]._model_mapping:
        raise ValueError(
            f"{name_or_path} is a {config.model_type}, which does not classify {task}s: give another --task."
        )
    model = CLASSES[task].from_pretrained(name_or_path, **hub).eval()
    try:
        processor = PROCESSORS[task].from_pretrained(name_or_path, **hub)
    except (OSError, ValueError, KeyError):  # a directory with a model alone
        processor = None
    if task == "text" and processor is not None and processor.pad_token is None:
        processor.pad_token = processor.eos_token
    if task == "text" and getattr(model.config, "pad_token_id", None) is None and processor is not None:
        model.config.pad_token_id = processor.pad_token_id
    return model, processor


def example_batch(model: Any, processor: Any, task: str, size: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch as the model's forward takes it, with random labels; the same one for a seed.

    Args:
        model: Of [`load`].
        processor: Likewise. None: noise and random words of the sizes in the model's configuration.
        task: "image", "text" or "audio".
        size: Examples.
        seed: Of noise, lengths and labels.

    Raises:
        ValueError: Audio without a feature extractor, for a model that does not take waveforms; or a tokenizer that does
            not belong to the model.

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
    channels = getattr(model.config, "num_channels", 3)
    if processor is None:
        shape = (size, channels, *image_sides(model.config))
        return {"pixel_values": torch.from_numpy(random.standard_normal(shape)).float()}
    noise = random.integers(0, 256, (size, 64, 64, 3), dtype=np.uint8)
    transform = ImageTransform(processor, num_channels=channels)
    rows = transform({"image": [Image.fromarray(image) for image in noise], "label": [0] * size})
    return {"pixel_values": torch.stack([torch.as_tensor(x) for x in rows["pixel_values"]])}


def _texts(model: Any, tokenizer: Any, size: int, random: np.random.Generator) -> Mapping[str, Any]:
    config = model.config.get_text_config()
    if tokenizer is not None:
        texts = [SENTENCES[int(random.integers(len(SENTENCES)))] for _ in range(size)]
        longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or LONGEST, LONGEST)
        found = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        if int(found["input_ids"].max()) >= config.vocab_size:
            raise ValueError(
                f"The tokenizer beside the model gives token ids up to {int(found['input_ids'].max())}, and the model knows "
                f"{config.vocab_size}: they do not belong together."
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
            f"{type(model).__name__} takes {model.main_input_name}, which a feature extractor makes, and there is none beside "
            "the model: save one there (preprocessor_config.json)."
        )
    return {"input_values": torch.stack([torch.from_numpy(wave[: min(lengths)]) for wave in waves])}


MAKERS: dict[str, Any] = {"image": _images, "text": _texts, "audio": _sounds}
