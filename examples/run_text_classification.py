# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.20",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.7",
# ]
# ///
r"""Fine-tune a text classification model of Transformers with MultiMix or Dense MultiMix.

It supports sentences and pairs of sentences; single-label, multi-label and regression problems; all parameters or LoRA;
encoders and decoders. With a dataset from the Hub:

    python examples/run_text_classification.py --model_name_or_path google-bert/bert-base-cased --task_name mrpc \
        --mixing dense_multimix --do_train --do_eval --max_seq_length 128 --learning_rate 2e-5 --output_dir outputs/mrpc

Offline, fine-tune a pretrained MiniLM on movie reviews (for your own files, use --train_file, --validation_file and
--test_file):

    python examples/run_text_classification.py examples/recipes/movie_reviews.yaml

The options are those of Transformers' script and the settings of the mixing method (--num_mixed, --alpha, --attention,
...); --mixing METHOD --help shows them.
Options override those of a first argument that ends in .yaml or .json, an option file. See
docs/text.md for details.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainingArguments,
)

from mm_hf import Mixing, MultiMixTrainer
from mm_hf.cli import scripts
from mm_hf.cli.scripts import text as texts
from mm_hf.data import offline_docs
from mm_hf.data.adapters import add_lora, save_classes
from mm_hf.data.classes import class_name
from mm_hf.data.offline import OFFLINE_TEXTS
from mm_hf.data.options import LoraOptions
from mm_hf.data.splits import DataOptions, input_columns
from mm_hf.data.text import tokenize
from mm_hf.evaluation.files import write_text
from mm_hf.evaluation.metrics import load_metric

logger = logging.getLogger("mm_hf.examples")
OFFLINE = {**OFFLINE_TEXTS, **offline_docs.OFFLINE}
GLUE = "nyu-mll/glue"
TASKS = {  # text columns of the GLUE tasks
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
IGNORED = -100
REGRESSION, MULTI_LABEL, SINGLE_LABEL = "regression", "multi_label_classification", "single_label_classification"


@dataclass
class ModelArguments(LoraOptions, texts.ModelArguments):
    """Model to train, and LoRA adapter."""

    padding_side: Literal["right", "left"] | None = field(
        default=None, metadata={"help": "Padding side. Default: the tokenizer's."}
    )
    merge_lora: bool = field(
        default=False, metadata={"help": "Also save the merged model to OUTPUT_DIR/merged, which loads without PEFT."}
    )

    def __post_init__(self) -> None:
        texts.ModelArguments.__post_init__(self)
        self.check(self.model_name_or_path)
        if self.merge_lora and self.lora_r is None:
            raise ValueError("--merge_lora requires an adapter: give --lora_r, or remove --merge_lora.")


@dataclass
class DataTrainingArguments(scripts.DataArguments):
    """Texts to train on."""

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(TASKS)}."})
    dataset_name: str | None = field(
        default=None, metadata={"help": f"Hub name, or offline dataset: {', '.join(OFFLINE)}."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Training file with texts and labels: .csv or JSON lines."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation file in the same format."})
    test_file: str | None = field(default=None, metadata={"help": "File to predict, with or without labels."})
    text_column_names: list[str] | None = field(
        default=None,
        metadata={"help": "One or two columns with texts. Default: sentence1 and sentence2, or else the text columns."},
    )
    label_column_name: str = field(
        default="label", metadata={"help": "Column with classes, lists of classes, or floating-point numbers."}
    )
    do_regression: bool = field(default=False, metadata={"help": "Treat labels as numbers even if they are integers."})
    max_seq_length: int = field(
        default=128, metadata={"help": "Maximum number of word pieces; longer texts are truncated."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to --max_seq_length instead of the longest text of a batch."}
    )
    max_predict_samples: int | None = field(default=None, metadata={"help": "Maximum number of examples to predict."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASKS:
                raise ValueError(f"--task_name must be one of {', '.join(TASKS)}, but is {self.task_name!r}.")
            self.dataset_name, self.dataset_config_name = GLUE, self.task_name
            self.text_column_names = TASKS[self.task_name]
        elif self.dataset_name is None and self.train_file is None:
            raise ValueError(f"Give --task_name, --dataset_name (offline: {', '.join(OFFLINE)}) or --train_file.")
        if self.text_column_names is not None:  # Transformers' script separates them by commas
            self.text_column_names = [name for part in self.text_column_names for name in part.split(",")]
        texts.check_files(self)


def parse_arguments(
    arguments: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments, Mixing]:
    """Parse options or an option file, including the fields of the selected mixing method."""
    return scripts.parse_arguments(arguments, ModelArguments, DataTrainingArguments, description=__doc__)


# ---- Data ----


def load_data(data_args: DataTrainingArguments, model_args: scripts.ModelArguments, seed: int) -> DatasetDict:
    """Load the splits `train`, `validation` (for MNLI also `validation_mismatched`) and the splits to predict.

    Files replace the splits of a dataset.
    """
    data = DatasetDict()
    if data_args.dataset_name in OFFLINE:
        data = OFFLINE[data_args.dataset_name]()
    elif data_args.dataset_name is not None:
        data = scripts.load_from_hub(data_args, model_args)
    files = texts.load_files(data_args, model_args)
    to_predict = files.pop("test", None)  # train_and_validation must not use it for validation
    data = DatasetDict({**data, **files})
    scripts.check_columns(data, data_args, "label_column_name")
    if "validation_matched" in data:
        data["validation"] = data.pop("validation_matched")
    parts = scripts.train_and_validation(data, data_args, seed)
    if to_predict is not None:
        data["test"] = to_predict
    others = {"validation_mismatched": data_args.max_eval_samples}
    others |= {split: data_args.max_predict_samples for split in data if split.startswith("test")}
    for split, most in others.items():
        if split in data:
            parts[split] = data[split] if most is None else data[split].select(range(min(most, len(data[split]))))
    return parts


def text_columns(data: DatasetDict, data_args: DataTrainingArguments) -> list[str]:
    """Return the names of the one or two text columns."""
    pair = ["sentence1", "sentence2"]
    rows, names = data["train"], data_args.text_column_names
    if names is None and set(pair) <= set(rows.column_names):
        return pair
    return input_columns(rows, DataOptions(text_column_names=names), data_args.label_column_name)[1]


def problem_type(feature: Any, data_args: DataTrainingArguments) -> str:
    """Return the problem type of Transformers that fits the labels."""
    if data_args.do_regression or str(getattr(feature, "dtype", "")).startswith("float"):
        return REGRESSION
    return MULTI_LABEL if hasattr(feature, "feature") else SINGLE_LABEL


def prepare_labels(
    data: DatasetDict, data_args: DataTrainingArguments, model_args: scripts.ModelArguments
) -> tuple[DatasetDict, str, list[str]]:
    """Return the data with a column `labels`, the problem type, and the names of the classes.

    Splits to predict have no such column if their labels are not public (none, or all -1 as in GLUE).
    """
    label = data_args.label_column_name
    feature = data["train"].features[label]
    problem = problem_type(feature, data_args)
    labels = {split: rows[label] for split, rows in data.items() if label in rows.column_names}
    labels = {k: v for k, v in labels.items() if not k.startswith("test") or any(y not in (-1, None) for y in v)}
    if problem == REGRESSION:
        names, encoded = [label], {split: [float(y) for y in column] for split, column in labels.items()}
    else:
        names, encoded = encode_classes(labels, feature, problem == MULTI_LABEL, model_args)
    for split, rows in data.items():
        data[split] = rows.remove_columns([label] if label in rows.column_names else [])
        if split in encoded:
            data[split] = data[split].add_column("labels", encoded[split])
    return data, problem, names


def encode_classes(
    labels: dict[str, Any], feature: Any, multi_label: bool, model_args: scripts.ModelArguments
) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the names of the classes, and for each example the index of its class or a multi-hot vector."""
    lists = {split: column if multi_label else [[y] for y in column] for split, column in labels.items()}
    classes = getattr(feature, "feature", feature)
    if isinstance(classes, ClassLabel):
        found = dict(enumerate(classes.names))
    else:
        values = {y for column in lists.values() for row in column for y in row}
        found = {y: class_name(y) for y in sorted(values - {None})}
    names = known_classes(list(found.values()), model_args)
    index = {y: names.index(name) for y, name in found.items()}
    indices = {split: [[index[y] for y in row if y in index] for row in column] for split, column in lists.items()}
    if multi_label:
        one_hot = np.eye(len(names))
        return names, {s: [one_hot[row].sum(axis=0).clip(max=1).tolist() for row in c] for s, c in indices.items()}
    # Examples without a class are ignored.
    return names, {split: [row[0] if row else IGNORED for row in column] for split, column in indices.items()}


