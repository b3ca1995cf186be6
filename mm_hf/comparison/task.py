"""What methods are compared on: a model, data, a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from ..evaluation.metrics import Normalisation, classification_metrics
from ..methods import ERM, Mixing, get_method
from ..training.trainer import MultiMixTrainer

# What a comparison itself decides, so that all methods of a seed are trained alike.
FIXED_ARGUMENTS = (
    "output_dir", "seed", "data_seed", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "push_to_hub",
    "hub_model_id", "hub_token", "full_determinism",
)  # fmt: skip


@dataclass
class Task:
    """A model, data and a budget: all that methods have in common in a comparison.

    Args:
        name: What the report calls it.
        model_init: Makes the model anew for each run; called after the seed is set, so that all methods of a seed start
            from the same weights.
        train_dataset: Of examples as the model takes them, with `labels`, of known length. If it has a method
            `seed_augmentation(seed, epoch)`, that is called before each epoch: augmentation that depends on these and not on
            global random numbers is the same for all methods.
        test_dataset: Likewise; it is predicted once for each run, at the end.
        validation_dataset: Likewise; predicted after each epoch, for training curves and choices.
        training_args: Fields of `TrainingArguments`. Default of those that are not given: one line of log and one
            evaluation an epoch, no checkpoints. Seeds and directories are the comparison's own.
        processing_class: Image processor or tokenizer: decides the collator, and is saved beside models.
        data_collator: Default: Trainer's own.
        normalisation: How `pixel_values` came from pixels, for attacks and corruptions; None leaves these out, for text.
        ood_dataset: Examples of unknown classes; their labels are not read.
        class_names: Of all classes, for pictures.
        settings: What else tells this task apart, in JSON types: a comparison is not continued if it has changed.

    Raises:
        ValueError: A data set has no length, or training arguments are among those that a comparison decides.
    """

    name: str
    model_init: Callable[[], nn.Module]
    train_dataset: Any
    test_dataset: Any
    validation_dataset: Any = None
    training_args: dict[str, Any] = field(default_factory=dict)
    processing_class: Any = None
    data_collator: Any = None
    normalisation: Normalisation | None = None
    ood_dataset: Any = None
    class_names: Sequence[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        decided = [name for name in self.training_args if name in FIXED_ARGUMENTS]
        if decided:
            raise ValueError(
                f"training_args has {', '.join(decided)}, which the comparison decides itself: leave it out."
            )
        for name in ("train_dataset", "test_dataset", "validation_dataset", "ood_dataset"):
            data = getattr(self, name)
            if data is None and name in ("validation_dataset", "ood_dataset"):
                continue
            if not hasattr(data, "__len__"):
                raise ValueError(f"{name} must have a length, and {type(data).__name__} has none (streams do not).")
            if not len(data):
                raise ValueError(f"{name} is empty.")

    def arguments(self, directory: str, seed: int, **changes: Any) -> TrainingArguments:
        """The training arguments of one run."""
        usual = {
            "logging_strategy": "epoch",
            "eval_strategy": "no" if self.validation_dataset is None else "epoch",
            "save_strategy": "no",
            "save_total_limit": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        return TrainingArguments(
            output_dir=directory, seed=seed, data_seed=seed, **{**usual, **self.training_args, **changes}
        )

    def trainer(
        self,
        args: TrainingArguments,
        mixing: Mixing,
        *,
        kind: type[MultiMixTrainer] = MultiMixTrainer,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> MultiMixTrainer:
        """A trainer of the task, with a new model: its weights are those of the seed in `args`, whatever the method.

        Args:
            args: Its training arguments, those of [`arguments`] or others.
            mixing: The method.
            kind: The trainer's class.
            callbacks: Trainer callbacks.
        """
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
            callbacks=[_Epochs(self.train_dataset), *callbacks],
        )


class _Epochs(TrainerCallback):
    """Tells the data set which epoch of which seed begins."""

    def __init__(self, data: Any):
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.data, "seed_augmentation"):
            self.data.seed_augmentation(args.seed, int(state.epoch or 0))


def as_methods(methods: Mapping[str, Any] | Sequence[str]) -> dict[str, Mixing]:
    """Methods by the names that a comparison gives them.

    Args:
        methods: For each name a method, or its settings as a mapping with the method's name as `method` (default: the
            name itself); or specifications for [`parse_method`].

    Raises:
        ValueError: There is no such method or setting, a name comes twice, or there are no methods.

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
            raise ValueError(f"methods has {twice[0]!r} twice: give one a name of its own, NAME={twice[0]}.")
        found = dict(pairs)
    if not found:
        raise ValueError("methods is empty: there is nothing to compare.")
    folders = [slug(name) for name in found]
    for name, folder in zip(found, folders, strict=True):
        if not folder or folders.count(folder) > 1:
            raise ValueError(f"methods: {name!r} and another name would share a folder: choose names of other letters.")
    return found


def parse_method(specification: str) -> tuple[str, Mixing]:
    """A name and a method from `method`, `method:setting=value,...` or `name=method:setting=value,...`.

    Values are numbers, true, false, null, lists in brackets, or else text.

    Raises:
        ValueError: There is no such method or setting, or a setting without a value.

    Example:
        >>> parse_method("few=dense_multimix:num_mixed=10,attention=gap")[1].attention
        'gap'
        >>> parse_method("mixup")[0]
        'mixup'
    """
    import json

    head, _, tail = specification.partition(":")
    name, _, method = head.rpartition("=")
    kind = get_method(method.strip())
    settings: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", tail) if tail else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"methods: {specification!r} has {part!r} where a setting=value should be.")
        try:
            settings[key.strip()] = json.loads(value)
        except ValueError:
            settings[key.strip()] = {"True": True, "False": False, "None": None}.get(value.strip(), value.strip())
    return name.strip() or specification.strip(), kind.from_dict(settings)


def baseline_of(methods: Mapping[str, Mixing], given: str | None = None) -> str:
    """The method that the others are compared with: the one given, or plain training, or the first.

    Raises:
        ValueError: The one given is not among the methods.
    """
    if given is not None and given not in methods:
        raise ValueError(f"baseline is {given!r}, and the methods are {', '.join(methods)}: choose one of them.")
    plain = [name for name, method in methods.items() if type(method) is ERM]
    return given or (plain or list(methods))[0]


def slug(name: str) -> str:
    """A name as a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
