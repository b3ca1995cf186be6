"""Mix examples inside of a model's own forward, at the input of one of its blocks.

The blocks are found in a recorded forward by what they do. They are the members of a list of modules, or modules of one
module with numbered names (`stage1`, `stage2`, or `mixed_5b`, `mixed_5c`). Such groups are tried, those with the most
calls of modules inside first, until one is found such that the logits depend on the inputs only through its members.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attachments import ModuleHooks, attach, detach
from .modes import nonzero_head_weights, probing_mode
from .plan import LocationError
from .probe_inputs import batch_size, distinct_examples
from .recording import is_features, logits_of, original_forward, record
from .tolerance import relative_error, tolerance, within_rounding

LIST_MEMBER = re.compile(
    r"((?:.*\.)?[^.\d][^.]*)((?:\.\d+)+)$"
)  # name of a list, and the indices of one of its members
NUMBERED_MEMBER = re.compile(r"(.*[^.\d])(\d+[a-z]?)$")  # common part of the names, and the number
IN_A_LIST = re.compile(r"\.\d+\.")  # a name within a member of a list


@dataclass
class BlockMixing:
    """Mixing of one mini-batch inside of the model.

    Attributes:
        depth: Position in [0, 1). The interval is divided equally among the blocks; 0 is the input of the first one.
        partner: (b,), index of the example that each example is mixed with.
        share: Scalar tensor, the weight of the partner. It is a tensor because a compiled model would be recompiled for
            each Python number.
    """

    depth: float
    partner: Tensor
    share: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """Mix hidden states (b, ...)."""
        return hidden + self.share.to(hidden.device) * (hidden[self.partner] - hidden)


@dataclass(frozen=True)
class Blocks:
    """Names of the modules that are a model's blocks, and the number of their calls in a forward.

    There may be more calls than modules, because some models call a module repeatedly.
    """

    names: tuple[str, ...]
    calls: int


class BlockHooks(ModuleHooks):
    """Hooks at the inputs of the blocks. They stay installed and mix only between `begin` and `end`.

    A copy of the model has no hooks.

    Attributes:
        blocks: The blocks.
        modules: Their modules.
        mixing: Mixing of the current mini-batch, or None.
        block: Index of the call whose input is mixed.
        chosen: (calls,), True at `block`: the same as a tensor, for compiled models.
        calls: Number of calls since `begin`.
    """

    def __init__(self, model: nn.Module, blocks: Blocks):
        self.blocks = blocks
        self.mixing: BlockMixing | None = None
        self.block = 0
        self.chosen: Tensor | None = None
        self.calls = 0
        self.modules = [model.get_submodule(name) for name in blocks.names]
        self._handles = [m.register_forward_pre_hook(self._mix_input, with_kwargs=True) for m in self.modules]
        for module in self.modules:
            attach(module)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for module in self.modules:
            detach(module)

    def begin(self, mixing: BlockMixing) -> None:
        """Mix in the next forward. Call it outside of compiled regions, because it depends on Python numbers."""
        block = min(int(mixing.depth * self.blocks.calls), self.blocks.calls - 1)
        self.chosen = torch.arange(self.blocks.calls, device=mixing.partner.device) == block
        self.block, self.mixing, self.calls = block, mixing, 0

    def end(self) -> None:
        """Stop mixing."""
        self.mixing = self.chosen = None

    def check(self, model: nn.Module) -> None:
        """Check that the mixed forward called all blocks. Call it after `end`.

        Raises:
            ValueError: A block was skipped, possibly the one whose input was to be mixed.
        """
        if self.calls != self.blocks.calls:
            raise ValueError(
                f"{type(model).__name__} called {self.calls} of its {self.blocks.calls} blocks in this forward. If it "
                "skipped the block whose input is mixed, its labels were mixed without its features. If the model's "
                "config has a layerdrop, set it to 0."
            )

    def _mix_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mixing = self.mixing
        if mixing is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise ValueError(
                    f"A block of the model ({type(module).__name__}) is recomputed in the backward pass, where its "
                    "input is not mixed as in the forward pass: this kind of gradient checkpointing cannot be combined "
                    "with mixing inside of the model. Disable it, or use Mixup or MultiMix."
                )
            return None
        call, self.calls = self.calls, self.calls + 1
        if not torch.compiler.is_compiling() and call != self.block:
            return None
        arguments: list[tuple[Any, Any]] = [*enumerate(args), *kwargs.items()]
        key, hidden = next((key, x) for key, x in arguments if is_features(x))
        mixed = mixing(hidden)
        if torch.compiler.is_compiling():
            # A comparison with the Python number `block` would be compiled once for each block.
            assert self.chosen is not None
            mixed = torch.where(self.chosen[call], mixed, hidden)
        if isinstance(key, int):
            return (*args[:key], mixed, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: mixed}


def find_blocks(model: nn.Module, inputs: Mapping[str, Any]) -> Blocks:
    """Find the blocks of a model from a batch of at least two examples.

    The blocks are verified: exchanging the examples at the input of any one block exchanges the logits.

    Args:
        model: A Transformers classification model.
        inputs: Keyword arguments of its forward.

    Raises:
        LocationError: Neither a list of blocks nor modules with numbered names have this property.

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
        raise LocationError(f"To find the blocks of {name}, examples are exchanged: pass a mini-batch of at least 2.")
    with torch.inference_mode(False):
        calls = [c.name for c in record(model, inputs).calls if c.argument is not None]
        inputs = distinct_examples(inputs)
        lists = _group(calls, LIST_MEMBER)
        numbered = {
            prefix: blocks
            for prefix, blocks in _group(calls, NUMBERED_MEMBER).items()
            if len(blocks.names) > 1 and not IN_A_LIST.search(prefix)
        }
        groups = [*lists.items(), *numbered.items()]
        for _, blocks in sorted(groups, key=lambda group: _rank(calls, *group)):
            if _determine_logits(model, blocks, inputs):
                return blocks
    tried = ", ".join(sorted(lists)) or "none"
    raise LocationError(
        f"{name} has no list of blocks (tried: {tried}) such that its logits depend on the inputs only through them, "
        "and no such modules with numbered names. The logits may also depend on a second input, on an encoder beside a "
        "decoder, or on the position of the last word (then pad on the left). Use Mixup or MultiMix."
    )


