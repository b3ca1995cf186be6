# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.20",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.7",
# ]
# ///
r"""Fine-tune an audio classification model of Transformers with MultiMix or Dense MultiMix.

With a dataset from the Hub:

    python examples/run_audio_classification.py --model_name_or_path facebook/wav2vec2-base \
        --dataset_name PolyAI/minds14 --dataset_config_name en-US --label_column_name intent_class \
        --max_length_seconds 10 --mixing dense_multimix --do_train --do_eval --learning_rate 3e-5 \
        --output_dir outputs/minds14

Offline, train a small spectrogram transformer from scratch to classify five languages (for your own recordings, use
--train_dir):

    python examples/run_audio_classification.py examples/recipes/spoken_prompts.yaml

The options are those of Transformers' script and the settings of the mixing method (--num_mixed, --alpha, --attention,
...); --mixing METHOD --help shows them.
Options override those of a first argument that ends in .yaml or .json, an option file. See
docs/text.md for details.
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

import numpy as np
from datasets import Audio, Dataset, DatasetDict
from transformers import (
    FEATURE_EXTRACTOR_MAPPING,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainingArguments,
)

from mm_hf import Mixing, MultiMixTrainer
from mm_hf.cli import scripts
from mm_hf.data.classes import as_classes
from mm_hf.data.offline_voices import OFFLINE
from mm_hf.evaluation.metrics import load_metric


@dataclass
class ModelArguments(scripts.ModelArguments):
    """Model to train."""

    model_type: str = field(
        default="audio-spectrogram-transformer", metadata={"help": "Architecture of a model trained from scratch."}
    )
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "Feature extractor. Default: the model's."}
    )
    feature_extractor_overrides: str | None = field(
        default=None,
        metadata={
            "help": 'Feature extractor settings of a model trained from scratch, as JSON: {"sampling_rate": 8000}'
        },
    )
    freeze_feature_encoder: bool = field(
        default=True,
        metadata={
            "help": "Freeze the convolutional feature encoder of a pretrained model, if it has one (wav2vec 2.0)."
        },
    )
    attention_mask: bool | None = field(
        default=None,
        metadata={"help": "Pass an attention mask to the model. Default: the feature extractor's setting."},
    )


@dataclass
class DataTrainingArguments(scripts.DataArguments):
    """Recordings to train on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"Hub name, or offline dataset: {', '.join(OFFLINE)}."}
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Directory of training recordings with one subdirectory per class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Directory of validation recordings."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": "Split for validation. Default: validation, or else test."}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the recordings."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})
    max_length_seconds: float = field(
        default=20, metadata={"help": "Maximum length in training: longer recordings are cropped at random."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None:
            raise ValueError(f"Give --dataset_name (offline: {', '.join(OFFLINE)}) or --train_dir.")
        if self.max_length_seconds <= 0:
            raise ValueError(f"--max_length_seconds must be positive, but is {self.max_length_seconds}.")


def parse_arguments(
    arguments: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments, Mixing]:
    """Parse options or an option file, including the fields of the selected mixing method."""
    return scripts.parse_arguments(arguments, ModelArguments, DataTrainingArguments, description=__doc__)


class AudioTransform:
    """Transform of a batch of rows with recordings to the feature extractor's outputs and `labels`.

    Args:
        extractor: Feature extractor of the model.
        data_args: Names of the columns, and maximum length in training.
        train: Crop longer recordings at random.
    """

    def __init__(self, extractor: Any, data_args: DataTrainingArguments, train: bool):
        self.extractor, self.train = extractor, train
        self.columns = (data_args.audio_column_name, data_args.label_column_name)
        self.max_length = round(data_args.max_length_seconds * extractor.sampling_rate)

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Transform a batch of rows."""
        rate = self.extractor.sampling_rate
        waves = [read(recording, rate) for recording in rows[self.columns[0]]]
        if self.train:
            waves = [random_crop(wave, self.max_length) for wave in waves]
        return {**self.extractor(waves, sampling_rate=rate), "labels": rows[self.columns[1]]}


def read(recording: dict[str, Any], rate: int) -> np.ndarray:
    """Decode a recording of `datasets.Audio(decode=False)` to one float32 channel at a sampling rate in Hz."""
    import soundfile
    from scipy.signal import resample_poly

    source = recording["path"] if recording.get("bytes") is None else io.BytesIO(recording["bytes"])
    wave, own_rate = soundfile.read(source, dtype="float32", always_2d=True)
    wave = wave.mean(axis=1)
    if own_rate != rate:
        common_rate = math.gcd(own_rate, rate)
        wave = resample_poly(wave, rate // common_rate, own_rate // common_rate).astype(np.float32)
    return wave


def random_crop(wave: np.ndarray, length: int) -> np.ndarray:
    """Return a random crop of `length` samples; shorter recordings are unchanged."""
    start = random.randint(0, max(len(wave) - length, 0))
    return wave[start : start + length]


def read_folders(data_args: DataTrainingArguments) -> DatasetDict:
    """Return the paths and classes of the recordings in each directory.

    The loader of datasets would require torchcodec.
    """
    import soundfile

    splits = {}
    suffixes = sorted(f".{form.lower()}" for form in soundfile.available_formats())
    for split, folder in {"train": data_args.train_dir, "validation": data_args.validation_dir}.items():
        if folder is not None:
            paths = sorted(path for path in Path(folder).glob("*/**/*") if path.suffix.lower() in suffixes)
            if not paths:
                raise ValueError(
                    f"--{split}_dir {folder!r} has no subdirectory with recordings ({', '.join(suffixes)})."
                )
            columns = {
                data_args.audio_column_name: [str(path) for path in paths],
                data_args.label_column_name: [path.relative_to(folder).parts[0] for path in paths],
            }
            splits[split] = Dataset.from_dict(columns)
    return DatasetDict(splits)


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments, seed: int) -> DatasetDict:
    """Load the splits `train` and `validation`."""
    if data_args.dataset_name in OFFLINE:
        data = OFFLINE[data_args.dataset_name]()
    elif data_args.dataset_name is not None:
        data = scripts.load_from_hub(data_args, model_args)
    else:
        data = read_folders(data_args)
    scripts.check_columns(data, data_args, "audio_column_name", "label_column_name")
    split = data_args.eval_split_name
    if split is not None:
        if split not in data:
            raise ValueError(f"--eval_split_name is {split!r}, but the splits are {', '.join(data)}.")
        data = DatasetDict(train=data["train"], validation=data[split])
    # Keep the files encoded: soundfile decodes them without further dependencies.
    data = data.cast_column(data_args.audio_column_name, Audio(decode=False))
    return scripts.train_and_validation(as_classes(data, data_args.label_column_name), data_args, seed)


def load_model(model_args: ModelArguments, names: list[str]) -> tuple[Any, Any]:
    """Load or create the model and its feature extractor."""
    model = scripts.load_model(AutoModelForAudioClassification, model_args, names, "audio-classification")
    source = model_args.feature_extractor_name or model_args.model_name_or_path
    settings = {} if model_args.attention_mask is None else {"return_attention_mask": model_args.attention_mask}
    if source is not None:
        extractor = AutoFeatureExtractor.from_pretrained(source, **settings, **model_args.hub)
    else:
        extractor_class: Any = FEATURE_EXTRACTOR_MAPPING[type(model.config)]
        # The extractor takes the values of settings that it shares with the configuration, such as num_mel_bins.
        shared = set(inspect.signature(extractor_class).parameters) & set(model.config.to_dict())
        settings |= {name: getattr(model.config, name) for name in shared}
        extractor = extractor_class(**settings | json.loads(model_args.feature_extractor_overrides or "{}"))
    if model_args.freeze_feature_encoder and model_args.model_name_or_path and hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()
    return model, extractor


@scripts.reports_errors
def main() -> None:
    """Train and save the model, evaluate it, and write a model card or push to the Hub."""
    model_args, data_args, training_args, mixing = parse_arguments(sys.argv[1:])
    scripts.set_up(training_args, mixing)

    data = load_data(data_args, model_args, training_args.seed)
    names = data["train"].features[data_args.label_column_name].names
    model, extractor = load_model(model_args, names)
    # The transform reads the recordings of each batch and needs columns that the model does not accept.
    training_args = copy.copy(training_args)
    training_args.remove_unused_columns = False
    for split, rows in data.items():
        rows.set_transform(AudioTransform(extractor, data_args, train=split == "train"))
        rows[0]  # what decoding requires is an error before the training

    metric = load_metric("classification", cache_dir=model_args.cache_dir)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        """Compute accuracy, calibration and the other classification metrics."""
        return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    trainer = MultiMixTrainer(
        model=model,
        args=training_args,
        mixing=mixing,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        data_collator=DataCollatorWithPadding(extractor),
        compute_metrics=compute_metrics,
        processing_class=extractor,
    )
    card = scripts.card_arguments(
        "audio-classification",
        model_args.model_name_or_path,
        data_args.dataset_name or data_args.train_dir,
        data_args.dataset_name,
        OFFLINE,
    )
    scripts.train_and_evaluate(trainer, card)


if __name__ == "__main__":
    main()
