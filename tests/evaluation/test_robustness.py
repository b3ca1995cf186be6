import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTImageProcessorPil
from transformers.modeling_outputs import ImageClassifierOutput

from mm_hf import DenseMultiMix, wrap_model
from mm_hf.evaluation.metrics import Normalization, fgsm, pgd, robust_accuracy
from tests.helpers import digits, models

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NORMALIZATION = Normalization(image_mean=MEAN, image_std=STD)


class Linear(nn.Module):
    """A linear classifier of pixel values."""

    def __init__(self, classes=2, side=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(3 * side * side, classes)

    def forward(self, pixel_values, scale=None):
        logits = self.head(pixel_values.flatten(1))
        return ImageClassifierOutput(logits=logits if scale is None else logits * scale)


def normalized(pixels):
    return (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def inner_images(n=300, seed=1):
    """Return images whose pixels stay inside (0, 1) under all tested attacks."""
    return 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.03, 0.1])
def test_robust_accuracy_of_a_linear_classifier_equals_its_margin_bound(attack, epsilon):
    model, pixels = Linear(), inner_images()
    logits = model(normalized(pixels)).logits.double()
    labels = logits.argmax(-1)
    labels[::5] = 1 - labels[::5]  # misclassified examples
    # The best change of each pixel moves the margin by eps |w|, the weights being those of pixels: w / std.
    weights = (model.head.weight[0] - model.head.weight[1]).detach().view(3, -1) / torch.tensor(STD)[:, None]
    margin = (logits[:, 0] - logits[:, 1]) * (1 - 2 * labels)
    robust = margin > epsilon * weights.abs().sum().double()
    batches = [
        {"pixel_values": normalized(pixels[k : k + 64]), "labels": labels[k : k + 64]} for k in range(0, 300, 64)
    ]
    accuracies = robust_accuracy(model, batches, epsilon, attack=attack, normalization=NORMALIZATION)
    assert accuracies["accuracy"] == pytest.approx(float((margin > 0).double().mean()))
    assert accuracies["robust_accuracy"] == pytest.approx(float(robust.double().mean()))
    if epsilon == 0.03:
        assert 0.05 < accuracies["robust_accuracy"] < accuracies["accuracy"] - 0.05  # the attack has an effect


def test_attacks_on_several_classes_never_break_certified_examples():
    model, pixels, epsilon = Linear(classes=5), inner_images(), 0.02
    logits = model(normalized(pixels)).logits.double()
    labels = logits.argmax(-1)
    weights = model.head.weight.detach().view(5, 3, -1) / torch.tensor(STD)[:, None]
    robust = torch.ones(300).bool()
    for k in range(5):
        cost = (weights[labels] - weights[k]).abs().sum(dim=(1, 2))
        robust &= (logits.gather(1, labels[:, None])[:, 0] - logits[:, k] > epsilon * cost) | (labels == k)
    batches = [{"pixel_values": normalized(pixels), "labels": labels}]
    by_fgsm, by_pgd = (
        robust_accuracy(model, batches, epsilon, attack=attack, normalization=NORMALIZATION)["robust_accuracy"]
        for attack in ("fgsm", "pgd")
    )
    proved = float(robust.double().mean())
    assert 0.2 < proved <= min(by_fgsm, by_pgd) and by_pgd - proved < 0.05


def literal_attack(model, values, labels, epsilon, steps, alpha, start):
    """Attack images one by one: cross-entropy, backward, sign, clamp to the ball and to valid pixels."""
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    model = copy.deepcopy(model).eval().double()
    results = []
    for x, y, s in zip(values.double(), labels, start.double()):
        clean = x * std + mean
        now = (clean + epsilon * s).clamp(0, 1)
        for _ in range(steps):
            now = now.detach().requires_grad_()
            F.cross_entropy(model(pixel_values=((now - mean) / std)[None]).logits, y[None]).backward()
            moved = now.detach() + alpha * now.grad.sign()
            now = torch.minimum(torch.maximum(moved, clean - epsilon), clean + epsilon).clamp(0, 1)
        results.append((now.detach() - mean) / std)
    return torch.stack(results)


@pytest.mark.parametrize("steps", [1, 10])
def test_attacks_equal_a_literal_loop_on_a_vit(steps):
    model = models.build("vit", image_size=8, patch_size=4, num_labels=8)
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8)
    pixels[0], pixels[1] = 0, 1  # at the limits of the range
    values, epsilon = normalized(pixels), 8 / 255
    if steps == 1:
        ours = fgsm(model, values, labels, epsilon, normalization=NORMALIZATION)
        literal = literal_attack(model, values, labels, epsilon, 1, epsilon, torch.zeros_like(values))
    else:
        generator.manual_seed(5)
        ours = pgd(model, values, labels, epsilon, normalization=NORMALIZATION, generator=generator)
        start = 2 * torch.rand(values.shape, generator=generator.manual_seed(5)) - 1
        literal = literal_attack(model, values, labels, epsilon, 10, 2.5 * epsilon / 10, start)
    # Where the gradient is zero up to rounding, its sign is arbitrary.
    assert ((ours - literal).abs() < 1e-4).double().mean() > 0.995
    changed = NORMALIZATION.to_pixels(ours)
    assert (changed - pixels).abs().max() <= epsilon + 1e-6
    assert changed.min() >= 0 and changed.max() <= 1
    assert (changed - pixels).abs().mean() > epsilon / 3


