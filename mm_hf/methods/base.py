"""Base class of mixing methods: settings that can be parsed, saved and validated, and the hooks of a training step.

The life of a batch, in the order of the calls. `mixing` is the method of the training, `method` that of one mini-batch:

    MultiMixTrainer.compute_loss(model, inputs)             training/trainer.py
      model(**inputs)                                       wrapping/step.py, in training mode and with labels
        first batch only                                    wrapping/state.py
          label_kind(model, labels)                         select the criterion
          mixing.check_inputs(inputs, model)                raise if the inputs cannot be mixed
          mixing.requirements                               probe the model and install the hooks they name
        labels = convert_labels(labels)                     check them, and convert them to what the losses use
        method = mixing.for_batch(inputs, labels)           select the method of this mini-batch
        inputs, labels = method.mix_inputs(inputs, labels)  mix in input space
        outputs = forward(**inputs)                         the model's own forward, once and without labels
          method.block_mixing                               mixes hidden states if method.requirements.blocks
        labels = weigh(labels)                              multiply them by mixing.class_weights, if there are any
        output = LocationOutput(logits, ...)                logits, and what method.requirements name beyond them
        result = method.loss(output, labels)                the loss, computed by mm_hf.functional
          method.mixes(len(labels))                         counted: a training that mixes nothing is reported
        outputs.loss = result.loss                          result.logs are averaged for the next training log
      loss.backward(), optimizer.step()                     Trainer

`MultiMixTrainer` saves `mixing.state_dict()` in each checkpoint and restores it before the first resumed batch. In
evaluation mode, or without labels, the model's own forward runs and no method is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..functional import Criterion
from ..locations import BlockMixing, LocationOutput
from .class_weights import ClassWeights, check_class_weights
from .settings import check_required, check_settings, described, nearest, required_settings, settings_of

METHODS: dict[str, type[Mixing]] = {}
Method = TypeVar("Method", bound="Mixing")


@dataclass(frozen=True)
class Requirements:
    """Requirements of a method on the model and on the data.

    Attributes:
        attention: Kind of attention over the locations that the loss reads ("auto", "cls", "mean", "gap", "cam",
            "uniform"); None if it reads none.
        token_logits: The loss reads the logits of every location.
        linear_head: The last layer must be linear, because the method mixes its input.
        blocks: The method mixes hidden states where a block of the model begins: see `Mixing.block_mixing`.
        embeddings: The method mixes the embeddings of token ids, if there are any: `mix_inputs` returns both
            `inputs_embeds` and `input_ids`.
        dense_labels: The method supports one label per location (tokens, pixels).
        detach_attention: Gradients do not flow through the attention.
        min_examples: Least number of examples in a mini-batch of one rank.
    """

    attention: str | None = None
    token_logits: bool = False
    linear_head: bool = False
    blocks: bool = False
    embeddings: bool = False
    dense_labels: bool = False
    detach_attention: bool = True
    min_examples: int = 2

    @property
    def locations(self) -> bool:
        """True if the loss reads anything beyond the logits of examples."""
        return self.attention is not None or self.token_logits


@dataclass
class MixingLoss:
    """A loss and values to log: detached scalars by name, computed without synchronizing the device."""

    loss: Tensor
    logs: dict[str, Tensor | float] = field(default_factory=dict)


@dataclass
class Mixing:
    """Base class of mixing methods.

    A subclass is a dataclass that sets `name`, adds its settings as fields, validates them in `__post_init__`, and
    defines `loss`. The other hooks are optional; the module's docstring lists the order of their calls.

    `HfArgumentParser` parses the fields, and `to_dict` and `from_dict` write and read them. A wrapped model trains with
    a deep copy of the method, so that one method serves several models.

    Args:
        class_weights: Weights of the classes in the loss, one number for each class; or "balanced", with which
            `MultiMixTrainer` computes them from the labels of the training data, as scikit-learn does: the rarer a
            class, the larger its weight. `loss` gets targets that are multiplied by the weights, so that the target of
            an example sums to its weight, and returns a mean that is weighted by these sums. MultiMix and Dense
            MultiMix multiply the interpolation factors of the examples by them, too.
    """

    name: ClassVar[str] = ""

    class_weights: ClassWeights | None = field(
        default=None,
        kw_only=True,
        repr=False,
        metadata=described(
            "Weight of each class in the loss, or 'balanced': from the training data. Default: 1.",
            nargs="+",
            within="[0, inf)",
            words=("balanced",),
            requirement="must be 'balanced' or one number of at least 0 for each class; focal loss and other losses of "
            "single classes are not defined for mixed examples",
        ),
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        self.class_weights = check_class_weights(self.class_weights)
        check_settings(self)

    # ---- Before training ----

    @property
    def requirements(self) -> Requirements:
        """Requirements on the model and on the data."""
        return Requirements()

    @property
    def is_auto(self) -> bool:
        """True if the number of mixed examples is determined from the first mini-batch: see `with_num_mixed`."""
        return False

    def with_num_mixed(self, num_mixed: int) -> Mixing:
        """Return the method with a number of mixed examples."""
        return self

    def operations_per_mixed_example(
        self, num_examples: int, num_locations: int, num_classes: int, device: torch.device
    ) -> float:
        """Return the cost of each mixed example, in operations of the model: see `mm_hf.functional.cost`."""
        return 0.0

    def operations_of_locations(
        self, num_examples: int, num_locations: int, num_classes: int, head_operations: float, device: torch.device
    ) -> float:
        """Return the cost that any number of mixed examples shares, in operations of the model."""
        return 0.0

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        """Raise a ValueError if the inputs of the first mini-batch cannot be mixed."""

    # ---- One mini-batch, in the order of the calls ----

    def for_batch(
        self, inputs: Mapping[str, Any], labels: Tensor, *, epoch: float | None = None, same_on_all_ranks: bool = False
    ) -> Mixing:
        """Return the method for a mini-batch: this one, a copy of it, or another method.

        A method that remembers from `mix_inputs` to `loss` how it mixed the mini-batch returns a copy of itself and
        keeps this in the copy.

        Args:
            inputs: Inputs of the model's forward, without labels.
            labels: Labels of the examples, or of every location.
            epoch: Epochs of training so far, as a fraction; None if they are not counted.
            same_on_all_ranks: All ranks must return the same method, because they run parts of the model together.
        """
        return self

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Return the inputs of the model's forward and the labels, mixed by methods that work in input space."""
        return inputs, labels

    def mixes(self, num_examples: int) -> bool:
        """Return True if the loss of a mini-batch of this size mixes examples. Read after `mix_inputs`."""
        return num_examples > 1

    @property
    def block_mixing(self) -> BlockMixing | None:
        """Mixing of the hidden states of this mini-batch, for methods that require blocks. Read after `mix_inputs`."""
        return None

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """Return the training loss of the mini-batch, a scalar mean, and what to log.

        Args:
            output: Logits of the forward, and what `requirements` name beyond them.
            labels: The labels that `mix_inputs` returned.
            label_smoothing: In [0, 1], for "cross_entropy".
            criterion: Criterion that the labels call for.
        """
        raise NotImplementedError

    # ---- State beyond a mini-batch ----

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the method remembers of earlier mini-batches: tensors by name, empty for most methods."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: The state is not one of this method.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but got {', '.join(sorted(state))}.")

    # ---- Settings ----

    def to_dict(self) -> dict[str, Any]:
        """Return the method's name and its settings, in JSON types only."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        class_weights = values.pop("class_weights")
        weights = {} if class_weights is None else {"class_weights": class_weights}
        return {"method": self.name, **values, **weights}

    @classmethod
    def from_dict(cls: type[Method], values: Mapping[str, Any]) -> Method:
        """Make a method from the result of `to_dict`. A subclass accepts its own settings only."""
        values = dict(values)
        method = get_method(values.pop("method", cls.name))
        if not issubclass(method, cls):
            raise ValueError(f"These are settings of {method.__name__}, not of {cls.__name__}.")
        unknown = sorted(set(values) - {f.name for f in fields(method)})
        if unknown:
            known = list(settings_of(method))
            raise ValueError(
                f"{method.__name__} has no setting {', '.join(unknown)}{nearest(unknown[0], known)}; it has "
                f"{', '.join(known) or 'none'}."
            )
        check_required(method.name, settings_of(method), values)
        return method(**values)


def get_method(name: str) -> type[Mixing]:
    """Return the method class of a name.

    Raises:
        ValueError: The name is unknown; the message lists the names.

    Example:
        >>> get_method("dense_multimix").__name__
        'DenseMultiMix'
    """
    import_module(__package__).load_methods()
    if name not in METHODS:
        raise ValueError(
            f"There is no mixing method {name!r}{nearest(name, METHODS)}. The methods are {', '.join(sorted(METHODS))}."
        )
    return METHODS[name]


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of an earlier `to_dict` with the defaults of the settings that it lacks.

    Settings of an unknown method, and those with a value or a name that is not valid, are returned unchanged.

    Args:
        values: The result of `to_dict` of this or of an earlier version.

    Example:
        >>> with_defaults({"method": "mixup"})
        {'method': 'mixup', 'alpha': 1.0}
    """
    try:
        return Mixing.from_dict(values).to_dict()
    except (ValueError, TypeError):
        return dict(values)


def default_methods() -> dict[str, Mixing]:
    """Return each method with its default settings by name, without those that require a setting.

    Example:
        >>> default_methods()["mixup"], "input_mixing" in default_methods()
        (Mixup(alpha=1.0), False)
    """
    return {name: method() for name, method in METHODS.items() if not required_settings(settings_of(method))}
