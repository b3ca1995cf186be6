import builtins
import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import nn

from mm_hf import DenseMultiMix, wrap_model
from mm_hf.evaluation.metrics import CORRUPTIONS, Normalization, corrupt, corruption_accuracy
from mm_hf.evaluation.metrics.corruptions import BRIGHTNESS, CONTRAST, NOISE_DEVIATION, PHOTONS
from tests.helpers import digits

NAMES = sorted(CORRUPTIONS)


@pytest.fixture(scope="module")
def photographs():
    """Return eight parts of the two photographs of scikit-learn, 64x64 pixels."""
    images = [torch.tensor(np.array(x)).permute(2, 0, 1)[None] / 255 for x in load_sample_images().images]
    parts = [x[:, :, 100:356, k : k + 256] for x in images for k in (0, 120, 240, 360)]
    return torch.nn.functional.interpolate(torch.cat(parts), size=64, mode="area")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("side", "channels"), [(64, 3), (64, 1), (30, 3), (8, 1)])
def test_distortion_grows_with_severity_and_results_are_valid_images(photographs, name, side, channels):
    images = torch.nn.functional.interpolate(photographs[:, :channels], size=side, mode="area")
    assert corrupt(images, name, 0) is images
    before, kept = 0.0, images.clone()
    for severity in range(1, 6):
        changed = corrupt(images, name, severity, seed=3)
        assert changed.shape == images.shape and changed.dtype == images.dtype
        assert changed.min() >= 0 and changed.max() <= 1 and changed.isfinite().all()
        error = float((changed - images).square().mean())
        # An image of 8 pixels has only two or four squares, whose edges depend on chance.
        assert error > before or (side == 8 and name == "pixelate" and error > before / 2)
        before = error
    assert torch.equal(images, kept)


