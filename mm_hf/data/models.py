"""Models, image processors and tokenizers: pretrained by name, or from scratch by architecture and configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    ViTImageProcessorPil,
)

from ..methods.settings import nearest
from ..training.pretrained import CLASSES, from_pretrained, model_classes
from .options import check_architecture, read_overrides


def override(config: Any, overrides: str) -> list[str]:
    """Update a configuration from `name=value,name=value`, or from JSON, which supports lists.

    Returns:
        The names of the changed attributes.

    Raises:
        ValueError: The text has another form, or the configuration does not have an attribute of that name.
    """
    values = read_overrides(overrides)
    for name, value in values.items():
        if not hasattr(config, name):
            raise ValueError(
                f"--config_overrides has {name!r}, but {type(config).__name__} has not"
                f"{nearest(name, vars(config))}: remove it."
            )
        if not overrides.lstrip().startswith("{"):
            try:
                config.update_from_string(f"{name}={value}")
            except (TypeError, ValueError):
                raise ValueError(
                    f"--config_overrides has {name}={value}, but {name} is {getattr(config, name)!r}: give a value of "
                    f"the type {type(getattr(config, name)).__name__}, or JSON."
                ) from None
        else:
            setattr(config, name, value)
    return list(values)


def configuration(model_type: str, overrides: str = "", **settings: Any) -> Any:
    """Create the configuration of a model from scratch.

    Values that the configuration class derives from others follow the overrides.

    Args:
        model_type: Architecture, such as "vit".
        overrides: Overrides, see [`override`].
        settings: Defaults that the overrides replace.

    Raises:
        ValueError: The configuration does not have an overridden attribute, or does not accept its value.

    Example:
        >>> configuration("llama", "hidden_size=64,num_attention_heads=4").num_key_value_heads
        4
    """
    config = CONFIG_MAPPING[model_type](**settings)
    changed = {name: getattr(config, name) for name in override(config, overrides)}
    try:
        config = CONFIG_MAPPING[model_type](**{**settings, **changed})
    except Exception as error:  # a configuration validates its values with errors of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"--config_overrides {overrides} is not valid for {model_type}: {reason}") from error
    config.architectures = None
    return config


def model_factory(
    kind: str,
    class_names: Sequence[str],
    *,
    name_or_path: str | None = None,
    model_type: str | None = None,
    config_overrides: str | None = None,
    ignore_mismatched_sizes: bool = False,
    settings: dict[str, Any] | None = None,
    **hub: Any,
) -> Callable[[], Any]:
    """Return a function that creates a new model for each run: pretrained by name, or from scratch by architecture.

    Args:
        kind: "image" or "text".
        class_names: Names of all classes, in the order of their indices.
        name_or_path: Hub name or directory of a pretrained model. Without it, models are created from scratch.
        model_type: Architecture of a model from scratch, such as "vit".
        config_overrides: Configuration of a model from scratch, see [`override`].
        ignore_mismatched_sizes: Replace the head if its number of classes differs.
        settings: Defaults of the configuration of a model from scratch.
        hub: Keyword arguments of `from_pretrained` that concern the Hub.

    Raises:
        ValueError: The architecture is unknown or does not classify such inputs.
    """
    auto = CLASSES[kind]
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
        "num_labels": len(class_names),
    }
    if name_or_path is not None:
        config = from_pretrained(AutoConfig, name_or_path, **labels, **hub)
        return lambda: from_pretrained(
            auto, name_or_path, config=config, ignore_mismatched_sizes=ignore_mismatched_sizes, **hub
        )
    check_architecture(model_type, CONFIG_MAPPING)
    config = configuration(str(model_type), config_overrides or "", **labels, **(settings or {}))
    if not model_classes(config, auto):
        raise ValueError(f"--model_type {model_type} has no {kind} classification model: choose another architecture.")
    return lambda: auto.from_config(config)


def image_sides(config: Any, size: int | None = None) -> tuple[int, int]:
    """Return the height and width of a model's images: the given size, the configuration's, or 224.

    Example:
        >>> from transformers import ViTConfig
        >>> image_sides(ViTConfig(image_size=32)), image_sides(ViTConfig(), 64)
        ((32, 32), (64, 64))
    """
    side = size or getattr(config, "image_size", None) or _model_arguments(config).get("img_size") or 224
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return height, width


def num_channels(config: Any) -> int:
    """Return the number of channels of a model's images: the configuration's, or 3.

    Example:
        >>> from transformers import ViTConfig
        >>> num_channels(ViTConfig(num_channels=1))
        1
    """
    return getattr(config, "num_channels", None) or _model_arguments(config).get("in_chans") or 3


def _model_arguments(config: Any) -> dict[str, Any]:
    """Return the arguments of timm's constructor, which Transformers' configuration holds in a dictionary."""
    return getattr(config, "model_args", None) or {}


def image_processor(config: Any, name_or_path: str | None, *, size: int | None = None, **hub: Any) -> Any:
    """Return the image processor of a pretrained model, or one that scales images to [-1, 1] for a model from scratch.

    Args:
        config: Configuration of the model.
        name_or_path: Hub name or directory of a pretrained model, or None.
        size: Image size for architectures without one in their configuration, such as ResNet. Default: 224.
        hub: Keyword arguments of `from_pretrained` that concern the Hub.
    """
    if name_or_path is not None:
        return from_pretrained(AutoImageProcessor, name_or_path, **hub)
    channels, (height, width) = num_channels(config), image_sides(config, size)
    return ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=[0.5] * channels,
        image_std=[0.5] * channels,
        do_convert_rgb=channels == 3,
    )


def tokenizer(name_or_path: str | None, **hub: Any) -> Any:
    """Return the tokenizer with a Hub name or in a directory.

    Raises:
        ValueError: `name_or_path` is None.
    """
    if name_or_path is None:
        raise ValueError("A text model from scratch requires a tokenizer: give --tokenizer_name.")
    return from_pretrained(AutoTokenizer, name_or_path, **hub)
