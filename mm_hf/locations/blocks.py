"""Mix examples inside of a model's own forward, where one of its blocks begins.

Blocks are found as everything else is: in a recorded forward, by what they do. A block is a member of a list of modules;
lists are tried, the outermost and longest first, until one is found through which alone the logits come about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .modes import nonzero_head_weights, probing_mode
from .plan import LocationError
from .pools import MASKS
from .recording import (
    PROBE_EXAMPLES,
    batch_size,
    is_features,
    logits_of,
    plain_call,
    record,
)
from .tolerance import relative_error

MEMBER = re.compile(r"((?:.*\.)?[^.\d][^.]*)((?:\.\d+)+)$")  # a list's name and the indices of one of its members


@dataclass
class BlockMixing:
    """How one mini-batch is mixed inside of the model.

    Attributes:
        depth: Where, in [0, 1): 0 where the first block begins, and each block has its equal share of the interval.
        partner: (b,), with whom each example is mixed.
        share: Scalar tensor: what the partner contributes. A tensor, since a compiled model would be compiled anew for
            each number.
    """

    depth: float
    partner: Tensor
    share: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """Mix (b, ...)."""
        return hidden + self.share.to(hidden.device) * (hidden[self.partner] - hidden)


@dataclass(frozen=True)
class Blocks:
    """The modules whose calls are a model's blocks, and how many calls there are: one module may be called repeatedly."""

    names: tuple[str, ...]
    calls: int


class BlockHooks:
    """Hooks where the blocks begin. They stay installed and mix only when told to, as `Taps` listen.

    Nothing here refers to the model: a copy of the model has taps of its own.
    """

    def __init__(self, model: nn.Module, blocks: Blocks):
        self.blocks = blocks
        self.mixing: BlockMixing | None = None
        self.block = 0
        self.chosen: Tensor | None = None
        self.calls = 0
        self._hooks = [
            model.get_submodule(name).register_forward_pre_hook(self._enter, with_kwargs=True) for name in blocks.names
        ]

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, mixing: BlockMixing) -> None:
        """Mix in the forward to come. Call outside of compiled regions: a number in Python would be compiled for."""
        block = min(int(mixing.depth * self.blocks.calls), self.blocks.calls - 1)
        self.chosen = torch.arange(self.blocks.calls, device=mixing.partner.device) == block
        self.block, self.mixing, self.calls = block, mixing, 0

    def end(self) -> None:
        """Mix no more."""
        self.mixing = self.chosen = None

    def check(self, model: nn.Module) -> None:
        """Raise unless the forward that was to be mixed called all blocks. Call after `end`."""
        if self.calls != self.blocks.calls:
            raise ValueError(
                f"{type(model).__name__} called {self.calls} of its {self.blocks.calls} blocks in this forward, and it may be "
                "the one that was to mix which was left out, with labels mixed all the same. If its config has a layerdrop, "
                "set it to 0."
            )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mixing = self.mixing
        if mixing is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise ValueError(
                    f"A block of the model ({type(module).__name__}) is computed again in the backward pass, and cannot be "
                    "mixed there as it was in the forward pass: this kind of gradient checkpointing does not go with mixing "
                    "inside of the model. Switch it off, or use Mixup or MultiMix."
                )
            return None
        call, self.calls = self.calls, self.calls + 1
        if not torch.compiler.is_compiling() and call != self.block:
            return None
        given: list[tuple[Any, Any]] = [*enumerate(args), *kwargs.items()]
        key, hidden = next((key, x) for key, x in given if is_features(x))
        mixed = mixing(hidden)
        if torch.compiler.is_compiling():
            # Which block it is, is no number to a compiled model: it would be compiled once for each.
            assert self.chosen is not None
            mixed = torch.where(self.chosen[call], mixed, hidden)
        if isinstance(key, int):
            return (*args[:key], mixed, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: mixed}


