"""InputMixing: what mixing functions of other libraries return, their random numbers, and errors."""

import json
import random
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mm_hf import InputMixing, Mixing, MultiMixTrainer, wrap_model
from mm_hf.methods import default_methods, get_method
from mm_hf.methods.mixing_function import path_of, rank_random_state
from tests.helpers import digits, launch, models

augmentation = pytest.importorskip("kornia.augmentation")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # kornia's, of use_correct_lambda=False


class LikeTorchvision:
    """MixUp of torchvision.transforms.v2: the partner is the next example; returns class probabilities."""

    def __init__(self, num_classes):
        self.num_classes = num_classes

    def __call__(self, *inputs):
        images, labels = inputs
        assert labels.dtype == torch.int64 and labels.ndim == 1
        share = float(torch._sample_dirichlet(torch.tensor([1.0, 1.0]))[0])
        one_hot = F.one_hot(labels, self.num_classes).float()
        return images.roll(1, 0).mul(1 - share).add(images.mul(share)), one_hot.roll(1, 0).mul(1 - share).add(
            one_hot.mul(share)
        )


class LikeTimm:
    """timm.data.Mixup: changes the images in place, needs an even number, draws from NumPy and smooths labels."""

    def __init__(self, num_classes, smoothing=0.1):
        self.num_classes, self.smoothing = num_classes, smoothing

    def __call__(self, x, target):
        assert len(x) % 2 == 0, "Batch size should be even when using this"
        share = np.random.beta(0.8, 0.8)
        x.mul_(share).add_(x.flip(0).mul_(1 - share))
        off = self.smoothing / self.num_classes
        soft = torch.full((len(x), self.num_classes), off).scatter_(1, target[:, None], 1 - self.smoothing + off)
        return x, soft * share + soft.flip(0) * (1 - share)


def mixup_data(x, y):
    """Mix pairs as in the code of the authors of mixup."""
    share, index = np.random.beta(1.0, 1.0), torch.randperm(len(x))
    return share * x + (1 - share) * x[index], y, y[index], share


def keep_labels(x, y):
    return x + torch.rand(len(x), 1, 1, 1), y


def literal_targets(found, num_labels):
    """Return the targets of labels in each of the forms, one example at a time."""
    if isinstance(found, tuple):
        first, second, share = found
        return torch.stack(
            [
                share * F.one_hot(a, num_labels) + (1 - share) * F.one_hot(b, num_labels)
                for a, b in zip(first, second, strict=True)
            ]
        )
    if found.shape[1:] == (3,) and num_labels != 3:
        one_hot = torch.eye(num_labels)
        return torch.stack([(1 - w) * one_hot[int(a)] + w * one_hot[int(b)] for a, b, w in found])
    return found if found.ndim == 2 else F.one_hot(found, num_labels).float()


FUNCTIONS = {
    "torchvision": LikeTorchvision(5),
    "timm": LikeTimm(5),
    "authors": mixup_data,
    "labels kept": keep_labels,
    "kornia": augmentation.RandomMixUpV2(data_keys=["input", "class"]),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_loss_is_that_of_the_returned_inputs_and_labels(function):
    model, images, labels = models.build("vit"), models.batch("vit")["pixel_values"], models.labels()
    before = images.clone()
    torch.manual_seed(3)
    with rank_random_state(images.device):
        mixed, *found = function(images.clone(), labels)
    with torch.no_grad():
        logits = model(mixed).logits
    targets = literal_targets(found[0] if len(found) == 1 else tuple(found), 5)
    expected = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    with wrap_model(model, InputMixing(function)):
        torch.manual_seed(3)
        model.training = True
        loss = model(pixel_values=images, labels=labels).loss
        model.training = False
        assert torch.equal(images, before)
        torch.testing.assert_close(loss.detach(), expected.float())
        torch.testing.assert_close(model(images).logits, models.build("vit")(images).logits, rtol=0, atol=0)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("num_mix", [1, 2])
@pytest.mark.parametrize("num_labels", [3, 5])
def test_kornias_cutmix_weighs_labels_by_the_pixels_that_are_replaced(correct, num_mix, num_labels):
    """Image i is painted with i: the share of each example in each image is counted."""
    function = augmentation.RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=correct, num_mix=num_mix)
    model, labels = models.build("vit", num_labels=num_labels), torch.arange(8) % num_labels
    for seed in range(20):
        images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 40, 40)
        torch.manual_seed(seed)
        inputs, targets = InputMixing(function).mix_inputs({"pixel_values": images}, labels, model)
        counted = torch.stack([(inputs["pixel_values"] == j).float().mean(dim=(1, 2, 3)) for j in range(8)], dim=1)
        counted = counted @ F.one_hot(labels, num_labels).float()
        # The second cut is expected to replace the first one in proportion to its area.
        torch.testing.assert_close(targets, counted, rtol=0, atol=1e-6 if num_mix == 1 else 0.3)