def known_classes(found: list[str], model_args: scripts.ModelArguments) -> list[str]:
    """Return the classes in the order of a pretrained model that has all of them, or else unchanged."""
    if model_args.model_name_or_path is None:
        return found
    known = AutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.hub).id2label
    return list(known.values()) if set(found) <= set(known.values()) else found


# ---- Model ----


def load_model(model_args: ModelArguments, names: list[str], problem: str) -> tuple[Any, Any]:
    """Load or create the model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path, **model_args.hub
    )
    if tokenizer.pad_token is None:  # common for decoders
        tokenizer.pad_token = tokenizer.eos_token
    if model_args.padding_side is not None:
        tokenizer.padding_side = model_args.padding_side
    settings = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    settings["vocab_size"] = len(tokenizer)
    model = scripts.load_model(AutoModelForSequenceClassification, model_args, names, "text-classification", **settings)
    model.config.problem_type = problem
    if model.config.pad_token_id is None:  # decoders need it to find the last token of a text
        model.config.pad_token_id = tokenizer.pad_token_id
    if model_args.lora_r is not None:
        model = add_lora(model, model_args, "text")
    return model, tokenizer


# ---- Metrics and predictions ----


def metrics_of(problem: str, task: str | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` function for a problem type and a GLUE task."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    metric = load_metric("classification")

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = _logits(prediction.predictions), np.asarray(prediction.label_ids)
        if problem == REGRESSION:
            numbers = logits.reshape(labels.shape)
            found = {
                "mse": ((numbers - labels) ** 2).mean(),
                "pearson": pearsonr(numbers, labels).statistic,
                "spearman": spearmanr(numbers, labels).statistic,
            }
        elif problem == MULTI_LABEL:
            predicted = logits > 0
            found = {
                "micro_f1": f1_score(labels, predicted, average="micro", zero_division=0),
                "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0),
                "subset_accuracy": (predicted == labels).all(axis=1).mean(),
            }
        else:
            found = metric.compute(predictions=logits, references=labels)
            if task in ("mrpc", "qqp"):
                found["f1"] = f1_score(labels, logits.argmax(axis=-1))
            elif task == "cola":
                found["matthews_correlation"] = matthews_corrcoef(labels, logits.argmax(axis=-1))
        return {name: float(value) for name, value in found.items()}

    return compute


def predict(trainer: MultiMixTrainer, data: DatasetDict, problem: str, names: list[str]) -> None:
    """Write the predictions of each test split to `predict_results.txt`, and metrics if there are labels."""
    for split in (split for split in data if split.startswith("test")):
        found = trainer.predict(data[split], metric_key_prefix="predict")
        kind = split.removeprefix("test")
        if "labels" in data[split].column_names:
            trainer.log_metrics(f"predict{kind}", found.metrics)
            trainer.save_metrics(f"predict{kind}", found.metrics)
        if trainer.is_world_process_zero():
            predictions = _predicted_labels(found, problem, names)
            lines = ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(predictions))]
            file = Path(str(trainer.args.output_dir)) / f"predict_results{kind}.txt"
            write_text(file, "\n".join(lines) + "\n")


def save_merged(trainer: MultiMixTrainer, tokenizer: Any) -> None:
    """Merge the adapter into the base model, and save the model and its tokenizer to `merged`."""
    if not trainer.is_world_process_zero():
        return
    if trainer.mixing_handle is not None:
        trainer.mixing_handle.remove()
    directory = str(Path(str(trainer.args.output_dir)) / "merged")
    trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _logits(predictions: Any) -> np.ndarray:
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


def _predicted_labels(found: Any, problem: str, names: list[str]) -> list[str]:
    logits = _logits(found.predictions)
    if problem == REGRESSION:
        return [f"{number:.3f}" for number in logits.reshape(-1)]
    if problem == MULTI_LABEL:
        return [",".join(name for name, score in zip(names, row) if score > 0) for row in logits]
    return [names[i] for i in logits.argmax(axis=-1)]


@scripts.reports_errors
def main() -> None:
    """Train and save the model, evaluate it, predict, and write a model card or push to the Hub."""
    model_args, data_args, training_args, mixing = parse_arguments(sys.argv[1:])
    scripts.set_up(training_args, mixing)

    data = load_data(data_args, model_args, training_args.seed)
    if training_args.do_predict and not any(split.startswith("test") for split in data):
        raise ValueError("--do_predict requires a test split: give --test_file, or a dataset with a test split.")
    columns = text_columns(data, data_args)
    data, problem, names = prepare_labels(data, data_args, model_args)
    logger.info("%s of %s from %s", problem, ", ".join(names), ", ".join(columns))
    model, tokenizer = load_model(model_args, names, problem)
    positions = getattr(model.config, "max_position_embeddings", None)
    length = min(n for n in (data_args.max_seq_length, tokenizer.model_max_length, positions) if n is not None)
    needed = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    used = tuple(split for split, is_needed in needed.items() if is_needed)
    options = {"tokenizer": tokenizer, "max_length": length, "pad_to_max_length": data_args.pad_to_max_length}
    data = DatasetDict(
        {
            split: tokenize(rows, columns, "labels" if "labels" in rows.column_names else None, **options)
            for split, rows in data.items()
            if split.startswith(used)
        }
    )
    evaluated: Any = data.get("validation")
    if "validation_mismatched" in data:
        evaluated = {"matched": data["validation"], "mismatched": data["validation_mismatched"]}

    trainer = MultiMixTrainer(
        model=model,
        args=training_args,
        mixing=mixing,
        train_dataset=data.get("train"),
        eval_dataset=evaluated,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics_of(problem, data_args.task_name),
        processing_class=tokenizer,
    )
    card = scripts.card_arguments(
        "text-classification",
        model_args.finetuned_from,
        data_args.task_name or data_args.dataset_name or data_args.train_file,
        data_args.dataset_name,
        OFFLINE,
    )
    scripts.train_and_evaluate(trainer, card)
    if model_args.lora_r is not None and training_args.do_train:
        save_classes(trainer)
    if training_args.do_predict:
        predict(trainer, data, problem, names)
    if model_args.merge_lora:
        save_merged(trainer, tokenizer)


if __name__ == "__main__":
    main()
