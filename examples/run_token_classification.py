# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.20",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.7",
# ]
# ///
r"""Fine-tune a token classification model of Transformers (named entities, parts of speech) with Dense MultiMix.

With a dataset from the Hub:

    python examples/run_token_classification.py --model_name_or_path google-bert/bert-base-cased \
        --dataset_name conll2003 --mixing dense_multimix --do_train --do_eval --output_dir outputs/conll2003

Offline, fine-tune a pretrained MiniLM on the source code of Python's standard library (for your own files, use
--train_file):

    python examples/run_token_classification.py examples/recipes/stdlib_tokens.yaml

The options are those of Transformers' script and the settings of the mixing method (--num_mixed, --alpha, --attention,
...); --mixing METHOD --help shows them.
Options override those of a first argument that ends in .yaml or .json, an option file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, DatasetDict, List, Value
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    TrainingArguments,
)

from mm_hf import Mixing, MultiMixTrainer
from mm_hf.cli import scripts
from mm_hf.cli.scripts.text import ModelArguments, check_files, load_files
from mm_hf.data.offline_tokens import OFFLINE

IGNORED = -100


@dataclass
class DataTrainingArguments(scripts.DataArguments):
    """Texts to train on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"Hub name, or offline dataset: {', '.join(OFFLINE)}."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training file: JSON lines with lists of tokens and tags, or a .csv with both separated by spaces."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation file in the same format."})
    text_column_name: str = field(default="tokens", metadata={"help": "Column with the tokens."})
    label_column_name: str = field(default="ner_tags", metadata={"help": "Column with the tags."})
    max_seq_length: int = field(
        default=128, metadata={"help": "Maximum number of word pieces; longer texts are truncated."}
    )
    label_all_tokens: bool = field(
        default=False, metadata={"help": "Label all word pieces of a token, not only the first."}
    )
    return_entity_level_metrics: bool = field(
        default=False, metadata={"help": "Report precision, recall and F1 of each entity type, too."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None:
            raise ValueError(f"Give --dataset_name (offline: {', '.join(OFFLINE)}) or --train_file.")
        check_files(self)


def parse_arguments(
    arguments: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments, Mixing]:
    """Parse options or an option file, including the fields of the selected mixing method."""
    return scripts.parse_arguments(arguments, ModelArguments, DataTrainingArguments, description=__doc__)


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments, seed: int) -> DatasetDict:
    """Load the splits `train` and `validation` with tags as class indices."""
    if data_args.dataset_name in OFFLINE:
        data = OFFLINE[data_args.dataset_name]()
    elif data_args.dataset_name is not None:
        data = scripts.load_from_hub(data_args, model_args)
    else:
        data = load_files(data_args, model_args)
    text, label = data_args.text_column_name, data_args.label_column_name
    scripts.check_columns(data, data_args, "text_column_name", "label_column_name")
    if isinstance(data["train"].features[text], Value):  # a .csv
        data = data.map(lambda row: {text: row[text].split(), label: row[label].split()})
    features = data["train"].features.copy()
    if not isinstance(features[label].feature, ClassLabel):
        tags = sorted({tag for split in data.values() for row in split[label] for tag in row})
        features[label] = List(ClassLabel(names=[str(tag) for tag in tags]))
        data = data.map(lambda row: {label: [tags.index(tag) for tag in row[label]]}, features=features)
    return scripts.train_and_validation(data, data_args, seed)


def align(
    tokenizer: Any, data_args: DataTrainingArguments, names: list[str]
) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """Return a function that tokenizes a batch of rows and labels its word pieces, with -100 for no label."""
    # Further word pieces of a token labeled B-TYPE are labeled I-TYPE.
    inside = {f"B-{name[2:]}": i for i, name in enumerate(names) if name.startswith("I-")}
    following = [inside.get(name, i) for i, name in enumerate(names)]

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            rows[data_args.text_column_name],
            is_split_into_words=True,
            truncation=True,
            max_length=data_args.max_seq_length,
        )
        encoded["labels"] = []
        for i, tags in enumerate(rows[data_args.label_column_name]):
            words = encoded.word_ids(i)
            labels = []
            for before, word in zip([None, *words], words):
                if word is None:
                    labels.append(IGNORED)
                elif word != before:
                    labels.append(tags[word])
                else:
                    labels.append(following[tags[word]] if data_args.label_all_tokens else IGNORED)
            encoded["labels"].append(labels)
        return encoded

    return tokenize


def most_likely(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Convert logits to classes, so that evaluation stores one number per word piece."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def entity_metrics(names: list[str], of_each: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` function: entity metrics of seqeval and the accuracy of tokens."""
    from seqeval.metrics import accuracy_score, classification_report

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        valid = np.asarray(prediction.label_ids) != IGNORED
        true, predicted = (
            [[names[i] for i in row[mask]] for row, mask in zip(np.asarray(classes), valid)]
            for classes in (prediction.label_ids, prediction.predictions)
        )
        report = classification_report(true, predicted, output_dict=True, zero_division=0)
        overall = report["micro avg"]
        metrics = {
            "precision": overall["precision"],
            "recall": overall["recall"],
            "f1": overall["f1-score"],
            "accuracy": accuracy_score(true, predicted),
        }
        if of_each:
            for kind, values in report.items():
                if not kind.endswith(" avg"):
                    metrics |= {f"{kind}_{name.replace('-score', '')}": value for name, value in values.items()}
        return {name: float(value) for name, value in metrics.items()}

    return compute


def load_model(model_args: ModelArguments, names: list[str]) -> tuple[Any, Any]:
    """Load or create the model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path, add_prefix_space=True, **model_args.hub
    )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not map word pieces to tokens: choose a fast tokenizer with "
            "--tokenizer_name."
        )
    settings = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = scripts.load_model(AutoModelForTokenClassification, model_args, names, "token-classification", **settings)
    return model, tokenizer


@scripts.reports_errors
def main() -> None:
    """Train and save the model, evaluate it, and write a model card or push to the Hub."""
    model_args, data_args, training_args, mixing = parse_arguments(sys.argv[1:])
    scripts.set_up(training_args, mixing)

    data = load_data(data_args, model_args, training_args.seed)
    names = data["train"].features[data_args.label_column_name].feature.names
    model, tokenizer = load_model(model_args, names)
    data = data.map(align(tokenizer, data_args, names), batched=True, remove_columns=data["train"].column_names)

    trainer = MultiMixTrainer(
        model=model,
        args=training_args,
        mixing=mixing,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=entity_metrics(names, data_args.return_entity_level_metrics),
        preprocess_logits_for_metrics=most_likely,
        processing_class=tokenizer,
    )
    card = scripts.card_arguments(
        "token-classification",
        model_args.finetuned_from,
        data_args.dataset_name or data_args.train_file,
        data_args.dataset_name,
        OFFLINE,
    )
    scripts.train_and_evaluate(trainer, card)


if __name__ == "__main__":
    main()
