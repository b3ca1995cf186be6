"""Pretrained models by name: the class follows from the configuration and the dataset, and no code is downloaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
)
from transformers.utils import ADAPTER_CONFIG_NAME

from .dataset_labels import LABEL_NAMES, first_row

CLASSES: dict[str, Any] = {
    "image": AutoModelForImageClassification,
    "text": AutoModelForSequenceClassification,
    "audio": AutoModelForAudioClassification,
}
LABEL_DIMENSIONS: dict[Any, int] = {  # of one example
    **dict.fromkeys((*CLASSES.values(), AutoModelForVideoClassification), 0),
    AutoModelForTokenClassification: 1,
    AutoModelForSemanticSegmentation: 2,
}


def from_pretrained(auto_class: Any, name_or_path: str, **arguments: Any) -> Any:
    """Call `from_pretrained` of an auto class, without running code from the model's repository or loading pickles.

    Args:
        auto_class: Auto class of Transformers, such as `AutoConfig`.
        name_or_path: Hub name or directory.
        arguments: Keyword arguments of `from_pretrained`.

    Raises:
        ValueError: The model cannot be loaded without its own code, its head has another number of classes, or a file
            is damaged.
        OSError: The model does not exist, or there is no connection.
    """
    is_model = auto_class in LABEL_DIMENSIONS
    if is_model and "config" not in arguments:
        arguments["config"] = from_pretrained(AutoConfig, name_or_path, **arguments)
    adapter = read_adapter(name_or_path) if is_model else None
    try:
        if adapter is not None:
            # The head is loaded from the adapter.
            given = {**arguments, "ignore_mismatched_sizes": True}
            base = from_pretrained(auto_class, str(adapter["base_model_name_or_path"]), **given)
            return _merge(base, name_or_path, arguments.get("ignore_mismatched_sizes", False))
        # Weights in pickles (pytorch_model.bin) are not loaded.
        safe = {"use_safetensors": True} if is_model else {}
        loaded = auto_class.from_pretrained(name_or_path, **safe, **{"trust_remote_code": False, **arguments})
        # timm 1.0.31 saves the number of classes in `model_args`, too, and Transformers rejects the repeated argument.
        if auto_class is AutoConfig and isinstance(getattr(loaded, "model_args", None), dict):
            loaded.model_args.pop("num_classes", None)
        return loaded
    except OSError as error:
        if str(name_or_path) in str(error):
            raise
        raise OSError(f"{name_or_path} cannot be loaded: {error}") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path} can be loaded only by running the code in its repository, which mm_hf does not do: load "
            "the model in Python and pass it to MultiMixTrainer."
        ) from error
    except RuntimeError as error:  # Transformers raises it for heads of another size
        if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The head of {name_or_path} has another number of classes than the dataset: give "
            "--ignore_mismatched_sizes to replace it."
        ) from error
    except (SafetensorError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{name_or_path} cannot be loaded, since a file is damaged or of another format ({reason})."
        ) from error


def read_adapter(directory: str | Path) -> dict[str, Any] | None:
    """Return the configuration of the PEFT adapter in a directory, or None if the directory has none."""
    file = Path(directory) / ADAPTER_CONFIG_NAME
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _merge(base: Any, directory: str, ignore_mismatched_sizes: bool) -> Any:
    """Merge the adapter in a directory into its base model."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{directory} contains a PEFT adapter, and PEFT is not installed: pip install peft.")
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, directory, ignore_mismatched_sizes=ignore_mismatched_sizes)
    return adapted.merge_and_unload().requires_grad_(True)  # PEFT froze the base model


