"""Give a model mixed embeddings of its tokens in a forward, with the position that its head reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attachments import ModuleHooks, attach, detach
from .modes import nonzero_head_weights, probing_mode
from .plan import LocationError
from .pools import MASKS
from .probe_inputs import few_examples, pad_id, varied_examples
from .recording import logits_of, original_forward
from .tolerance import is_close


class EmbeddingHook(ModuleHooks):
    """Hook that replaces the output of a model's token embeddings between `begin` and `end`.

    Some models find the token that their head reads by the token ids, and take the last position of `inputs_embeds`,
    which is padding in texts that are padded on the right. With this hook, they get ids and mixed embeddings. The hook
    stays installed. A copy of the model has none.

    Attributes:
        module: The module of the token embeddings.
        embeddings: (b, n, d) the output of the embeddings in the next forward, or None for their own.
        calls: Number of replaced outputs since `begin`.
    """

    def __init__(self, model: nn.Module):
        self.embeddings: Tensor | None = None
        self.calls = 0
        self.module = token_embeddings(model)
        self._handle = self.module.register_forward_hook(self._replace)
        attach(self.module)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
        detach(self.module)

    def begin(self, embeddings: Tensor) -> None:
        """Replace the output in the next forward."""
        self.embeddings, self.calls = embeddings, 0

    def end(self) -> None:
        """Stop replacing."""
        self.embeddings = None

    def _replace(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.embeddings is None:
            return None
        self.calls += 1
        return self.embeddings


def token_embeddings(model: nn.Module) -> nn.Module:
    """Return the module that maps token ids to embeddings.

    Raises:
        LocationError: The model has none.
    """
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise LocationError(
            f"Mixup mixes the embeddings of token ids, and {type(model).__name__} has no module that returns them "
            "(get_input_embeddings): use MultiMix or DenseMultiMix."
        )
    return found


def install_embedding_hook(model: nn.Module, inputs: Mapping[str, Any]) -> EmbeddingHook | None:
    """Return a hook by which the model accepts embeddings, or None if it accepts them as `inputs_embeds`.

    The result is verified: the embeddings of a text give the same logits as its ids, also with padding, and with the
    hook, the ids of two words do not matter.

    Args:
        model: A Transformers classification model.
        inputs: Keyword arguments of its forward, among them `input_ids`.

    Raises:
        LocationError: The model does not give the same logits in either way.
    """
    with torch.inference_mode(False):
        few = few_examples(inputs)
        few = varied_examples(model, few) or few
        with probing_mode(model), nonzero_head_weights(model), torch.no_grad():
            embeddings = token_embeddings(model)(few["input_ids"])
            logits = logits_of(original_forward(model, few))
            without_ids = {k: v for k, v in few.items() if k != "input_ids"}
            if _gives(model, {**without_ids, "inputs_embeds": embeddings}, logits):
                return None
            hook = EmbeddingHook(model)
            hook.begin(embeddings)
            is_right = _gives(model, {**few, "input_ids": _with_two_words_exchanged(few, model)}, logits)
            is_right = is_right and hook.calls == 1
            hook.end()
    if is_right:
        return hook
    hook.remove()
    raise LocationError(
        f"Mixup mixes the embeddings of token ids, and {type(model).__name__} does not give the same logits for them "
        "as for the ids: use MultiMix or DenseMultiMix."
    )


def _with_two_words_exchanged(inputs: Mapping[str, Any], model: nn.Module) -> Tensor:
    """Return the token ids of texts with their second and third token exchanged."""
    ids = inputs["input_ids"].clone()
    for row, valid in zip(ids, text_mask(inputs, model), strict=True):
        second_and_third = valid.nonzero()[1:3, 0]
        row[second_and_third] = row[second_and_third.flip(0)]
    return ids


def _gives(model: nn.Module, inputs: dict[str, Any], logits: Tensor) -> bool:
    """Return True if the model accepts the inputs and gives these logits."""
    try:
        found = logits_of(original_forward(model, inputs))
    except Exception:  # the model does not accept embeddings in this form
        return False
    return isinstance(found, Tensor) and is_close(found, logits, slack=10)


def text_mask(inputs: Mapping[str, Any], model: nn.Module) -> Tensor:
    """Return the mask (b, n) of the tokens of each text: the inputs' own, or else that of ids that are not padding."""
    ids: Tensor = inputs["input_ids"]
    mask = next((inputs[k] for k in MASKS if isinstance(inputs.get(k), Tensor) and inputs[k].shape == ids.shape), None)
    pad = pad_id(model)
    if mask is None:
        mask = torch.ones_like(ids) if pad is None else ids.ne(pad)
    return mask.bool()
