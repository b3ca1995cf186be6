"""Pictures of the attention that weighs the labels, in the tracker, while a model trains."""

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

from ..evaluation.metrics import Normalization
from ..locations import LocationOutput, Plan, extract, probe
from ..locations.hooks import HOOKS, temporary_hooks
from ..locations.modes import evaluation_mode, restore_random_state

TAG = "attention_map"
TRACKERS = (TensorBoardCallback, TrackioCallback, WandbCallback)
LABELS = ("label", "label_ids", "labels")


class AttentionMapCallback(TrainerCallback):
    """Draws, every so many steps, how much of each label is said to be about which patch or token, of the same few examples.

    The picture goes to each tracker of `report_to` that takes pictures: TensorBoard, trackio and Weights & Biases. It is
    drawn before the first step, every `every` steps and after the last one, on the main process. The training is what it
    would be without: weights, modes, gradients and random numbers are not touched.

    Args:
        trainer: Whose model is looked at; add the callback to it by `trainer.add_callback`.
        examples: A data set like the one that is evaluated on, of images or of texts.
        every: Steps from one picture to the next.
        attention: What weighs a label (see [`extract`]). Default: what the trainer's method takes, or else "auto".
        max_examples: The first ones, which are drawn.
        directory: Where pictures are written, too, as `step-000100.png`. Default: nowhere.

    Raises:
        ValueError: No tracker takes pictures and there is no directory, or the model is sharded over processes; (when it is
            drawn) the model's locations are neither patches of an image nor tokens.

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
                f"report_to={trainer.args.report_to} has no tracker that takes pictures: set it to tensorboard, trackio or "
                "wandb, or give a directory."
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "AttentionMapCallback looks at the model on the main process alone, which a model that is sharded over "
                "processes (FSDP, DeepSpeed) does not bear: leave it out."
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
            self._draw(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After the last step here, and not when the training ends: by then trackers are closed.
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._draw(state, kwargs["model"])

    def _draw(self, state: Any, model: nn.Module) -> None:
        from ..evaluation.plots.attention import pixels_of

        if not state.is_world_process_zero:
            return
        pixels = pixels_of(self.picture(model))
        for tracker in self.trackers:
            _send(tracker, pixels, state.global_step)
        if self.directory is not None:
            from PIL import Image

            self.directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(self.directory / f"step-{state.global_step:06d}.png")

    def picture(self, model: nn.Module) -> Any:
        """The figure of the examples as the model sees them now, which is left as it is."""
        with evaluation_mode(model) as device, torch.no_grad():
            batch = {k: v.to(device) for k, v in self.batch.items()}
            inputs = {k: v for k, v in batch.items() if k not in LABELS}
            with self._taps(model, inputs):
                output = extract(model, self.attention, **inputs, labels=batch.get("labels"))
        titles = [_title(model, y) for y in self.batch.get("labels", [None] * len(output.logits))]
        return _figure(inputs, output, self.processing_class, titles)

    def _taps(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        """A model that mixes has taps from its first step on; before, and without mixing, one for a while, as those see it."""
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
        shown = [[words[j] for j in here] for words, here in zip(tokens, kept, strict=True)]
        return plot_token_attention(shown, [w[j] for w, j in zip(attention, kept, strict=True)], titles=titles)
    if images is not None and images.ndim == 4:
        return plot_image_attention(_pixels(images.float().cpu(), processing_class), attention, titles=titles)
    raise ValueError(
        f"AttentionMapCallback draws patches of images and tokens of texts, and these {mask.shape[1]} locations are neither "
        f"(the inputs are {', '.join(inputs)}): leave it out."
    )


def _title(model: Any, label: Any) -> str:
    if label is None or label.ndim or label.is_floating_point():
        return ""
    names = getattr(model.config, "id2label", None) or {}
    return str(names.get(int(label), int(label)))


def _words(ids: Tensor, tokenizer: Any) -> list[str]:
    """Tokens as they are read: byte-level and sentence-piece tokenizers write a space as a letter of its own."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return [str(i) for i in ids.tolist()]
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return [str(token).replace("Ġ", " ").replace("▁", " ").strip() or "·" for token in tokens]


def _pixels(images: Tensor, processor: Any) -> np.ndarray:
    """Images (b, h, w) or (b, h, w, 3) in [0, 1]; without a processor that tells, from each one's least to its largest."""
    try:
        pixels = Normalization.of(processor).to_pixels(images)
    except (TypeError, ValueError, KeyError):
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        pixels = (images - low) / (high - low).clamp(min=1e-9)
    return (pixels[:, 0] if pixels.shape[1] != 3 else pixels.movedim(1, -1)).numpy()


def _batch(trainer: Trainer, examples: Any, most: int) -> dict[str, Tensor]:
    """The first examples as the trainer's collator makes a batch of them, without the columns that the model does not take."""
    model: Any = trainer.model
    plain = model.get_base_model() if hasattr(type(model), "get_base_model") else model
    taken = {*inspect.signature(plain.forward).parameters, *LABELS}
    rows = [examples[i] for i in range(min(most, len(examples)))]
    if not rows:
        raise ValueError("examples is empty: there is nothing to draw.")
    collate: Callable[..., Mapping[str, Any]] = trainer.data_collator
    batch = collate([{k: v for k, v in row.items() if k in taken} for row in rows])
    return {k: v for k, v in batch.items() if isinstance(v, Tensor)}


def _send(tracker: Any, pixels: np.ndarray, step: int) -> None:
    """Log a picture the way the tracker takes one."""
    if isinstance(tracker, TensorBoardCallback):
        tracker.tb_writer.add_image(TAG, pixels, step, dataformats="HWC")
        return
    library: Any = getattr(tracker, "_trackio", None) or getattr(tracker, "_wandb", None)
    library.log({TAG: library.Image(pixels), "train/global_step": step})
