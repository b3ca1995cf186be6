"""The task of a comparison (model, data and budget), and its methods by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from ..evaluation.metrics import Normalization, classification_metrics, metrics_of
from ..evaluation.metrics.compute import check_packages
from ..methods import ERM, Mixing, get_method
from ..methods.settings import parse_specification, parse_values, settings_of
from ..training.trainer import MultiMixTrainer

# Arguments that the comparison sets itself, so that all methods of a seed train under equal conditions.
FIXED_ARGUMENTS = (
    "output_dir", "seed", "data_seed", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "push_to_hub",
    "hub_model_id", "hub_token", "full_determinism",
)  # fmt: skip


@dataclass
class Task:
    """A model, data and a budget, shared by all methods of a comparison.

    Args:
        name: Name in the report.
        model_init: Function that returns a new model for each run. It is called after the seed is set, so that all
            methods of a seed start from the same weights.
        train_dataset: Examples with the model's inputs and `labels`, of known length. Its method
            `seed_augmentation(seed, epoch)`, if any, is called before each epoch. Augmentation that depends only on
            these arguments is the same for all methods.
        test_dataset: Examples that are predicted once for each run, after training.
        validation_dataset: Examples that are predicted after each epoch, for training curves and selection.
        training_args: Fields of `TrainingArguments`. By default a run logs and evaluates once per epoch and saves no
            checkpoints. The comparison sets seeds and directories.
        processing_class: Image processor or tokenizer, which determines the collator and is saved with models.
        data_collator: Collator. Default: that of `Trainer`.
        normalization: Map from pixels to `pixel_values`, for attacks and corruptions. None skips these, as for text.
        ood_dataset: Examples of unknown classes; their labels are not used.
        class_names: Names of all classes, for plots.
        settings: Other settings that identify the task, in JSON types. A comparison with other settings is not resumed.
        default_settings: Values of settings that a comparison of an earlier version lacks.

    Raises:
        ValueError: A dataset has no length or is empty, or `training_args` has a field that the comparison sets.
    """

    name: str
    model_init: Callable[[], nn.Module]
    train_dataset: Any
    test_dataset: Any
    validation_dataset: Any = None
    training_args: dict[str, Any] = field(default_factory=dict)
    processing_class: Any = None
    data_collator: Any = None
    normalization: Normalization | None = None
    ood_dataset: Any = None
    class_names: Sequence[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    default_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fixed = [name for name in self.training_args if name in FIXED_ARGUMENTS]
        if fixed:
            raise ValueError(f"training_args has {', '.join(fixed)}, which the comparison sets itself: remove it.")
        for name in ("train_dataset", "test_dataset", "validation_dataset", "ood_dataset"):
            data = getattr(self, name)
            if data is None and name in ("validation_dataset", "ood_dataset"):
                continue
            if not hasattr(data, "__len__"):
                raise ValueError(f"{name} must have a length, but {type(data).__name__} has none, as a stream.")
            if not len(data):
                raise ValueError(f"{name} is empty.")

    def test_image(self, index: int) -> np.ndarray:
        """Return a test image (height, width, channels), or (height, width) in gray, with pixels in [0, 1]."""
        assert self.normalization is not None
        values = torch.as_tensor(self.test_dataset[index]["pixel_values"])
        return self.normalization.to_pixels(values[None])[0].permute(1, 2, 0).squeeze(-1).numpy()

    def arguments(self, directory: str, seed: int, **changes: Any) -> TrainingArguments:
        """Return the training arguments of one run."""
        defaults = {
            "logging_strategy": "epoch",
            "eval_strategy": "no" if self.validation_dataset is None else "epoch",
            "save_strategy": "no",
            "save_total_limit": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        return TrainingArguments(
            output_dir=directory, seed=seed, data_seed=seed, **{**defaults, **self.training_args, **changes}
        )

    def trainer(
        self,
        args: TrainingArguments,
        mixing: Mixing,
        *,
        kind: type[MultiMixTrainer] = MultiMixTrainer,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> MultiMixTrainer:
        """Return a trainer with a new model, whose weights depend on the seed in `args` and not on the method.

        Args:
            args: Training arguments, those of [`arguments`] or others.
            mixing: The method.
            kind: Class of the trainer.
            callbacks: Trainer callbacks.
        """
        check_packages([info.name for info in metrics_of("classification")])
        set_seed(args.seed)
        return kind(
            self.model_init(),
            args,
            mixing=mixing,
            train_dataset=self.train_dataset,
            eval_dataset=self.validation_dataset,
            processing_class=self.processing_class,
            data_collator=self.data_collator,
            compute_metrics=classification_metrics,
            callbacks=[_AugmentationSeed(self.train_dataset), *callbacks],
        )


class _AugmentationSeed(TrainerCallback):
    """Seed the augmentation of the dataset at the beginning of each epoch."""

    def __init__(self, data: Any):
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.data, "seed_augmentation"):
            self.data.seed_augmentation(args.seed, int(state.epoch or 0))


def as_methods(methods: Mapping[str, Any] | Sequence[str]) -> dict[str, Mixing]:
    """Return methods by their names in a comparison.

    Args:
        methods: For each name a method, or its settings as a mapping with the method's name as `method` (default: the
            name itself); or a list of specifications for [`parse_method`].

    Raises:
        ValueError: A method or setting is unknown, a name occurs twice, or `methods` is empty.

    Example:
        >>> from mm_hf import MultiMix
        >>> list(as_methods({"erm": {}, "few": MultiMix(num_mixed=10)}))
        ['erm', 'few']
    """
    if isinstance(methods, Mapping):
        found: dict[str, Mixing] = {}
        for name, given in methods.items():
            found[name] = given if isinstance(given, Mixing) else Mixing.from_dict({"method": name, **given})
    else:
        pairs = [parse_method(specification) for specification in methods]
        twice = sorted({name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1})
        if twice:
            raise ValueError(f"methods has {twice[0]!r} twice: name one of them, NAME={twice[0]}.")
        found = dict(pairs)
    if not found:
        raise ValueError("methods is empty: give at least one method.")
    folders = [slug(name) for name in found]
    for name, folder in zip(found, folders, strict=True):
        if not folder or folders.count(folder) > 1:
            raise ValueError(
                f"methods: the folder name {folder!r} of {name!r} is empty or used twice: choose another name."
            )
    return found


def parse_method(specification: str) -> tuple[str, Mixing]:
    """Return name and method of a specification `method`, `method:setting=value,...` or
    `name=method:setting=value,...`.

    Values are numbers, yes or no, null, lists in brackets, or text.

    Raises:
        ValueError: A method or setting is unknown, or a setting has no value or an invalid one.

    Example:
        >>> parse_method("few=dense_multimix:num_mixed=10,attention=gap")[1].attention
        'gap'
        >>> parse_method("mixup")[0]
        'mixup'
    """
    name, method, texts = parse_specification(specification)
    kind = get_method(method)
    return name, kind(**parse_values(settings_of(kind), texts, kind.__name__))


def baseline_of(methods: Mapping[str, Mixing], given: str | None = None) -> str:
    """Return the name of the baseline: the given one, else plain training, else the first method.

    Raises:
        ValueError: The given name is not among the methods.
    """
    if given is not None and given not in methods:
        raise ValueError(f"baseline must be one of the methods, {', '.join(methods)}, got {given!r}.")
    plain = [name for name, method in methods.items() if type(method) is ERM]
    return given or (plain or list(methods))[0]


def slug(name: str) -> str:
    """Return a name as a valid folder name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