def _group(calls: list[str], pattern: re.Pattern[str]) -> dict[str, Blocks]:
    """Return the called modules whose names have a common part, without those inside of others.

    The members are in the order of their first call.
    """
    groups: dict[str, list[str]] = {}
    for name in calls:
        match = pattern.match(name)
        if match:
            groups.setdefault(match[1], []).append(name)
    found = {}
    for prefix, members in groups.items():
        names = tuple(n for n in dict.fromkeys(members) if not any(n.startswith(o + ".") for o in members))
        found[prefix] = Blocks(names, sum(n in names for n in members))
    return found


def _rank(calls: list[str], prefix: str, blocks: Blocks) -> tuple[int, int, int]:
    """Return the key of sorting: the largest part of the forward first, then the outermost and the longest group.

    Parts are compared by calls of modules. A short stem may be a list, too, and a list of stages may have lists inside.
    """
    inside = tuple(name + "." for name in blocks.names)
    part = sum((name + ".").startswith(inside) for name in calls)
    return -part, prefix.count("."), -blocks.calls


def _determine_logits(model: nn.Module, blocks: Blocks, inputs: dict[str, Any]) -> bool:
    """Return True if exchanging the examples at the input of any one block exchanges the logits."""
    hooks = BlockHooks(model, blocks)
    try:
        with probing_mode(model), nonzero_head_weights(model), torch.no_grad():
            logits = logits_of(original_forward(model, inputs))
            partner = torch.arange(len(logits), device=logits.device).roll(1)
            difference = relative_error(logits, logits[partner])
            # The logits must differ, or else exchanging the examples proves nothing. Those of an untrained model hardly
            # differ: then the error of the exchanged ones must be much smaller.
            limit = tolerance(logits.dtype, slack=100)
            if difference <= limit:
                limit = difference / 10
            if within_rounding(difference, logits.dtype):
                return False
            for call in range(blocks.calls):
                mixing = BlockMixing((call + 0.5) / blocks.calls, partner, torch.ones((), device=logits.device))
                hooks.begin(mixing)
                exchanged = logits_of(original_forward(model, inputs))
                hooks.end()
                error = relative_error(exchanged, logits[partner])
                if hooks.calls != blocks.calls or error > limit:
                    return False
            return True
    except (IndexError, RuntimeError, StopIteration):  # The first argument of a member is no batch of examples.
        return False
    finally:
        hooks.remove()