@pytest.mark.parametrize("name", NAMES)
def test_corruptions_depend_on_the_seed_and_not_on_global_generators(photographs, name):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = corrupt(photographs, name, 4, seed=1)
    assert torch.equal(first, corrupt(photographs, name, 4, seed=1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    random = name in ("gaussian_noise", "shot_noise", "motion_blur")
    assert torch.equal(first, corrupt(photographs, name, 4, seed=2)) != random
    # An image gets the same corruption alone and in a batch.
    alone = torch.cat([corrupt(photographs[i : i + 1], name, 4, seed=1, start=i) for i in range(8)])
    torch.testing.assert_close(alone, first, rtol=0, atol=1e-5)


def test_corruptions_have_the_documented_strength():
    gray = torch.full((1, 3, 200, 200), 0.5)
    noise = corrupt(gray, "gaussian_noise", 1) - 0.5
    assert noise.std() == pytest.approx(NOISE_DEVIATION[0], rel=0.02) and abs(noise.mean()) < 0.002
    for severity in (1, 2):
        shot = PHOTONS[severity - 1] * corrupt(gray / 2, "shot_noise", severity)
        assert shot.mean() == pytest.approx(PHOTONS[severity - 1] / 4, rel=0.02)
        assert shot.var() == pytest.approx(
            PHOTONS[severity - 1] / 4, rel=0.05
        )  # the variance of a Poisson variable is its mean
        torch.testing.assert_close(shot, shot.round(), rtol=0, atol=1e-4)
    torch.testing.assert_close(corrupt(gray, "brightness", 2), gray + BRIGHTNESS[1])
    halves = gray.clone()
    halves[..., :100], halves[..., 100:] = 0.2, 0.6
    expected = 0.4 + CONTRAST[2] * (halves - 0.4)
    torch.testing.assert_close(corrupt(halves, "contrast", 3), expected, rtol=0, atol=1e-4)
    noise = torch.rand(1, 1, 40, 41)
    squares = corrupt(noise, "pixelate", 2)
    for y in range(40):
        for x in range(41):
            block = noise[0, 0, y // 3 * 3 : y // 3 * 3 + 3, x // 3 * 3 : x // 3 * 3 + 3]
            assert float(squares[0, 0, y, x]) == pytest.approx(float(block.mean()), abs=1e-6)
    for name in ("gaussian_blur", "motion_blur", "pixelate"):  # constant images stay constant, also at the edges
        torch.testing.assert_close(corrupt(gray, name, 5), gray, rtol=0, atol=1e-5)
    dot = torch.zeros(1, 1, 224, 224)
    dot[..., 112, 112] = 1
    for severity, deviation in ((1, 1.0), (5, 6.0)):
        blurred = corrupt(dot, "gaussian_blur", severity)[0, 0].sum(0)
        place = torch.arange(224.0) - 112
        assert blurred.sum() == pytest.approx(1, abs=1e-4)
        assert float((blurred * place**2).sum()) ** 0.5 == pytest.approx(deviation, rel=0.03)
    streak = corrupt(dot, "motion_blur", 5)[0, 0]
    _, xs = (streak > 0.2 * streak.max()).nonzero().T
    assert 25 <= xs.max() - xs.min() <= 41  # 41 pixels long, at an angle of 45 degrees at most


class Brightest(nn.Module):
    """A classifier that predicts 1 for images whose mean pixel is above one half."""

    def __init__(self, normalization):
        super().__init__()
        self.normalization = normalization

    def forward(self, pixel_values):
        mean = self.normalization.to_pixels(pixel_values).mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def test_images_are_corrupted_before_normalization():
    normalization = Normalization(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    pixels = torch.tensor([0.05, 0.25, 0.45, 0.9]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    values, labels = normalization.to_values(pixels), torch.tensor([0, 0, 0, 1])
    parts = ({"pixel_values": values[k], "labels": labels[k]} for k in (slice(0, 3), slice(3, 4)))
    curves = corruption_accuracy(
        Brightest(normalization), parts, corruptions=["brightness"], severities=range(6), normalization=normalization
    )
    # 0.1 more makes 0.45 bright, 0.3 more makes 0.25 bright, 0.5 more makes 0.05 bright.
    assert curves == {"brightness": [1.0, 0.75, 0.75, 0.5, 0.5, 0.25]}


def test_accuracy_does_not_depend_on_batches_modes_or_wrapping():
    model = digits.vit(dropout=0.5).train()
    model.vit.embeddings.eval()
    data = digits.dataset(0, 60, extra=False).with_format("torch")
    images = torch.stack(list(data["pixel_values"]))
    labels = torch.tensor(list(data["label"]))
    labels[7] = -100
    normalization = Normalization([0.5], [0.5])
    before, modes, state = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )

    def accuracies(size, **settings):
        batches = [{"pixel_values": images[k : k + size], "labels": labels[k : k + size]} for k in range(0, 60, size)]
        return corruption_accuracy(model, batches, normalization=normalization, **settings)

    plain = accuracies(60)
    assert set(plain) == set(CORRUPTIONS) and all(len(x) == 5 for x in plain.values())
    assert accuracies(17, corruptions=["shot_noise"])["shot_noise"] == plain["shot_noise"]
    with wrap_model(model, DenseMultiMix(num_mixed=5)):
        assert accuracies(60, corruptions=["contrast"])["contrast"] == plain["contrast"]
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_invalid_arguments_raise_errors(monkeypatch):
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="name must be one of gaussian_noise, .* got 'fog'"):
        corrupt(images, "fog", 1)
    for severity in (6, -1, 1.5, True):
        with pytest.raises(ValueError, match="severity must be an integer from 0"):
            corrupt(images, "jpeg", severity)
    with pytest.raises(ValueError, match=r"images must be pixels in \[0, 1\]"):
        corrupt(4 * images - 2, "jpeg", 1)
    with pytest.raises(ValueError, match="floating point tensor of shape"):
        corrupt(images[0], "jpeg", 1)
    with pytest.raises(ValueError, match="at least one image with a label"):
        corruption_accuracy(Brightest(Normalization()), [])
    real = builtins.__import__

    def without_kornia(name, *args, **kwargs):
        if name == "kornia":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_kornia)
    with pytest.raises(ImportError, match=r"pip install 'mm-hf\[metrics\]'"):
        corrupt(images, "contrast", 1)
    corrupt(images, "gaussian_noise", 1)  # needs no kornia