def test_pairs_and_probabilities_of_three_classes_are_distinguished():
    model, labels = models.build("vit", num_labels=3), torch.tensor([0, 1, 2, 0, 1, 2])
    images = models.batch("vit")
    soft = torch.rand(6, 3).softmax(dim=1)
    for returned, expected in (
        (soft, soft),
        (torch.tensor([[0, 2, 0.25]] * 6), torch.tensor([[0.75, 0, 0.25]] * 6)),
        (torch.tensor([[2, 2, 0.0], [0, 0, 0]] * 3), F.one_hot(torch.tensor([2, 0] * 3), 3).float()),
    ):
        method = InputMixing(lambda x, y, returned=returned: (x, returned))
        torch.testing.assert_close(method.mix_inputs(images, labels, model)[1], expected)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_labels_of_other_problem_types_are_mixed(problem):
    model, images, labels = models.build("vit", problem_type=problem).train(), models.batch("vit"), torch.rand(6, 5)

    def mix(x, y):
        return x.lerp(x.flip(0), 0.25), y.lerp(y.flip(0), 0.25)

    with wrap_model(model, InputMixing(mix)):
        loss = model(**images, labels=labels).loss
    logits, targets = model(mix(images["pixel_values"], labels)[0]).logits, mix(labels, labels)[1]
    criterion = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    torch.testing.assert_close(loss, criterion(logits, targets))


def test_ignored_examples_keep_weight_zero():
    labels = torch.tensor([0, 1, -100, 3, 4, -100])
    _, targets = InputMixing(keep_labels).mix_inputs(models.batch("vit"), labels, models.build("vit"))
    assert targets.sum(dim=1).tolist() == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (LikeTorchvision(7), r"The model has 5 classes and the mini-batch 6 examples; it returned labels .* \(6, 7\)"),
        (lambda x, y: (x, F.one_hot(y % 3, 3) * 0.9 + 0.1 / 3), "no class indices. .* set num_classes"),
        (lambda x, y: x, "it returned torch.float32 of shape .* kornia's classes .* data_keys="),
        (augmentation.RandomMixUpV2(), 'data_keys=\\["input", "class"\\]'),
        (lambda x, y: (x[:3], y[:3]), r"must return floating-point inputs of 6 examples, got torch.float32 .*\(3, 3"),
        (lambda x, y: (x.long(), y), "must return floating-point inputs of 6 examples, got torch.int64"),
        (lambda x, y: (x, y, y), "it returned a tuple of .* and .* and"),
        (lambda x, y: (x, y, y, torch.ones(4)), "it returned labels a tuple of"),
        (lambda x, y: (x, [0] * 6), "it returned labels a list of int and int"),
        (lambda x, y: {}, "it returned dict"),
        (lambda x: x, "function raised TypeError for pixel_values .* takes 1 positional argument but 2 were given"),
        ("nowhere.at_all:mix", "'nowhere.at_all:mix' cannot be imported: No module named 'nowhere'. .* PYTHONPATH"),
        ("math:mix", "'math:mix' cannot be imported: module 'math' has no attribute 'mix'"),
        ("math:pi", "'math:pi' is not callable, but float"),
        ("LikeTimm()", "its import path, 'module:name', got 'LikeTimm\\(\\)'"),
    ],
)  # fmt: skip
def test_errors_name_what_the_function_returned_and_the_remedy(function, message):
    model = models.build("vit").train()
    with pytest.raises(ValueError, match=message), wrap_model(model, InputMixing(function)):
        model(**models.batch("vit"), labels=models.labels())


