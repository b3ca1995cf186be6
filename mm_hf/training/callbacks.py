"""Attention maps of a model in a tracker during training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..evaluation.files import remove_link
from ..evaluation.metrics import Normalization
from ..locations import LocationOutput, Plan, extract, probe
from ..locations.hooks import HOOKS, temporary_hooks
from ..locations.modes import evaluation_mode, restore_random_state

TAG = "attention_map"
TRACKERS = (TensorBoardCallback, TrackioCallback, WandbCallback)
LABELS = ("label", "label_ids", "labels")


class AttentionMapCallback(TrainerCallback):
    """Logs the attention that weights each label at every patch or token, for a fixed set of examples.

    The figure is logged to each tracker of `report_to` that accepts images: TensorBoard, trackio and Weights & Biases.
    It is drawn before the first step, every `every` steps and after the last step, on the main process. Training is not
    affected: weights, modes, gradients and random states do not change.

    Args:
        trainer: The trainer of the model. Add the callback to it with `trainer.add_callback`.
        examples: A dataset of images or texts in the format of the evaluation dataset.
        every: Number of steps between figures.
        attention: Attention that weights a label (see [`extract`]). Default: that of the trainer's method, or "auto" if
            the method uses none.
        max_examples: Number of examples, taken from the start of `examples`.
        directory: Directory where the figures are also written, as `step-000100.png`. Default: they are not written.

    Raises:
        ValueError: No tracker accepts images and there is no directory; the model is sharded over processes; or, when a
            figure is drawn, the locations of the model are neither patches of an image nor tokens.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> from mm_hf import AttentionMapCallback, MultiMixTrainer
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=16, patch_size=8, num_channels=1, num_labels=2)
        >>> data = [{"pixel_values": torch.randn(1, 16, 16), "labels": i % 2} for i in range(8)]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     args = TrainingArguments(directory, max_steps=2, disable_tqdm=True, use_cpu=True)
        ...     trainer = MultiMixTrainer(ViTForImageClassification(config), args, train_dataset=data)
        ...     trainer.add_callback(AttentionMapCallback(trainer, data, directory=f"{directory}/maps"))
        ...     steps = trainer.train().global_step
        ...     sorted(path.name for path in Path(directory, "maps").iterdir())
        {'train_runtime': ...}
        ['step-000000.png', 'step-000002.png']
    """

    def __init__(
        self,
        trainer: Trainer,
        examples: Any,
        *,
        every: int = 100,
        attention: str | None = None,
        max_examples: int = 6,
        directory: str | Path | None = None,
    ):
        if every < 1 or max_examples < 1:
            raise ValueError(f"every and max_examples must be positive, but are {every} and {max_examples}.")
        self.trackers = [c for c in trainer.callback_handler.callbacks if isinstance(c, TRACKERS)]
        if not self.trackers and directory is None:
            raise ValueError(
                f"report_to={trainer.args.report_to} has no tracker that accepts images: set it to tensorboard, "
                "trackio or wandb, or give a directory."
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "AttentionMapCallback runs the model on the main process only, which is not possible for a model that "
                "is sharded over processes (FSDP, DeepSpeed): leave the callback out."
            )
        method = getattr(trainer, "mixing", None)
        self.attention = attention or (None if method is None else method.requirements.attention) or "auto"
        self.processing_class = trainer.processing_class
        self.every = every
        self.plan: Plan | None = None
        self.directory = None if directory is None else Path(directory)
        with restore_random_state():
            self.batch = _batch(trainer, examples, max_examples)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._log_figure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last figure is drawn here because the trackers are closed when `on_train_end` is called.
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._log_figure(state, kwargs["model"])

    def _log_figure(self, state: Any, model: nn.Module) -> None:
        from ..evaluation.plots.attention import pixels_of

        if not state.is_world_process_zero:
            return
        pixels = pixels_of(self.draw(model))
        for tracker in self.trackers:
            _send(tracker, pixels, state.global_step)
        if self.directory is not None:
            from PIL import Image

            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / f"step-{state.global_step:06d}.png"
            remove_link(path)
            Image.fromarray(pixels).save(path)

    def draw(self, model: nn.Module) -> Any:
        """Return the figure of the examples for the current weights. The model does not change."""
        with evaluation_mode(model) as device, torch.no_grad():
            batch = {k: v.to(device) for k, v in self.batch.items()}
            inputs = {k: v for k, v in batch.items() if k not in LABELS}
            with self._hooks(model, inputs):
                output = extract(model, self.attention, **inputs, labels=batch.get("labels"))
        titles = [_title(model, y) for y in self.batch.get("labels", [None] * len(output.logits))]
        return _figure(inputs, output, self.processing_class, titles)

    def _hooks(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        """Return temporary hooks for a model that has none: before its first step, or without mixing."""
        if HOOKS in model.__dict__:
            return nullcontext()
        if self.plan is None:
            self.plan = probe(model, inputs, self.processing_class)
        return temporary_hooks(model, self.plan)


def _figure(inputs: Mapping[str, Tensor], output: LocationOutput, processing_class: Any, titles: list[str]) -> Any:
    from ..evaluation.plots.attention import plot_image_attention, plot_token_attention

    assert output.attention is not None and output.mask is not None
    attention, mask = output.attention.float().cpu().numpy(), output.mask.cpu().numpy()
    images, ids = inputs.get("pixel_values"), inputs.get("input_ids")
    if ids is not None and ids.shape == mask.shape:
        tokens = [_words(row, processing_class) for row in ids.cpu()]
        kept = [np.flatnonzero(row) for row in mask]
        shown = [[words[j] for j in indices] for words, indices in zip(tokens, kept, strict=True)]
        return plot_token_attention(shown, [w[j] for w, j in zip(attention, kept, strict=True)], titles=titles)
    if images is not None and images.ndim == 4:
        return plot_image_attention(_pixels(images.float().cpu(), processing_class), attention, titles=titles)
    raise ValueError(
        f"AttentionMapCallback draws patches of images and tokens of texts, but the {mask.shape[1]} locations of this "
        f"model are neither (its inputs are {', '.join(inputs)}): leave the callback out."
    )


def _title(model: Any, label: Any) -> str:
    if label is None or label.ndim or label.is_floating_point():
        return ""
    names = getattr(model.config, "id2label", None) or {}
    return str(names.get(int(label), int(label)))


def _words(ids: Tensor, tokenizer: Any) -> list[str]:
    """Return readable tokens, without the letters that byte-level and SentencePiece tokenizers write for spaces."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return [str(i) for i in ids.tolist()]
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return [str(token).replace("Ġ", " ").replace("▁", " ").strip() or "·" for token in tokens]


