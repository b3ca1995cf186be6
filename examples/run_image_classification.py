# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.20",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.7",
# ]
# ///
r"""Fine-tune an image classification model of Transformers with MultiMix or Dense MultiMix.

With a dataset from the Hub:

    python examples/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name beans --image_column_name image --label_column_name labels --mixing dense_multimix \
        --do_train --do_eval --output_dir outputs/beans

Offline, train a small ViT from scratch on digits or fashion_mnist (for your own images, use --train_dir):

    python examples/run_image_classification.py examples/recipes/fashion_mnist.yaml

The options are those of Transformers' script and the settings of the mixing method (--num_mixed, --alpha, --attention,
...); --mixing METHOD --help shows them.
Options override those of a first argument that ends in .yaml or .json, an option file.
"""

from __future__ import annotations

import copy
import sys

from transformers import EvalPrediction, TrainingArguments

from mm_hf import Mixing, MultiMixTrainer
from mm_hf.cli import scripts
from mm_hf.cli.scripts.images import DataTrainingArguments, ModelArguments, load_data, load_model
from mm_hf.data.images import ImageTransform
from mm_hf.data.models import num_channels
from mm_hf.data.offline import OFFLINE_IMAGES
from mm_hf.evaluation.metrics import load_metric


def parse_arguments(
    arguments: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments, Mixing]:
    """Parse options or an option file, including the fields of the selected mixing method."""
    return scripts.parse_arguments(arguments, ModelArguments, DataTrainingArguments, description=__doc__)


@scripts.reports_errors
def main() -> None:
    """Train and save the model, evaluate it, and write a model card or push to the Hub."""
    model_args, data_args, training_args, mixing = parse_arguments(sys.argv[1:])
    scripts.set_up(training_args, mixing)

    data = load_data(data_args, model_args, training_args.seed)
    names = data["train"].features[data_args.label_column_name].names
    model, processor = load_model(model_args, names)
    channels = num_channels(model.config)
    # The transform reads the images of each batch and needs columns that the model does not accept.
    training_args = copy.copy(training_args)
    training_args.remove_unused_columns = False
    columns = (data_args.image_column_name, data_args.label_column_name)
    for split, rows in data.items():
        transform = ImageTransform(
            processor,
            *columns,
            augmentation=data_args.augmentation,
            num_channels=channels,
            train=split == "train",
        )
        rows.set_transform(transform)

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
        compute_metrics=compute_metrics,
        processing_class=processor,
    )
    card = scripts.card_arguments(
        "image-classification",
        model_args.model_name_or_path,
        data_args.dataset_name or data_args.train_dir,
        data_args.dataset_name,
        OFFLINE_IMAGES,
        "vision",
    )
    scripts.train_and_evaluate(trainer, card)


if __name__ == "__main__":
    main()
