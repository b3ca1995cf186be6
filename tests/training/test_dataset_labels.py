"""Labels of a dataset that do not fit are reported before training, with the row and the remedy."""

import datasets
import pytest
import torch
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator

from mm_hf import MultiMix, MultiMixTrainer
from mm_hf.training.dataset_labels import check_dataset_labels, read_labels
from tests.helpers import digits, models


def rows(labels, name="label"):
    images = torch.randn(len(labels), 3, 32, 32).tolist()
    return [{"pixel_values": image, name: label} for image, label in zip(images, labels, strict=True)]


def table(labels, name="label", feature=None):
    data = datasets.Dataset.from_dict({"pixel_values": [[[0.0]]] * len(labels), name: labels})
    return data if feature is None else data.cast_column(name, feature)


ERRORS = {
    "strings": (["cat", "dog"], {}, "are strings, and that of row 0 is 'cat'.*class_encode_column"),
    "None first": ([None, 1, 2], {}, "label of row 0 is None.*-100"),
    "None later": ([1, 2, None], {}, "label of row 2 is None"),
    "-1": ([0, 1, -1], {}, "Label -1 does not fit"),
    "too large": ([0, 5], {}, "Label 5 does not fit ViTForImageClassification with 5 labels"),
    "class numbers as floats": ([0.0, 1.0], {}, "Give class indices as integers"),
    "NaN": ([0.5, float("nan")], {"num_labels": 1}, "a label is nan"),
    "multi-label": ([0, 1], {"problem_type": "multi_label_classification"}, "labels have the shape"),
}


@pytest.mark.parametrize("name", ["label", "labels", "label_ids"])
@pytest.mark.parametrize("make", [rows, table], ids=["list", "dataset"])
@pytest.mark.parametrize(("labels", "config", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_invalid_labels_are_reported_before_training(make, labels, config, message, name):
    with pytest.raises(ValueError, match=message):
        check_dataset_labels(make(labels, name), models.build("vit", **config), default_data_collator)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.make((torch.randn(1, 8, 8), index))


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [
        (torch.utils.data.TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8)), "tuple"),
        (Pairs(tuple), "tuple"),
        (Pairs(list), "list"),
        (Pairs(lambda pair: pair[0]), "Tensor"),
        (torch.utils.data.Subset(Pairs(tuple), [0, 1, 2, 3]), "tuple"),
        ([(torch.randn(1, 8, 8), i) for i in range(8)], "tuple"),
    ],
)
def test_examples_without_names_are_rejected_before_training(dataset, kind, tmp_path):
    def trainer(**options):
        args = digits.arguments(tmp_path, max_steps=1, per_device_train_batch_size=4)
        return MultiMixTrainer(digits.vit(), args, train_dataset=dataset, mixing=MultiMix(num_mixed=4), **options)

    with pytest.raises(ValueError, match=f"The training data have a {kind} for each example: give a data_collator"):
        trainer().train()
    with pytest.raises(ValueError, match="data_collator returns a tuple: let it return a dictionary"):
        trainer(data_collator=lambda pairs: (torch.zeros(4, 1, 8, 8), torch.arange(4))).train()
    collate = lambda pairs: {"pixel_values": torch.zeros(4, 1, 8, 8), "labels": torch.arange(4)}  # noqa: E731
    assert trainer(data_collator=collate).train().global_step == 1


LENGTHS = {
    "shorter": (
        [[1.0, 0.0, 1.0], [0.0, 1.0], [1.0]],
        "have 3 entries in row 0 and 2 in row 1: give one entry for each",
    ),
    "longer": ([[1, 0], [0, 1], [1, 0, 0]], "have 2 entries in row 0 and 3 in row 2"),
    "empty": ([[1, 0], []], "have 2 entries in row 0 and 0 in row 1"),
    "None": ([[1, 0], None], "label of row 1 is None"),
}


@pytest.mark.parametrize("make", [rows, table], ids=["list", "dataset"])
@pytest.mark.parametrize(("labels", "message"), LENGTHS.values(), ids=LENGTHS)
def test_lists_of_different_lengths_are_reported_before_training(make, labels, message):
    model = models.build("vit", num_labels=3, problem_type="multi_label_classification")
    for collator in (default_data_collator, DataCollatorWithPadding(None)):
        with pytest.raises(ValueError, match=message):
            check_dataset_labels(make(labels, "labels"), model, collator)
    check_dataset_labels(make(labels, "labels"), model, lambda examples: {})  # another collator may pad them


