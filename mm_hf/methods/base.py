"""What a mixing method is: settings that can be parsed, saved and checked, and a loss made of what a forward tells."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..functional import Criterion
from ..locations import BlockMixing, LocationOutput

METHODS: dict[str, type[Mixing]] = {}
Method = TypeVar("Method", bound="Mixing")


@dataclass
class MixingLoss:
    """A loss and what to log of it: detached scalars by name, without synchronisation of the device."""

    loss: Tensor
    logs: dict[str, Tensor | float] = field(default_factory=dict)


@dataclass
class Mixing:
    """Base of all mixing methods. A subclass sets `name`, adds fields, and defines `loss` and, rarely, `mix_inputs`.

    The settings are the fields of the dataclass: `HfArgumentParser` parses them, `to_dict` and `from_dict` save and
    restore them, and a subclass's `__post_init__` refuses what makes no sense.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    @property
    def attention_kind(self) -> str | None:
        """The attention to extract with per-location logits, or None for a method that needs the logits only."""
        return None

    @property
    def needs_linear_head(self) -> bool:
        """Whether the method mixes what enters the last layer, and so needs it to be linear."""
        return False

    @property
    def takes_dense_labels(self) -> bool:
        """Whether the method trains models that label every location (tokens, pixels)."""
        return False

    @property
    def is_auto(self) -> bool:
        """Whether the number of mixed examples is still to be decided by the clock: then `sized` is called."""
        return False

    def with_num_mixed(self, num_mixed: int) -> Mixing:
        """The method with a number of mixed examples."""
        return self

    @property
    def scores_locations(self) -> bool:
        """Whether a method with an `attention_kind` wants the logits of every location, too."""
        return True

    @property
    def needs_blocks(self) -> bool:
        """Whether the method mixes hidden states where a block of the model begins: see `block_mixing`."""
        return False

    @property
    def block_mixing(self) -> BlockMixing | None:
        """How this mini-batch's hidden states are mixed; asked for after `mix_inputs`, for methods with `needs_blocks`."""
        return None

    def choose(self) -> Mixing:
        """The method for this mini-batch: itself, or another one if it is applied with a probability only.

        A method that has to remember how it mixed a mini-batch until the loss returns a copy of itself, so that one
        method serves several models and mini-batches at a time.
        """
        return self

    def for_batch(
        self, inputs: Mapping[str, Any], labels: Tensor, *, epoch: float | None = None, same_on_all_ranks: bool = False
    ) -> Mixing:
        """The method for a mini-batch that is looked at first: `choose()`, unless the method wants to know more.

        Args:
            inputs: Of the model's forward, without labels.
            labels: Of the examples, or of every location.
            epoch: How many epochs are over, in fractions; None where nobody keeps count.
            together: All processes have to choose alike, for they run parts of the model together.
        """
        return self.choose()

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Refuse, by a ValueError, a first batch of inputs that the method cannot mix."""

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Mix the inputs of the model's forward and the labels, for methods that work in input space."""
        return inputs, labels

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """The training loss of a mini-batch, a scalar: a mean over whatever the method averages."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The method's name and its settings, in JSON types only."""
        return {"method": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}

    @classmethod
    def from_dict(cls: type[Method], values: Mapping[str, Any]) -> Method:
        """The inverse of `to_dict`. Called on a method, it accepts that method's settings only."""
        values = dict(values)
        method = get_method(values.pop("method", cls.name))
        if not issubclass(method, cls):
            raise ValueError(f"These are settings of {method.__name__}, not of {cls.__name__}.")
        unknown = sorted(set(values) - {f.name for f in fields(method)})
        if unknown:
            known = [f.name for f in fields(method)]
            raise ValueError(
                f"{method.__name__} has no setting {', '.join(unknown)}{nearest(unknown[0], known)}; it has "
                f"{', '.join(known) or 'none'}."
            )
        return method(**values)


def get_method(name: str) -> type[Mixing]:
    """The method class of a name, or a ValueError that lists the names there are.

    Example:
        >>> get_method("dense_multimix").__name__
        'DenseMultiMix'
    """
    if name not in METHODS:
        raise ValueError(
            f"There is no mixing method {name!r}{nearest(name, METHODS)}. The methods are {', '.join(sorted(METHODS))}."
        )
    return METHODS[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message says behind a name that nobody knows: `` (did you mean ...?)``, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