def test_attack_succeeds_where_cross_entropy_has_no_gradient():
    model = Linear()
    model.head.weight.data *= 1e4  # cross-entropy in float32 is exactly zero, and so is its gradient
    pixels = inner_images(50)
    labels = model(pixels).logits.argmax(-1)
    assert F.cross_entropy(model(pixels).logits, labels) == 0
    weights = (model.head.weight[labels] - model.head.weight[1 - labels]).detach().view(50, 3, 4, 4)
    torch.testing.assert_close(fgsm(model, pixels, labels, 0.02), pixels - 0.02 * weights.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_attacks_leave_the_model_and_random_state_unchanged(attack):
    model = digits.vit(dropout=0.5).train()
    model.vit.embeddings.eval()
    model.classifier.bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    batches = [{"pixel_values": torch.rand(6, 1, 8, 8), "labels": torch.tensor([1, 2, 3, 4, 5, -100])}] * 2
    state = torch.get_rng_state()
    with torch.no_grad():  # as in evaluation
        plain = robust_accuracy(model, batches, 0.1, attack=attack)
    with torch.inference_mode():
        inside = [{k: v.clone() for k, v in batch.items()} for batch in batches]
        assert robust_accuracy(model, inside, 0.1, attack=attack) == plain
    with wrap_model(model, DenseMultiMix(num_mixed=5)):
        assert robust_accuracy(model, batches, 0.1, attack=attack) == plain
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)
    assert model.classifier.bias.grad is None and not model.classifier.bias.requires_grad


def test_modes_are_restored_after_an_error():
    model = digits.vit().train()
    with pytest.raises(ValueError, match="labels must be class indices of the model, from 0 to 9"):
        fgsm(model, torch.rand(2, 1, 8, 8), torch.tensor([3, 10]), 0.1)
    assert model.training and all(m.training for m in model.modules())


def test_other_inputs_are_selected_with_the_images():
    model, pixels = Linear(), inner_images(4)
    labels = torch.tensor([0, -100, 1, 0])
    flipped = {"pixel_values": pixels, "labels": labels, "scale": torch.tensor([[-1.0], [9.0], [-1.0], [-1.0]])}
    kept = labels != -100
    right = (model(pixels[kept]).logits.argmin(-1) == labels[kept]).double().mean()
    assert robust_accuracy(model, [flipped], 0.0)["accuracy"] == pytest.approx(float(right))
    ours = fgsm(model, pixels[kept], labels[kept], 0.1, scale=flipped["scale"][kept])
    torch.testing.assert_close(ours - pixels[kept], pixels[kept] - fgsm(model, pixels[kept], labels[kept], 0.1))


@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": MEAN, "image_std": STD},
        {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
    ],
    ids=["normalized", "other range", "rescaled only", "unchanged"],
)
def test_normalization_is_measured_from_a_processor(options):
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, **options)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    values = torch.tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"])).float()
    normalization = Normalization.of(processor)
    pixels = torch.tensor(image / 255).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(normalization.to_pixels(values), pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(normalization.to_values(pixels), values, rtol=1e-5, atol=1e-4)
    by_name = Normalization(
        options.get("image_mean", 0.0),
        options.get("image_std", 1.0),
        options.get("rescale_factor", 1 if options.get("do_rescale") is False else 1 / 255),
    )
    torch.testing.assert_close(by_name.to_values(pixels), values, rtol=1e-5, atol=1e-4)


def test_normalization_is_measured_from_a_gray_processor():
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.25], do_convert_rgb=False
    )
    assert Normalization.of(processor) == Normalization((0.5,), (0.25,))


def test_invalid_arguments_raise_value_error():
    model, pixels, labels = Linear(), inner_images(4), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\].*8/255, not 8.*got 8"):
        fgsm(model, pixels, labels, 8)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        pgd(model, pixels, labels, 0.1, steps=0)
    with pytest.raises(ValueError, match="attack must be one of fgsm, pgd"):
        robust_accuracy(model, [], 0.1, attack="cw")
    with pytest.raises(ValueError, match="at least one image with a label"):
        robust_accuracy(model, [], 0.1)
    with pytest.raises(ValueError, match="pixels from .* to .* use the normalization of their processor"):
        fgsm(model, 4 * pixels - 2, labels, 0.1)
    with pytest.raises(ValueError, match="one class index per image, of shape .4,., got torch.int64 of shape"):
        fgsm(model, pixels, labels[1:], 0.1)
    with pytest.raises(ValueError, match="must have pixel_values, but this one has only scale"):
        robust_accuracy(model, [{"scale": 1.0, "labels": labels}], 0.1)
    with pytest.raises(ValueError, match="must have labels, but this one has only pixel_values"):
        robust_accuracy(model, [{"pixel_values": pixels}], 0.1)
    with pytest.raises(ValueError, match="A batch must be a mapping"):
        robust_accuracy(model, [(pixels, labels)], 0.1)
    with pytest.raises(ValueError, match="image_mean has 2 numbers, but the images have 3 channels"):
        fgsm(model, pixels, labels, 0.1, normalization=Normalization([0.1, 0.2]))
    with pytest.raises(ValueError, match="image_std and rescale_factor must be positive"):
        Normalization(0.5, 0.0)