def model_classes(config: Any, auto_class: Any) -> tuple[type, ...]:
    """Return the model classes that an auto class has for a configuration; an empty tuple if it has none."""
    if type(config) not in auto_class._model_mapping:
        return ()
    found = auto_class._model_mapping[type(config)]
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def load_for_dataset(name: str, dataset: Any, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Load the pretrained model that classifies the examples of a dataset.

    The auto class is the one whose inputs and labels the first example has; among several, the one that the
    configuration of the model names. Class names of the dataset (the feature `ClassLabel`) become those of the model,
    whose head is replaced if it has another number of classes. The parameters are float32.

    Args:
        name: Hub name or directory.
        dataset: Training dataset, or None.
        init_kwargs: Keyword arguments of `from_pretrained`; they override these settings.

    Raises:
        ValueError: The model cannot be loaded, has no classification class, or several that fit the dataset.
    """
    given = dict(init_kwargs or {})
    for option in ("trust_remote_code", "use_safetensors"):
        if option in given:
            raise ValueError(
                f"model_init_kwargs has {option}, but a model loaded by name runs no code of its repository and loads "
                "no pickles: load the model with from_pretrained, and pass it instead of its name."
            )
    if read_adapter(name) is not None:
        raise ValueError(
            f"model={name!r} is a PEFT adapter: load it with peft.PeftModel.from_pretrained(base, {name!r}, "
            "is_trainable=True), and pass the adapted model instead of its name."
        )
    config = given.pop("config", None)
    # Attributes of the configuration; `from_pretrained` has arguments of the same name.
    overrides = {k: v for k, v in given.items() if k not in ("dtype", "quantization_config")}
    labels: dict[str, Any] = {k: overrides.pop(k) for k in ("num_labels", "id2label", "label2id") if k in overrides}
    try:
        saved = from_pretrained(AutoConfig, name, **overrides)
        if config is None:
            config = from_pretrained(AutoConfig, name, **(labels or _read_class_names(dataset)), **overrides)
        auto_class = _select(name, config, first_row(dataset))
        rest = {k: v for k, v in given.items() if k not in labels and not (k in overrides and hasattr(config, k))}
        defaults = {"dtype": torch.float32, "ignore_mismatched_sizes": saved.num_labels != config.num_labels}
        return from_pretrained(auto_class, name, config=config, **{**defaults, **rest})
    except OSError as error:
        raise ValueError(
            f"model={name!r} cannot be loaded: give a directory with config.json and model.safetensors, or the name of "
            f"a model on the Hub ({str(error).splitlines()[0].rstrip('.')})."
        ) from error


def _read_class_names(dataset: Any) -> dict[str, Any]:
    """Return `num_labels`, `id2label` and `label2id` of a dataset with class names, or an empty dictionary."""
    features = getattr(dataset, "features", None) or {}
    feature = next((features[name] for name in LABEL_NAMES if name in features), None)
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of the elements of sequences
    if not names:
        return {}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _select(name: str, config: Any, row: Mapping[str, Any]) -> Any:
    """Return the auto class that fits a configuration and an example."""
    candidates = {auto: classes for auto in LABEL_DIMENSIONS if (classes := model_classes(config, auto))}
    if not candidates:
        raise ValueError(
            f"model={name!r} is a {config.model_type}, for which Transformers has no classification class: mm-hf "
            "models lists the supported classes."
        )
    label = next((row[key] for key in LABEL_NAMES if row.get(key) is not None), None)
    if label is not None:
        values = np.asarray(label)
        dimensions = 0 if values.dtype.kind == "f" and values.ndim == 1 else values.ndim  # multi-label
        candidates = {a: c for a, c in candidates.items() if LABEL_DIMENSIONS[a] == dimensions} or candidates
    read = {a: c for a, c in candidates.items() if getattr(c[0], "main_input_name", None) in row} or candidates
    named = [a for a, c in read.items() if {cls.__name__ for cls in c} & set(config.architectures or ())]
    found = named if len(named) == 1 else list(read)
    if len(found) > 1:
        raise ValueError(
            f"model={name!r} is a {config.model_type}, which {' and '.join(a.__name__ for a in found)} can load, and "
            "the dataset does not determine which: load the model with one of them, and pass it instead of its name."
        )
    return found[0]