def test_labels_of_tokens_may_differ_in_length():
    tokens = DataCollatorForTokenClassification(None)
    check_dataset_labels(table([[1, 2], [0]], "labels"), models.build("bert"), tokens)


@pytest.mark.parametrize("labels", [[0, 4, -100], [True, False]])
@pytest.mark.parametrize("make", [rows, table], ids=["list", "dataset"])
def test_valid_labels_are_accepted(make, labels):
    check_dataset_labels(make(labels), models.build("vit"), DataCollatorWithPadding(None))


def test_names_of_classes_that_the_data_lack_are_accepted():
    """A filtered dataset keeps the names of all classes."""
    names = datasets.ClassLabel(names=[f"class {i}" for i in range(9)])
    data = table([0, 1, 7, 8, 4], feature=names)
    model = models.build("vit")
    check_dataset_labels(data.filter(lambda row: row["label"] < 5), model, default_data_collator)
    with pytest.raises(ValueError, match="9 classes in its column 'label'.*num_labels=9"):
        check_dataset_labels(data, model, default_data_collator)


def test_single_class_with_one_output_is_no_regression():
    one = table([0, 0], feature=datasets.ClassLabel(names=["only"]))
    with pytest.raises(ValueError, match="a single class in its column 'label', 'only'.*at least 2 classes"):
        check_dataset_labels(one, models.build("vit", num_labels=1), default_data_collator)
    check_dataset_labels(table([0, 7]), models.build("vit", num_labels=1), default_data_collator)  # integers to regress


def test_labels_that_a_collator_or_a_transform_converts_are_accepted():
    check_dataset_labels(rows(["cat", None]), models.build("vit"), lambda examples: {})
    data = table(["cat", "dog"]).with_transform(lambda batch: {"labels": [0] * len(batch["label"])})
    check_dataset_labels(data, models.build("vit"), default_data_collator)
    assert read_labels(table([0, 1]).to_iterable_dataset()) == (None, [])


COLLATORS = {
    "multi-hot": (
        lambda examples: {"labels": torch.eye(5)[[row["label"] for row in examples]]},
        {"problem_type": "multi_label_classification"},
        [0, 4],
    ),
    "from 0": (lambda examples: {"labels": torch.tensor([row["label"] - 1 for row in examples])}, {}, [1, 5]),
    "groups": (lambda examples: {"labels": torch.tensor([row["label"] // 10 for row in examples])}, {}, [10, 49]),
}


@pytest.mark.parametrize("make", [rows, table])
@pytest.mark.parametrize("name", COLLATORS)
def test_class_indices_that_a_collator_converts_are_accepted(name, make):
    collator, config, labels = COLLATORS[name]
    check_dataset_labels(make(labels), models.build("vit", **config), collator)


@pytest.mark.parametrize("make", [rows, table])
def test_class_indices_that_a_collator_keeps_are_checked(make):
    def collator(examples):
        return {"pixel_values": torch.zeros(len(examples), 1), "labels": torch.tensor([r["label"] for r in examples])}

    check_dataset_labels(make([0, 1, 2, 3, 4]), models.build("vit"), collator)
    with pytest.raises(ValueError, match="Label 5 does not fit"):
        check_dataset_labels(make([0, 1, 2, 3, 4, 5]), models.build("vit"), collator)


class Strings(torch.utils.data.Dataset):
    """A dataset that only its rows describe."""

    def __init__(self, label):
        self.label = label

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"pixel_values": torch.zeros(1, 16, 16), **({} if self.label is None else {"label": self.label})}


@pytest.mark.parametrize(
    ("label", "message"),
    [("cat", "strings, and that of row 0 is 'cat'"), (None, "has no labels.*first row has 'pixel_values'")],
)
def test_mini_batches_without_labels_name_the_cause(tmp_path, label, message):
    args = digits.arguments(tmp_path, max_steps=1)
    trainer = MultiMixTrainer(digits.vit(), args, mixing=MultiMix(num_mixed=5), train_dataset=Strings(label))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_collator_of_a_user_is_not_called_for_valid_labels():
    calls = []
    check_dataset_labels(table([0, 1, 2]), models.build("vit"), calls.append)
    assert not calls
