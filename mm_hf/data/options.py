"""Options of data and models. The module imports neither torch nor Transformers, since commands parse them at once."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..methods.settings import check_settings, nearest, setting

ADAPTER_FILE = "adapter_config.json"  # of a PEFT adapter
OFFLINE_NAMES = ("digits", "fashion_mnist", "movie_reviews")  # of `offline.OFFLINE`


@dataclass
class DataOptions:
    """Data to train and evaluate on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"Hub name, directory, or one of {', '.join(OFFLINE_NAMES)}."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Directory of training images with one subdirectory per class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Directory of validation images."})
    test_dir: str | None = field(default=None, metadata={"help": "Directory of test images."})
    test_split: str = field(
        default="test", metadata={"help": "Split for the final evaluation after training. It is used once."}
    )
    test_fraction: float | None = setting(
        None,
        "Share of the training set for testing, if there is no test split. The same share of each class.",
        within="(0, 1)",
    )
    train_val_split: float = setting(
        0.15, "Share of the training set for validation if there is no validation split.", within="(0, 1)"
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column with images, or paths of images. Default: the first with images."}
    )
    text_column_names: list[str] | None = field(
        default=None,
        metadata={"help": "One or two columns with texts. Default: text, sentence, or the only one or two."},
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with labels. Default: label, labels, or the first with classes."}
    )
    augmentation: Literal["none", "crop", "crop_flip", "randaugment"] = setting(
        "none", "Augmentation of training images."
    )
    max_length: int | None = setting(None, "Maximum number of tokens of a text.", within="[1, inf)")
    max_train_samples: int | None = setting(None, "Maximum number of training examples.", within="[1, inf)")
    max_validation_samples: int | None = setting(None, "Maximum number of validation examples.", within="[1, inf)")
    max_test_samples: int | None = setting(None, "Maximum number of test examples.", within="[1, inf)")
    ood_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset of unknown classes for the evaluation of out-of-distribution detection."},
    )
    ood_classes: list[str] | None = field(
        default=None,
        metadata={"help": "Classes to exclude from training; their test examples serve as unknown classes."},
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def check(self) -> None:
        """Raise a ValueError if no data are named, or a directory does not exist."""
        if self.dataset_name is None and self.train_dir is None:
            raise ValueError(
                f"The dataset is missing: give --dataset_name (offline: {', '.join(OFFLINE_NAMES)}) or --train_dir."
            )
        for option in ("dataset_name", "ood_dataset_name"):
            check_path(option, getattr(self, option))
        for option in ("train_dir", "validation_dir", "test_dir"):
            folder = getattr(self, option)
            if self.dataset_name is None and folder is not None and not Path(folder).is_dir():
                raise ValueError(
                    f"--{option} {folder} is not a directory: give a directory with one subdirectory of images per "
                    "class."
                )


@dataclass
class ModelOptions:
    """Model to train or evaluate."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained model: a Hub name or a directory."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture of a model trained from scratch, such as vit or bert."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Its configuration: hidden_size=64,image_size=8,... or JSON."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer. Default: the model's."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Image processor. Default: the model's."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace the head if its number of classes differs."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Directory for downloads."})
    token: str | None = field(
        default=None, metadata={"help": "Hub token. Default: the token stored by `hf auth login`."}
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def check(self) -> None:
        """Raise a ValueError if no model is named, a directory does not exist, or the overrides are badly written."""
        if self.model_name_or_path is None and self.model_type is None:
            raise ValueError(
                "The model is missing: give --model_name_or_path for a pretrained model, or --model_type (vit, bert, "
                "...) to train from scratch."
            )
        for option in ("model_name_or_path", "tokenizer_name", "image_processor_name"):
            check_path(option, getattr(self, option))
        if self.model_name_or_path is None:
            check_architecture(self.model_type)
        read_overrides(self.config_overrides or "")

    @property
    def hub(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` that concern the Hub."""
        return {"revision": self.model_revision, "cache_dir": self.cache_dir, "token": self.token}


@dataclass
class LoraOptions:
    """LoRA adapter, trained instead of all parameters."""

    lora_r: int | None = setting(
        None,
        "Train only a LoRA adapter of this rank and the head, with PEFT. Default: all parameters.",
        within="[1, inf)",
    )
    lora_alpha: int = setting(16, "LoRA scale: the adapter is multiplied by lora_alpha / lora_r.", within="[1, inf)")
    lora_dropout: float = setting(0.0, "Dropout of the inputs of the adapter.", within="[0, 1)")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the adapted modules, such as query value. Default: all linear layers."},
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def check(self, pretrained: str | None) -> None:
        """Raise a ValueError if an adapter cannot be trained.

        Args:
            pretrained: Name or directory of the pretrained model, or None.
        """
        if self.lora_r is None:
            if self.lora_target_modules is not None:
                raise ValueError("--lora_target_modules requires an adapter: give --lora_r.")
            return
        if pretrained is None:
            raise ValueError(
                "--lora_r requires a pretrained model, since only the adapter is saved: give --model_name_or_path."
            )
        if (Path(pretrained) / ADAPTER_FILE).is_file():
            raise ValueError(
                f"--lora_r requires a complete model, but {pretrained} is an adapter itself: give its base model, or "
                "merge the adapter (peft: merge_and_unload) and save the model."
            )
        if importlib.util.find_spec("peft") is None:
            raise ValueError("--lora_r requires PEFT, which is not installed: pip install peft.")


def check_path(option: str, name: str | None) -> None:
    """Raise a ValueError if a name is the path of a directory that does not exist, and not a name on the Hub."""
    if name is None or Path(name).exists():
        return
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w./-]+", name):
        raise ValueError(f"--{option} {name} does not exist: give a directory, or a name on the Hub such as user/name.")


def architectures() -> list[str]:
    """Return the names of the architectures of Transformers, read from its source."""
    spec = importlib.util.find_spec("transformers")
    folder = Path(str(spec and spec.origin)).parent / "models" / "auto"
    files = [folder / "auto_mappings.py", folder / "configuration_auto.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in files if path.exists())
    return sorted(set(re.findall(r'"([\w.-]+)"\s*[,:\]]\s*=?\s*"\w+"', text)))


def check_architecture(name: str | None, known: Collection[str] | None = None) -> None:
    """Raise a ValueError if a name is not among the known architectures, by default those of `architectures`."""
    known = architectures() if known is None else known
    if name not in known:
        raise ValueError(
            f"--model_type {name!r} is not an architecture of Transformers{nearest(str(name), known)}: give one, such "
            "as vit or bert, or --model_name_or_path for a pretrained model."
        )


def read_overrides(text: str) -> dict[str, Any]:
    """Read `name=value,name=value`, or JSON, which supports lists. Values of the first form are texts.

    Raises:
        ValueError: The text has another form.

    Example:
        >>> read_overrides("hidden_size=64,image_size=8")
        {'hidden_size': '64', 'image_size': '8'}
    """
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--config_overrides is not valid JSON ({error}): {text!r}.") from None
        return dict(found)
    parts = [part.partition("=") for part in text.split(",")] if text else []
    wrong = ["".join(part) for part in parts if not part[1] or not part[0].strip().isidentifier()]
    if wrong:
        raise ValueError(
            f"--config_overrides has {wrong[0]!r} instead of name=value: write hidden_size=64,num_hidden_layers=2, or "
            'JSON such as {"depths": [1, 1]}.'
        )
    return {name.strip(): value.strip() for name, _, value in parts}
