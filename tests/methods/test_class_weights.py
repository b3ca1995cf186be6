"""Class weights of every method, against literal losses, PyTorch's weighted cross-entropy, and scikit-learn."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import HfArgumentParser, Trainer, ViTConfig, ViTForImageClassification

from mm_hf import (
    ERM,
    CutMix,
    DenseMultiMix,
    InputMixing,
    Mixing,
    Mixup,
    MultiMix,
    MultiMixTrainer,
    get_method,
    wrap_model,
)
from mm_hf.data.images import ImageDataset
from mm_hf.functional import clean_loss, weight_targets
from mm_hf.locations import LocationOutput
from mm_hf.methods import METHODS, balanced_weights, default_methods, terms
from mm_hf.training.dataset_labels import iterate_labels
from tests.functional import literal
from tests.helpers import digits, models

WEIGHTS = [0.5, 4.0, 0.0, 1.0, 2.0]
LABELS = torch.tensor([0, 1, 2, 3, -100, 4])


def mix(images, labels):
    return images.lerp(images.flip(0), 0.3), labels, labels.flip(0), 0.7


def method_of(name, weights=WEIGHTS):
    settings = {"align_mixup": {"unaligned_prob": 0.0}, "recursivemix": {"consistency_weight": 0.0}}
    settings["input_mixing"] = {"function": mix}
    return get_method(name)(class_weights=weights, **settings.get(name, {}))


@pytest.mark.parametrize("labels", [LABELS, torch.rand(6, 5).softmax(1)], ids=["indices", "probabilities"])
@pytest.mark.parametrize("scale", [1, 1e3])
def test_weighted_targets_give_pytorchs_weighted_cross_entropy(labels, scale):
    logits, weights = torch.randn(6, 5), scale * torch.tensor(WEIGHTS)
    found = clean_loss(logits, weight_targets(labels, weights))
    if labels.is_floating_point():  # PyTorch divides by the number of examples, not by the sum of their weights
        expected = F.cross_entropy(logits, labels, weight=weights, reduction="sum") / (labels * weights).sum()
    else:
        expected = F.cross_entropy(logits, labels, weight=weights)
    torch.testing.assert_close(found, expected)


def literal_loss(logits, targets):
    """Sum the weighted cross-entropy of each example and class, and divide by the sum of the weights."""
    total, mass = 0.0, 0.0
    log_p = logits.double().log_softmax(dim=1)
    for i in range(len(targets)):
        for c, weight in enumerate(WEIGHTS):
            total = total - weight * float(targets[i, c]) * log_p[i, c]
            mass += weight * float(targets[i, c])
    return total / mass


@pytest.mark.parametrize(
    "name", ["erm", "mixup", "cutmix", "zeta_mixup", "input_mixing", "manifold_mixup", "align_mixup", "recursivemix"]
)
def test_loss_is_that_of_the_mixed_targets_with_weights(name):
    model, images = models.build("vit"), models.batch("vit")
    with wrap_model(model, method_of(name), example_inputs={**images, "labels": LABELS}) as handle:
        torch.manual_seed(3)
        model.training = True
        output = model(**images, labels=LABELS)
        model.training = False
        torch.manual_seed(3)
        copied = handle.mixing.for_batch(images, LABELS)
        _, targets = copied.mix_inputs(dict(images), LABELS, model)
        if name == "erm":
            targets = F.one_hot(LABELS.clamp(min=0), 5) * (LABELS >= 0)[:, None]
        torch.testing.assert_close(output.loss.double(), literal_loss(output.logits, targets), rtol=1e-5, atol=1e-6)


def test_regmixup_weighs_both_halves():
    model, images = models.build("vit"), models.batch("vit")
    with wrap_model(model, method_of("regmixup")):
        torch.manual_seed(3)
        model.training = True
        output = model(**images, labels=LABELS)
        model.training = False
        torch.manual_seed(3)
        _, targets = method_of("regmixup").mix_inputs(dict(images), LABELS, model)
    expected = sum(literal_loss(output.logits[half], targets[half]) for half in (slice(0, 6), slice(6, 12)))
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("local", [False, True], ids=["label per example", "label per location"])
def test_multimix_multiplies_the_factors_of_the_examples_by_the_weights(monkeypatch, local, smoothing):
    generator = torch.Generator().manual_seed(0)
    b, r, c, n = 6, 3, 5, 7
    factors = torch.rand(b, n, generator=generator).softmax(dim=0)
    monkeypatch.setattr(MultiMix, "sample", lambda self, *args: factors)
    monkeypatch.setattr(terms, "sample_permutations", lambda r, b, **more: torch.arange(b).expand(r, b).contiguous())
    attention = torch.rand(b, r, generator=generator)
    logits = torch.randn(b, r, c, generator=generator)
    pooled = logits if local else torch.randn(b, c, generator=generator)
    labels = torch.randint(c, (b, r), generator=generator) if local else LABELS
    weights = torch.tensor(WEIGHTS)
    weighted = weight_targets(labels, weights)
    output = LocationOutput(pooled, logits, None, attention)
    output.labels = weighted if local else None
    method = DenseMultiMix(class_weights=WEIGHTS, pooled_weight=0.0 if local else 1.0, clean_weight=0.5)
    result = method.loss(output, weighted, label_smoothing=smoothing)
    of_example = weights[labels.clamp(min=0)] * (labels >= 0)
    shared = factors.double().expand(r, b, n)
    confidence = (attention * (of_example if local else of_example[:, None])).double()
    dense = literal.dense_multimix(logits.double(), labels, confidence, shared, smoothing, local_labels=local)
    torch.testing.assert_close(result.logs["loss_dense"].double(), dense, rtol=1e-5, atol=1e-6)
    if not local:
        single = literal.dense_multimix(
            pooled[:, None].double(), labels, of_example[:, None].double(), shared[:1], smoothing
        )
        torch.testing.assert_close(result.logs["loss_pooled"].double(), single, rtol=1e-5, atol=1e-6)
    if not smoothing:
        clean = F.cross_entropy(pooled.flatten(0, -2), labels.flatten(), weight=weights)
        torch.testing.assert_close(result.logs["loss_clean"], clean)


@pytest.mark.parametrize("name", [*sorted(default_methods()), "input_mixing"])
def test_equal_weights_change_nothing_and_a_class_of_weight_0_has_no_influence(name):
    """Of every method; the second statement for methods that mix nothing into the other examples."""

    def loss(weights, labels):
        model, images = models.build("vit"), models.batch("vit")
        with wrap_model(model, method_of(name, weights), example_inputs={**images, "labels": labels}):
            for _ in range(2):  # RecursiveMix needs an earlier mini-batch
                torch.manual_seed(5)
                model.training = True
                found = model(**images, labels=labels).loss
                model.training = False
            return found

    labels = LABELS.clamp(min=0)
    torch.testing.assert_close(loss([3.0] * 5, labels), loss(None, labels))
    torch.testing.assert_close(loss([2.0 * w for w in WEIGHTS], labels), loss(WEIGHTS, labels))
    assert not torch.isclose(loss(WEIGHTS, labels), loss(None, labels), rtol=1e-4)


def test_weights_apply_to_mini_batches_with_input_mixing():
    model, images = models.build("vit"), models.batch("vit")
    method = DenseMultiMix(class_weights=WEIGHTS, input_mixing="mixup", input_mixing_prob=1.0, input_mixing_start=0)
    with wrap_model(model, method, example_inputs={**images, "labels": LABELS}):
        torch.manual_seed(3)
        model.training = True
        output = model(**images, labels=LABELS)
        model.training = False
        torch.manual_seed(3)
        _, targets = method.for_batch(images, LABELS).mix_inputs(dict(images), LABELS, model)
    torch.testing.assert_close(output.loss.double(), literal_loss(output.logits, targets), rtol=1e-5, atol=1e-6)


def test_memory_of_recursivemix_has_targets_without_weights():
    model, images = models.build("vit").train(), models.batch("vit")
    with wrap_model(model, method_of("recursivemix")) as handle:
        for _ in range(3):
            model(**images, labels=models.labels())
        torch.testing.assert_close(handle.state_dict()["targets"].sum(dim=1), torch.ones(6))


# ---- The trainer, and "balanced" ----


def imbalanced():
    return digits.dataset(0, 96).filter(lambda row: row["label"] in (0, 1, 7) or row["writer"].endswith("1"))


def test_erm_with_balanced_weights_equals_trainer_with_a_weighted_loss(tmp_path):
    train = imbalanced()
    labels = train.with_format(None)["label"]
    weights = torch.ones(10)
    present = np.unique(labels)
    weights[torch.tensor(present)] = torch.tensor(compute_class_weight("balanced", classes=present, y=labels)).float()
    assert len(set(weights.tolist())) > 2

    def weighted(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels, weight=weights)

    ours = digits.run(tmp_path, train=train, trainer_args={"mixing": ERM(class_weights="balanced")})
    plain = digits.run(tmp_path, Trainer, train=train, trainer_args={"compute_loss_func": weighted})
    ours.train()
    plain.train()
    assert digits.losses(ours) == pytest.approx(digits.losses(plain), rel=1e-5)
    # The gradient of the keys' bias is 0 but for rounding, which Adam scales up.
    digits.same_weights(digits.weights(ours.model), digits.weights(plain.model), rtol=1e-4, atol=1e-4)
    found = torch.tensor(ours.mixing_handle.mixing.class_weights)
    torch.testing.assert_close(found[torch.tensor(present)], weights[torch.tensor(present)])
    assert ours.mixing.class_weights == "balanced"  # what is saved


@pytest.mark.parametrize(
    "labels", [[0, 0, 1, 3, 3, 3], [[0, 1, -100], [0, 0], [3, -100]], torch.tensor([2, 2, 0, -100])]
)
def test_balanced_weights_are_those_of_scikit_learn(labels):
    flat = np.concatenate([np.ravel(label) for label in labels])
    flat = flat[flat != -100]
    found, present = balanced_weights(labels, 5), np.unique(flat)
    np.testing.assert_allclose(np.array(found)[present], compute_class_weight("balanced", classes=present, y=flat))
    assert all(weight == 0 for c, weight in enumerate(found) if c not in present)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        torch.rand(())  # as an augmentation does
        return self.rows[i]


def test_labels_are_read_from_datasets_of_every_kind():
    rows = [{"pixel_values": torch.zeros(1, 8, 8), "labels": i % 3} for i in range(7)]
    plain = Dataset.from_dict({"x": list(range(7)), "label": [i % 3 for i in range(7)]})
    changed = plain.with_transform(lambda batch: {"labels": [2 - y for y in batch["label"]]})
    tokens = Dataset.from_dict({"labels": [[0, 1], [2, -100]]})
    torch.manual_seed(0)
    expected = [i % 3 for i in range(7)]
    assert list(iterate_labels(rows)) == list(iterate_labels(plain)) == list(iterate_labels(Rows(rows))) == expected
    assert list(iterate_labels(changed)) == [2 - y for y in expected]
    assert list(iterate_labels(tokens)) == [[0, 1], [2, -100]]
    after = torch.rand(())
    torch.manual_seed(0)
    assert after == torch.rand(())  # reading the rows draws no random numbers
    transform = type("Transform", (), {"random": True, "columns": ("image", "label")})()
    assert list(iterate_labels(ImageDataset(plain, transform))) == expected
    with pytest.raises(ValueError, match="whose labels can be read ahead, and got IterableDataset: give one number"):
        list(iterate_labels(plain.to_iterable_dataset()))
    with pytest.raises(ValueError, match="needs labels, and row 0 has only pixel_values"):
        list(iterate_labels(Rows([{"pixel_values": 1}])))


# ---- Settings and errors ----


def test_custom_methods_have_class_weights_and_keep_their_fields():
    @dataclass
    class Custom(ERM):
        name = "custom_of_class_weights"
        scale: float = None  # computed later
        table: dict = field(default_factory=dict)

    try:
        assert Custom(class_weights=[1, 2]).class_weights == (1.0, 2.0) and Custom().scale is None
        with pytest.raises(ValueError, match="scale must be a number, got 'x'"):
            Custom(scale="x")
    finally:
        del METHODS["custom_of_class_weights"]


def test_weights_survive_json_and_are_parsed():
    for name in METHODS:
        for weights in ([1, 2.5], "balanced"):
            method = method_of(name, weights)
            restored = Mixing.from_dict(json.loads(json.dumps(method.to_dict())))
            assert restored == method != method_of(name, None) and restored.class_weights == method.class_weights
    assert "class_weights" not in Mixup().to_dict() and repr(Mixup()) == "Mixup(alpha=1.0)"
    for line, expected in (("--class_weights 1 2.5", (1.0, 2.5)), ("--class_weights balanced", "balanced")):
        for method in (ERM, Mixup, DenseMultiMix):
            (parsed,) = HfArgumentParser(method).parse_args_into_dataclasses(line.split())
            assert parsed.class_weights == expected
    assert Mixup(0.3, class_weights=torch.tensor([1, 2])).class_weights == (1.0, 2.0)


@pytest.mark.parametrize(
    "weights", ["focal", [], [0, 0], [1, -1], [float("nan"), 1], [True, 2], 3.0, [1, "balanced"], {}]
)
@pytest.mark.parametrize("method", [ERM, Mixup, CutMix, DenseMultiMix, lambda **w: InputMixing(mix, **w)])
def test_other_weights_are_rejected_with_one_sentence_on_losses_of_classes(method, weights):
    with pytest.raises(
        ValueError, match='class_weights must be "balanced" or one number .* Focal loss and other losses'
    ):
        method(class_weights=weights)


def test_custom_losses_are_rejected_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func cannot be combined .*class_weights .* focal loss"):
        MultiMixTrainer(digits.vit(), digits.arguments(tmp_path), compute_loss_func=lambda *a: None)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (Mixup(class_weights=[1, 2]), {}, "class_weights has 2 numbers, and ViTForImageClassification has 5 labels"),
        (Mixup(class_weights=WEIGHTS), {"problem_type": "multi_label_classification"}, "is trained by binary"),
        (Mixup(class_weights="balanced"), {}, r"give wrap_model the numbers, mm_hf.methods.balanced_weights\(labels"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_the_model_are_rejected_before_training(method, changes, message):
    model = models.build("vit", **changes).train()
    labels = torch.rand(6, 5) if changes else models.labels()
    with pytest.raises(ValueError, match=message):
        wrap_model(model, method, example_inputs={**models.batch("vit"), "labels": labels})
    assert "forward" not in model.__dict__
    with pytest.raises(ValueError, match="confidence_weighted must be True, got False"):
        DenseMultiMix(class_weights=WEIGHTS, confidence_weighted=False)


def test_balanced_weights_without_labels_are_an_error(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
    for data, message in ((None, "and got NoneType"), ([{"labels": 5}], "from 0 to 2, and a label .* is 5")):
        with pytest.raises(ValueError, match=message):
            MultiMixTrainer(
                ViTForImageClassification(config), digits.arguments(tmp_path), train_dataset=data,
                mixing=Mixup(class_weights="balanced"),
            )  # fmt: skip
