"""ZetaMixup against a literal loop over mixed examples, and its weights."""

import pytest
import torch
from torch.nn import functional as F

from mm_hf import ZetaMixup, wrap_model
from mm_hf.distributed import rank_generator
from mm_hf.methods.zeta_mixup import zeta_weights
from tests.helpers import models


def literal_weights(b, gamma, generator):
    """Return the weights of one mixed example after the other: the others follow by ascending random scores."""
    scores = torch.rand(b, b, generator=generator, dtype=torch.float64)
    rows = torch.zeros(b, b, dtype=torch.float64)
    for k in range(b):
        order = [k, *sorted((i for i in range(b) if i != k), key=lambda i: float(scores[k, i]))]
        for place, i in enumerate(order, start=1):
            rows[k, i] = place**-gamma / sum(j**-gamma for j in range(1, b + 1))
    return rows


@pytest.mark.parametrize("gamma", [0.5, 2.8, 30.0])
def test_loss_is_that_of_the_literal_implementation(gamma):
    model, images, labels = models.build("vit"), models.batch("vit")["pixel_values"], models.labels()
    torch.manual_seed(5)
    weights = literal_weights(6, gamma, rank_generator("cpu")).float()
    mixed = torch.stack([sum(weights[k, i] * images[i] for i in range(6)) for k in range(6)])
    targets = torch.stack([sum(weights[k, i] * F.one_hot(labels[i], 5) for i in range(6)) for k in range(6)])
    expected = -(targets * model(mixed).logits.log_softmax(dim=1)).sum(dim=1).mean()
    with wrap_model(model, ZetaMixup(gamma)):
        torch.manual_seed(5)
        model.training = True
        loss = model(pixel_values=images, labels=labels).loss
        model.training = False
        torch.testing.assert_close(loss, expected)
        assert torch.equal(model(images).logits, models.build("vit")(images).logits)


def test_each_example_keeps_its_largest_weight_and_the_others_get_each_weight_equally_often():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([zeta_weights(5, 2.0, generator) for _ in range(3000)])
    torch.testing.assert_close(drawn.sum(dim=2), torch.ones(3000, 5))
    assert (drawn.argmax(dim=2) == torch.arange(5)).all()
    own = float(drawn[0, 0, 0])
    expected = torch.full((5, 5), (1 - own) / 4).fill_diagonal_(own)
    torch.testing.assert_close(drawn.mean(dim=0), expected, atol=0.01, rtol=0)
    assert (zeta_weights(500, 1.74, generator).diagonal() > 0.5).all() and zeta_weights(1, 2.8, generator).item() == 1


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_texts_are_mixed_by_their_embeddings_and_the_mask_is_the_union(name):
    model, inputs, labels = models.build(name), models.batch(name), models.labels()
    mixed, targets = ZetaMixup().mix_inputs(inputs, labels, model)
    assert (mixed.pop("input_ids") == inputs["input_ids"][0]).all()  # the longest text
    assert mixed["inputs_embeds"].shape == (6, 12, 32)
    assert (mixed["attention_mask"] == inputs["attention_mask"].amax(dim=0)).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
    assert model(**mixed).logits.isfinite().all()


def test_inputs_are_mixed_in_float32_under_autocast_and_keep_their_type():
    images, labels, model = torch.rand(6, 3, 8, 8), models.labels(), models.build("vit")
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(ZetaMixup().mix_inputs({"pixel_values": images}, labels, model))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    half = ZetaMixup().mix_inputs({"pixel_values": images.bfloat16()}, labels, model)[0]["pixel_values"]
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("gamma", [0, -1.0, float("inf"), float("nan"), True, "2"])
def test_invalid_gamma_is_rejected(gamma):
    with pytest.raises(ValueError, match=f"gamma must be a positive number, got {gamma!r}"):
        ZetaMixup(gamma)
