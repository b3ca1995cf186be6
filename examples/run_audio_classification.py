# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.20",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.6",
# ]
# ///
"""Fine-tune any audio classifier of Transformers with MultiMix or Dense MultiMix.

From the Hub:

    python examples/run_audio_classification.py --model_name_or_path facebook/wav2vec2-base \
        --dataset_name PolyAI/minds14 --dataset_config_name en-US --label_column_name intent_class --max_length_seconds 10 \
        --mixing dense_multimix --do_train --do_eval --learning_rate 3e-5 --output_dir outputs/minds14

Offline, a small spectrogram transformer from scratch that tells five languages apart (or your folders by --train_dir):

    python examples/run_audio_classification.py examples/recipes/spoken_prompts.yaml

The options are Transformers' own, and the fields of the chosen mixing method (--num_mixed, --alpha, --attention, ...);
--help shows those of --mixing. One argument that ends in .yaml or .json is a file with options. docs/text.md has more.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import soundfile
from datasets import Audio, Dataset, DatasetDict
from offline_voices import OFFLINE, load_offline
from scipy.signal import resample_poly
from transformers import (
    FEATURE_EXTRACTOR_MAPPING,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    DataCollatorWithPadding,
    TrainingArguments,
)

from mm_hf import Mixing, MultiMixTrainer
from mm_hf.data.splits import as_classes
from mm_hf.evaluation.metrics import classification_metrics

SUFFIXES = sorted(f".{form.lower()}" for form in soundfile.available_formats())


@dataclass
class ModelArguments(common.ModelArguments):
    """Which model is trained."""

    model_type: str = field(
        default="audio-spectrogram-transformer", metadata={"help": "Architecture of a model from scratch."}
    )
    feature_extractor_name: str | None = field(default=None, metadata={"help": "If not that of the model."})
    feature_extractor_overrides: str | None = field(
        default=None,
        metadata={
            "help": 'Settings of the feature extractor of a model from scratch, as JSON: {"sampling_rate": 8000}'
        },
    )
    freeze_feature_encoder: bool = field(
        default=True,
        metadata={"help": "Leave the convolutions of a pretrained model as they are, if it has such (wav2vec 2.0)."},
    )
    attention_mask: bool | None = field(
        default=None, metadata={"help": "Tell the model what is padding. Default: as the feature extractor says."}
    )


@dataclass
class DataTrainingArguments(common.DataArguments):
    """Which recordings it is trained on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"A data set of the Hub, or offline: {', '.join(OFFLINE)}."}
    )
    train_dir: str | None = field(default=None, metadata={"help": "A folder with one folder of recordings a class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Likewise, for validation."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": "The split to validate on. Default: validation, or test."}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "The column with the recordings."})
    label_column_name: str = field(default="label", metadata={"help": "The column with the classes."})
    max_length_seconds: float = field(
        default=20, metadata={"help": "In training, a random part of this length is taken of what is longer."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None:
            raise ValueError(f"Give --dataset_name (offline: {', '.join(OFFLINE)}) or --train_dir.")
        if self.max_length_seconds <= 0:
            raise ValueError(f"--max_length_seconds must be above 0, but is {self.max_length_seconds}.")


def parse_arguments(
    arguments: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments, Mixing]:
    """Options or a file of options; the fields of the chosen mixing method are among them."""
    return common.parse_arguments(arguments, ModelArguments, DataTrainingArguments)


class AudioTransform:
    """Recordings of a batch of rows to what the feature extractor makes of them, and `labels`.

    Args:
        extractor: The model's feature extractor.
        data_args: Names of columns, and the length to train with.
        train: Whether to take random parts of what is longer.
    """

    def __init__(self, extractor: Any, data_args: DataTrainingArguments, train: bool):
        self.extractor, self.train = extractor, train
        self.columns = (data_args.audio_column_name, data_args.label_column_name)
        self.longest = round(data_args.max_length_seconds * extractor.sampling_rate)

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """A batch of rows as the data set gives them."""
        rate = self.extractor.sampling_rate
        waves = [read(recording, rate) for recording in rows[self.columns[0]]]
        if self.train:
            waves = [random_part(wave, self.longest) for wave in waves]
        found = self.extractor(waves, sampling_rate=rate)
        return {**found, "labels": rows[self.columns[1]]}


def read(recording: dict[str, Any], rate: int) -> np.ndarray:
    """A recording, as `datasets.Audio(decode=False)` gives it, in float32, one channel, at a sampling rate in Hz."""
    source = recording["path"] if recording.get("bytes") is None else io.BytesIO(recording["bytes"])
    wave, own_rate = soundfile.read(source, dtype="float32", always_2d=True)
    wave = wave.mean(axis=1)
    if own_rate != rate:
        common_rate = math.gcd(own_rate, rate)
        wave = resample_poly(wave, rate // common_rate, own_rate // common_rate).astype(np.float32)
    return wave


def random_part(wave: np.ndarray, length: int) -> np.ndarray:
    """So many samples from a random place on, or all there are."""
    start = random.randint(0, max(len(wave) - length, 0))
    return wave[start : start + length]


def read_folders(data_args: DataTrainingArguments) -> DatasetDict:
    """Columns with the recordings' paths and classes, for each folder. `datasets`' own reader would need torchcodec."""
    splits = {}
    for split, folder in {"train": data_args.train_dir, "validation": data_args.validation_dir}.items():
        if folder is not None:
            paths = sorted(path for path in Path(folder).glob("*/**/*") if path.suffix.lower() in SUFFIXES)
            if not paths:
                raise ValueError(
                    f"--{split}_dir is {folder!r}, where no folder has recordings ({', '.join(SUFFIXES)})."
                )
            columns = {
                data_args.audio_column_name: [str(path) for path in paths],
                data_args.label_column_name: [path.relative_to(folder).parts[0] for path in paths],
            }
            splits[split] = Dataset.from_dict(columns)
    return DatasetDict(splits)


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments, seed: int) -> DatasetDict:
    """Splits `train` and `validation`, cut to size."""
    if data_args.dataset_name in OFFLINE:
        data = load_offline(data_args.dataset_name)
    elif data_args.dataset_name is not None:
        data = common.load_from_hub(data_args, model_args)
    else:
        data = read_folders(data_args)
    common.check_columns(data, data_args, "audio_column_name", "label_column_name")
    split = data_args.eval_split_name
    if split is not None:
        if split not in data:
            raise ValueError(f"--eval_split_name is {split!r}, but the data set has only {', '.join(data)}.")
        data = DatasetDict(train=data["train"], validation=data[split])
    # The files as they are: soundfile decodes them, and needs nothing else to be installed.
    data = data.cast_column(data_args.audio_column_name, Audio(decode=False))
    return common.train_and_validation(as_classes(data, data_args.label_column_name), data_args, seed)


def load_model(model_args: ModelArguments, names: list[str]) -> tuple[Any, Any]:
    """Model and feature extractor, pretrained or from scratch."""
    model = common.load_model(AutoModelForAudioClassification, model_args, names, "audio-classification")
    source = model_args.feature_extractor_name or model_args.model_name_or_path
    settings = {} if model_args.attention_mask is None else {"return_attention_mask": model_args.attention_mask}
    if source is not None:
        extractor = AutoFeatureExtractor.from_pretrained(source, **settings, **model_args.hub)
    else:
        made: Any = FEATURE_EXTRACTOR_MAPPING[type(model.config)]
        # What both have a name for (max_length, num_mel_bins, ...) is the same for both.
        shared = set(inspect.signature(made).parameters) & set(model.config.to_dict())
        settings |= {name: getattr(model.config, name) for name in shared}
        extractor = made(**settings | json.loads(model_args.feature_extractor_overrides or "{}"))
    if model_args.freeze_feature_encoder and model_args.model_name_or_path and hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()
    return model, extractor


def main() -> None:
    """Train, save, evaluate, and write a model card or push to the Hub."""
    model_args, data_args, training_args, mixing = parse_arguments(sys.argv[1:])
    common.set_up(training_args, mixing)

    data = load_data(data_args, model_args, training_args.seed)
    names = data["train"].features[data_args.label_column_name].names
    model, extractor = load_model(model_args, names)
    # The recordings are read as batches are made, and the transform needs the columns that the model does not.
    training_args = copy.copy(training_args)
    training_args.remove_unused_columns = False
    for split, rows in data.items():
        rows.set_transform(AudioTransform(extractor, data_args, train=split == "train"))

    trainer = MultiMixTrainer(
        model=model,
        args=training_args,
        mixing=mixing,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        data_collator=DataCollatorWithPadding(extractor),
        compute_metrics=classification_metrics,
        processing_class=extractor,
    )
    card = common.card_of(
        "audio-classification",
        model_args.model_name_or_path,
        data_args.dataset_name or data_args.train_dir,
        data_args.dataset_name,
        OFFLINE,
    )
    common.train_and_evaluate(trainer, card)


if __name__ == "__main__":
    main()
