"""Attention whose keys are not one for each token: upsampled, of padding, of another sequence, or inside of groups."""

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


class GroupedAttention(nn.Module):
    def forward(self, x):
        return (x @ x.mT / 4).softmax(dim=-1) @ x


class GroupedModel(nn.Module):
    """A video model with attention inside of each of three groups, and a CLS token that is the mean of its copies."""

    def __init__(self, order="chunks", copies="mean", neighbors=False):
        super().__init__()
        self.order, self.copies, self.neighbors = order, copies, neighbors
        self.embed, self.cls = nn.Linear(6, 16), nn.Parameter(torch.randn(1, 1, 16))
        self.attention, self.norm, self.classifier = GroupedAttention(), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, pixel_values, labels=None):
        b = len(pixel_values)
        x = self.embed(pixel_values)
        tokens = x.unflatten(1, (3, -1)) if self.order == "chunks" else x.unflatten(1, (-1, 3)).transpose(1, 2)
        grouped = torch.cat([self.cls[:, None].expand(b, 3, 1, 16), tokens], dim=2)
        grouped = grouped + self.attention(grouped.flatten(0, 1)).unflatten(0, (b, 3))
        cls = grouped[:, :, 0].mean(dim=1) if self.copies == "mean" else grouped[:, 0, 0]
        tokens = grouped[:, :, 1:] if self.order == "chunks" else grouped[:, :, 1:].transpose(1, 2)
        tokens = tokens.flatten(1, 2)
        if self.neighbors:
            tokens = tokens + tokens.roll(1, dims=1)
        logits = self.classifier(self.norm(torch.cat([cls[:, None], tokens], dim=1))[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def in_token_order(weights, groups, order):
    """Return the CLS rows (b g, h, 1 + p, 1 + p) of all groups over the g p tokens, by a loop."""
    rows = weights.mean(dim=1)[:, 0].unflatten(0, (-1, groups))
    size = rows.shape[2] - 1
    expected = torch.zeros(len(rows), groups * size)
    for group in range(groups):
        for i in range(size):
            expected[:, group * size + i if order == "chunks" else i * groups + group] = rows[:, group, 1 + i]
    return expected / expected.sum(dim=1, keepdim=True)


def test_attention_of_divided_space_and_time_weighs_each_location_by_its_frame():
    name = "TimesformerForVideoClassification"
    model = zoo.build(name)
    plan = probe(model, zoo.batch(name, model))
    assert (plan.keys, plan.query) == (f"strided[{model.config.num_frames}]", 0)
    assert probe(model, zoo.batch(name, model), plan=Plan.from_dict(plan.to_dict())) == plan
    inputs = zoo.batch(name, model, b=3, seed=5)
    with torch.no_grad():
        output = extract(model, attention="cls", **inputs)
        reported = model(**inputs, output_attentions=True).attentions[-1]
    expected = in_token_order(reported, model.config.num_frames, "strided")
    torch.testing.assert_close(output.attention, expected, atol=1e-6, rtol=1e-5)
    check_training(model, inputs)


@pytest.mark.parametrize("order", ["chunks", "strided"])
def test_attention_inside_of_groups_is_read_in_the_order_of_the_tokens(order):
    torch.manual_seed(0)
    model, found = GroupedModel(order).eval(), []
    plan = probe(model, {"pixel_values": torch.randn(4, 12, 6)})
    assert (plan.keys, plan.query) == (f"{order}[3]", 0)
    inputs = {"pixel_values": torch.randn(2, 15, 6)}  # groups of another size
    handle = model.attention.register_forward_hook(lambda module, args, result: found.append(args[0]))
    with torch.no_grad():
        output = extract(model, attention="cls", **inputs)
    handle.remove()
    weights = (found[0] @ found[0].mT / 4).softmax(dim=-1)[:, None]
    torch.testing.assert_close(output.attention, in_token_order(weights, 3, order), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("change", [{"copies": "first"}, {"neighbors": True}])
@pytest.mark.parametrize("order", ["chunks", "strided"])
def test_attention_inside_of_groups_is_not_read_if_the_groups_mix(order, change):
    torch.manual_seed(0)
    model = GroupedModel(order, **change).eval()
    assert probe(model, {"pixel_values": torch.randn(4, 12, 6)}).attention is None


def test_attention_keeps_its_order_over_the_tokens():
    row = torch.rand(2, 4).softmax(dim=1)
    assert torch.equal(row_of_tokens(row, 4, ""), row) and torch.equal(row_of_tokens(row, 3, "first"), row[:, :3])
    spread = row_of_tokens(row, 14, "repeat[3]")
    assert torch.equal(spread[:, :12:3], row) and torch.equal(spread[:, 2:12:3], row) and not spread[:, 12:].any()