def test_function_must_be_callable_or_a_path_and_is_required():
    with pytest.raises(ValueError, match="function must be callable or its import path, 'module:name', got 3"):
        InputMixing(3)
    assert "input_mixing" not in default_methods() and get_method("input_mixing") is InputMixing


def test_odd_mini_batch_of_a_function_for_even_ones_names_the_remedy():
    model, b = models.build("vit").train(), 5
    with wrap_model(model, InputMixing(LikeTimm(5))), pytest.raises(ValueError, match="dataloader_drop_last=True"):
        model(**models.batch("vit", b=b), labels=models.labels(b))


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_inputs_that_are_no_single_signal_are_rejected_before_training(name):
    model = models.build(name).train()
    with pytest.raises(ValueError, match="InputMixing mixes one floating-point input, .* this batch has input_ids"):
        wrap_model(model, InputMixing(mixup_data), example_inputs={**models.batch(name), "labels": models.labels()})


def test_settings_are_an_import_path_or_a_description():
    method = InputMixing(mixup_data)
    assert method.to_dict() == {"method": "input_mixing", "function": f"{__name__}:mixup_data"}
    restored = Mixing.from_dict(json.loads(json.dumps(method.to_dict())))
    assert restored == method and isinstance(restored, InputMixing)
    model, images, labels = models.build("vit"), models.batch("vit"), models.labels()
    results = []
    for each in (method, restored):
        torch.manual_seed(0)
        results.append(each.mix_inputs(images, labels, model))
    torch.testing.assert_close(*results)
    assert re.fullmatch(r"<.*LikeTimm object>", path_of(LikeTimm(5)))  # no address: the same in each process
    assert path_of(LikeTimm) == f"{__name__}:LikeTimm" and InputMixing(LikeTimm(5)) != method


def test_random_numbers_come_from_the_global_generator_which_draws_on():
    model, images, labels = models.build("vit"), models.batch("vit"), models.labels()

    def draws():
        return torch.rand(()).item(), np.random.rand(), random.random()

    def function(x, y):
        return x + sum(draws()), y

    def seed():
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    found = []
    for _ in range(2):
        seed()
        mixed = [InputMixing(function).mix_inputs(images, labels, model)[0]["pixel_values"] for _ in range(2)]
        found.append((mixed, draws()))
        assert not torch.equal(*mixed)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    seed()
    _, numpy, python = draws()
    assert found[0][1][1:] == (numpy, python)  # one number was drawn from PyTorch's generator, and none from these


def test_the_function_is_shared_by_the_models():
    calls = []

    def function(x, y):
        calls.append(len(x))
        return x, y

    method, model = InputMixing(function), models.build("vit").train()
    with wrap_model(model, method):
        model(**models.batch("vit"), labels=models.labels())
    assert calls == [6]


def test_resumed_training_is_bit_identical(tmp_path):
    def trainer(directory, **more):
        function = LikeTimm(10)
        args = digits.arguments(directory, per_device_train_batch_size=16, save_strategy="steps", save_steps=3, **more)
        return MultiMixTrainer(
            digits.vit(dropout=0.1), args, mixing=InputMixing(function), train_dataset=digits.dataset()
        )

    complete = trainer(tmp_path / "complete")
    complete.train()
    resumed = trainer(tmp_path / "complete")
    resumed.train(resume_from_checkpoint=str(tmp_path / "complete" / "checkpoint-3"))
    digits.same_weights(digits.weights(resumed.model), digits.weights(complete.model))


SCRIPT = """
import json, sys
import torch
from accelerate import PartialState
from mm_hf import InputMixing
from tests.helpers import models

state, drawn = PartialState(cpu=True), []
torch.manual_seed(0)

def function(x, y):
    drawn.append(torch.rand(()).item())
    return x, y

InputMixing(function).mix_inputs(models.batch("vit"), models.labels(), models.build("vit"))
json.dump(drawn, open(f"{sys.argv[1]}/rank{state.process_index}.json", "w"))
state.wait_for_everyone()
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_ranks_draw_different_numbers(tmp_path):
    first, second = launch.launch(tmp_path, SCRIPT)
    assert first != second