def _pixels(images: Tensor, processor: Any) -> np.ndarray:
    """Return images (b, h, w) or (b, h, w, 3) in [0, 1]; scaled to their range if the processor is unknown."""
    try:
        pixels = Normalization.of(processor).to_pixels(images)
    except (TypeError, ValueError, KeyError):
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        pixels = (images - low) / (high - low).clamp(min=1e-9)
    return (pixels[:, 0] if pixels.shape[1] != 3 else pixels.movedim(1, -1)).numpy()


def _batch(trainer: Trainer, examples: Any, max_examples: int) -> dict[str, Tensor]:
    """Return the first examples as a batch of the trainer's collator, without columns that the model ignores."""
    model: Any = trainer.model
    plain = model.get_base_model() if hasattr(type(model), "get_base_model") else model
    accepted = {*inspect.signature(plain.forward).parameters, *LABELS}
    rows = [examples[i] for i in range(min(max_examples, len(examples)))]
    if not rows:
        raise ValueError("examples is empty: give at least one example.")
    collate: Callable[..., Mapping[str, Any]] = trainer.data_collator
    batch = collate([{k: v for k, v in row.items() if k in accepted} for row in rows])
    return {k: v for k, v in batch.items() if isinstance(v, Tensor)}


def _send(tracker: Any, pixels: np.ndarray, step: int) -> None:
    """Log an image with the interface of the tracker."""
    if isinstance(tracker, TensorBoardCallback):
        tracker.tb_writer.add_image(TAG, pixels, step, dataformats="HWC")
        return
    library: Any = getattr(tracker, "_trackio", None) or getattr(tracker, "_wandb", None)
    library.log({TAG: library.Image(pixels), "train/global_step": step})
