"""Attention whose keys are not one for each token: upsampled keys, keys of padding, and keys of another sequence."""

import copy

import pytest
import torch
from torch import nn

from mm_hf import DenseMultiMix, Plan, extract, probe, wrap_model
from mm_hf.locations.attention.weights import row_of_tokens
from tests.helpers import zoo

pytestmark = pytest.mark.zoo
SQUEEZED = ["SEWForSequenceClassification", "SEWDForSequenceClassification"]


def normalized(row, mask):
    return row * mask / (row * mask).sum(dim=1, keepdim=True)


def check_training(model, inputs):
    """Check that the loss of the locations, with a gradient through the attention, reaches the first layer."""
    labels = torch.arange(len(next(iter(inputs.values())))) % model.config.num_labels
    with wrap_model(model.train(), DenseMultiMix(num_mixed=20, clean_weight=0.0, detach_attention=False)):
        loss = model(**inputs, labels=labels)["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in list(model.parameters())[-1:])


@pytest.mark.parametrize("length", [9, 10, 12, 13, 24])
@pytest.mark.parametrize("name", SQUEEZED)
def test_upsampled_keys_weigh_each_of_their_tokens(name, length):
    """The encoder runs at half of the resolution in time, and a token at the end may have no key."""
    model = zoo.build(name)
    plan = probe(model, zoo.batch(name, model))
    assert plan.keys == "repeat[2]" and plan.query == "mean"
    assert probe(model, zoo.batch(name, model), plan=Plan.from_dict(plan.to_dict())) == plan
    inputs = zoo.batch(name, model, b=3, seed=5, length=length)
    with torch.no_grad():
        output = extract(model, attention="mean", **inputs)
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        weights = eager(**inputs, output_attentions=True).attentions[-1]
    row = weights.mean(dim=(1, 2))
    n = output.mask.shape[1]
    assert n // 2 == row.shape[1]
    expected = torch.stack([row[:, j // 2] if j // 2 < row.shape[1] else row.new_zeros(3) for j in range(n)], dim=1)
    torch.testing.assert_close(output.attention, normalized(expected, output.mask), atol=1e-6, rtol=1e-5)
    check_training(model, inputs)


class Smoothing(nn.Module):
    """An upsampling whose outputs depend on two keys."""

    def __init__(self, upsample):
        super().__init__()
        self.upsample = upsample

    def forward(self, hidden_states):
        return self.upsample(hidden_states + hidden_states.roll(1, dims=1))


def test_attention_is_not_read_if_tokens_mix_the_keys():
    model = zoo.build(SQUEEZED[0])
    model.sew.encoder.upsample = Smoothing(model.sew.encoder.upsample)
    assert probe(model, zoo.batch(SQUEEZED[0], model)).attention is None


@pytest.mark.parametrize("probed", [8, 12, 16])
@pytest.mark.parametrize("length", [8, 9, 16])
def test_keys_of_padding_have_no_location(probed, length):
    """Longformer pads texts to a multiple of its window. The first token attends to all tokens."""
    name = "LongformerForSequenceClassification"
    model = zoo.build(name)
    plan = probe(model, zoo.batch(name, model, length=probed))
    assert (plan.keys, plan.query) == ("first", 0)
    inputs = zoo.batch(name, model, b=3, seed=5, length=length)
    with torch.no_grad():
        output = extract(model, attention="cls", **inputs)
        everywhere = torch.zeros_like(inputs["input_ids"])
        everywhere[:, 0] = 1
        reported = model(**inputs, global_attention_mask=everywhere, output_attentions=True).global_attentions[-1]
    row = reported[..., 0].mean(dim=1)[:, :length]
    torch.testing.assert_close(output.attention, normalized(row, output.mask), atol=1e-6, rtol=1e-5)
    check_training(model, inputs)


@pytest.mark.parametrize("length", [9, 12])
def test_keys_of_another_sequence_have_no_location(length):
    """The decoder of T5Gemma 2 attends to its own tokens and to those of the encoder at once."""
    name = "T5Gemma2ForSequenceClassification"
    model = zoo.build(name)
    plan = probe(model, zoo.batch(name, model))
    assert (plan.keys, plan.query) == ("first", "pool")
    inputs = zoo.batch(name, model, b=3, seed=5, length=length)
    eager, found = copy.deepcopy(model), []
    eager.set_attn_implementation("eager")
    eager.get_submodule(plan.attention).register_forward_hook(lambda module, args, output: found.append(output[1]))
    with torch.no_grad():
        output = extract(model, attention="cls", **inputs)
        eager(**inputs)
    row = found[0].mean(dim=1)[torch.arange(3), position_of_logits(model, inputs)]  # the module splits its weights
    torch.testing.assert_close(output.attention, normalized(row, output.mask), atol=1e-6, rtol=1e-5)
    check_training(model, inputs)


def position_of_logits(model, inputs):
    """Return the position of the decoder's token whose logits are those of the text."""
    found = []
    handle = model.score.register_forward_hook(lambda module, args, result: found.append(result))
    with torch.no_grad():
        logits = model(**inputs).logits
    handle.remove()
    return (found[0] - logits[:, None]).abs().amax(dim=-1).argmin(dim=1)


def test_attention_keeps_its_order_over_the_tokens():
    row = torch.rand(2, 4).softmax(dim=1)
    assert torch.equal(row_of_tokens(row, 4, ""), row) and torch.equal(row_of_tokens(row, 3, "first"), row[:, :3])
    spread = row_of_tokens(row, 14, "repeat[3]")
    assert torch.equal(spread[:, :12:3], row) and torch.equal(spread[:, 2:12:3], row) and not spread[:, 12:].any()
