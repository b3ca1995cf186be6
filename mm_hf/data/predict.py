"""Predictions for files: images, texts and recordings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .folders import image_extensions
from .images import convert_image
from .tables import TABLES, files_below

EXTENSIONS = {"text": {".txt"}, "audio": {".wav", ".flac", ".ogg", ".mp3"}}


class Prediction(NamedTuple):
    """The most probable class of a file, and its probability."""

    file: str
    label: str
    probability: float


def find_files(paths: Sequence[str | Path], task: str) -> list[Path]:
    """Return the given files, and the files of a task below the given directories.

    Links to directories are followed. Hidden files are ignored.

    Args:
        paths: Files and directories.
        task: "image", "text" (.txt) or "audio".

    Raises:
        ValueError: A path does not exist, a directory has no such files, or a table is given for texts.
    """
    extensions = image_extensions() if task == "image" else EXTENSIONS[task]
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in files_below(path) if p.suffix.lower() in extensions]
            if not inside:
                raise ValueError(f"{path} has no {task} files: give files, or a directory with {task} files.")
            found += inside
        elif task == "text" and path.suffix.lower() in TABLES:
            raise ValueError(
                f"{path} is a table, and each file is one text: write each text to a .txt file, or pass the column to "
                "transformers.pipeline in Python."
            )
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist: give files, or a directory with {task} files.")
    return found


def predict_files(
    model: Any, processor: Any, files: Sequence[Path], task: str, batch_size: int = 32
) -> Iterator[Prediction]:
    """Predict the class of each file.

    Args:
        model: Classification model in evaluation mode.
        processor: Its image processor, tokenizer or feature extractor.
        files: Files from [`find_files`].
        task: "image", "text" or "audio".
        batch_size: Number of files in memory at a time.

    Raises:
        ValueError: A file cannot be read; the message names it.
    """
    if task == "audio" and not getattr(processor, "return_attention_mask", False):
        batch_size = 1  # the prediction of a padded recording would depend on the longest one of its batch
    multi_label = getattr(model.config, "problem_type", None) == "multi_label_classification"
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        inputs = READERS[task](batch, model, processor)
        inputs = {name: x.to(model.device) for name, x in inputs.items() if isinstance(x, torch.Tensor)}
        with torch.no_grad():
            logits = model(**inputs).logits.float()
        best = (logits.sigmoid() if multi_label else logits.softmax(dim=-1)).max(dim=-1)
        for file, probability, index in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            yield Prediction(str(file), str(model.config.id2label[index]), probability)


def _images(files: Sequence[Path], model: Any, processor: Any) -> Any:
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    images = []
    for path in files:
        try:
            with Image.open(path) as image:
                images.append(convert_image(image, mode))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _unreadable(path, error) from error
    return processor(images, return_tensors="pt")


def _texts(files: Sequence[Path], model: Any, tokenizer: Any) -> Any:
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from error
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**9)
    longest = min(limits)
    options = {"truncation": True, "max_length": longest} if longest < 10**6 else {}
    return tokenizer(texts, padding=True, return_tensors="pt", **options)


def _sounds(files: Sequence[Path], model: Any, extractor: Any) -> Any:
    import soundfile
    from scipy.signal import resample_poly

    waves = []
    for path in files:
        try:
            values, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (OSError, RuntimeError) as error:
            raise _unreadable(path, error) from error
        if not len(values):
            raise _unreadable(path, "it has no samples")
        wave = values.mean(axis=1)
        if rate != extractor.sampling_rate:
            common = int(np.gcd(rate, extractor.sampling_rate))
            wave = resample_poly(wave, extractor.sampling_rate // common, rate // common).astype(np.float32)
        waves.append(wave)
    return extractor(waves, sampling_rate=extractor.sampling_rate, padding=True, return_tensors="pt")


def _unreadable(path: Path, reason: Any) -> ValueError:
    return ValueError(f"{path} cannot be read ({' '.join(str(reason).split())}): replace it or remove it.")


READERS: dict[str, Any] = {"image": _images, "text": _texts, "audio": _sounds}