def find_blocks(model: nn.Module, inputs: Mapping[str, Any]) -> Blocks:
    """The blocks of a model, from a batch of at least two examples.

    Proof that nothing of an example goes around them: with the examples exchanged where a block begins, whichever, and
    nowhere else, the logits are those of the exchanged examples.

    Raises:
        LocationError: No list of blocks passes.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=8, num_labels=10)
        >>> find_blocks(ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32)})
        Blocks(names=('vit.layers.0', 'vit.layers.1', 'vit.layers.2'), calls=3)
    """
    name = type(model).__name__
    if batch_size(inputs) < 2:
        raise LocationError(f"The blocks of {name} are found by exchanging examples: give a mini-batch of at least 2.")
    with torch.inference_mode(False):
        calls = [c.name for c in record(model, inputs).calls if c.argument is not None]
        inputs = _distinct_examples(inputs)
        tried = list(_lists(calls))
        for blocks in tried:
            if _carries_everything(model, blocks, inputs):
                return blocks
    lists = ", ".join(sorted({MEMBER.match(b.names[0])[1] for b in tried})) or "none"  # type: ignore[index]
    raise LocationError(
        f"{name} has no list of blocks (tried: {lists}) through which all that its logits depend on goes. What goes around, "
        "and would not be mixed, may be a second input, an encoder beside a decoder, or the place of the last word (then: pad "
        "on the left). Use Mixup or MultiMix."
    )


def _lists(calls: list[str]) -> Iterator[Blocks]:
    """Members of lists among the names of called modules, in the order of their first call: outermost lists first, and of
    these the longest."""
    lists: dict[str, list[str]] = {}
    for name in calls:
        match = MEMBER.match(name)
        if match:
            lists.setdefault(match[1], []).append(name)
    found = []
    for prefix, members in lists.items():
        depth = len(re.findall(r"\.\d+\.", prefix + "."))
        names = tuple(n for n in dict.fromkeys(members) if not any(n.startswith(o + ".") for o in members))
        found.append((depth, Blocks(names, sum(n in names for n in members))))
    for _, blocks in sorted(found, key=lambda pair: (pair[0], -pair[1].calls)):
        yield blocks


def _distinct_examples(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A few examples, the shortest and the longest among them, all with the same masks: these are no block's to mix."""
    b = batch_size(inputs)
    masks = [inputs[k] for k in MASKS if isinstance(inputs.get(k), Tensor) and inputs[k].ndim == 2]
    order = masks[0].sum(dim=1).argsort() if masks else torch.arange(b)
    few = torch.cat([order[: PROBE_EXAMPLES // 2], order[PROBE_EXAMPLES // 2 :][-PROBE_EXAMPLES // 2 :]])
    chosen = {
        k: v[few.to(v.device)] if isinstance(v, Tensor) and v.ndim and len(v) == b else v for k, v in inputs.items()
    }
    return {k: torch.ones_like(v) if k in MASKS and isinstance(v, Tensor) else v for k, v in chosen.items()}


def _carries_everything(model: nn.Module, blocks: Blocks, inputs: dict[str, Any]) -> bool:
    hooks = BlockHooks(model, blocks)
    try:
        with probing_mode(model), nonzero_head_weights(model), torch.no_grad():
            logits = logits_of(plain_call(model, inputs))
            partner = torch.arange(len(logits), device=logits.device).roll(1)
            limit = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 5e-2
            for call in range(blocks.calls):
                mixing = BlockMixing((call + 0.5) / blocks.calls, partner, torch.ones((), device=logits.device))
                hooks.begin(mixing)
                exchanged = logits_of(plain_call(model, inputs))
                hooks.end()
                if hooks.calls != blocks.calls or relative_error(exchanged, logits[partner]) > limit:
                    return False
            return relative_error(logits, logits[partner]) > limit
    except (IndexError, RuntimeError, StopIteration):  # what a member takes first is no batch of examples
        return False
    finally:
        hooks.remove()
