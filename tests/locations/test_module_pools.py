"""Heads that pool the tokens by attention, and the tokens that a model puts before those of its input."""

import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from mm_hf import DenseMultiMix, LocationError, Plan, extract, probe, wrap_model
from mm_hf.evaluation.model_check import pooled_error
from tests.helpers import models, zoo


class Pooler(nn.Module):
    """Attention of learned queries over the tokens, then a residual MLP, as in SigLIP."""

    def __init__(self, d, heads, fused, queries=1):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.latent = nn.Parameter(torch.randn(1, queries, d))
        self.q, self.kv, self.proj = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.norm, self.mlp = nn.LayerNorm(d), nn.Linear(d, d)

    def weights(self, x):
        """Return queries (b, h, q, d / h), keys and values (b, h, n, d / h)."""
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        key, value = self.kv(x).chunk(2, dim=-1)
        return split(self.q(self.latent.expand(len(x), -1, -1))), split(key), split(value)

    def forward(self, x):
        query, key, value = self.weights(x)
        if self.fused:
            pooled = F.scaled_dot_product_attention(query, key, value)
        else:
            pooled = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1) @ value
        pooled = self.proj(pooled.transpose(1, 2).flatten(2))
        return (pooled + self.mlp(self.norm(pooled)).relu()).mean(dim=1)


class AttentionPooled(transformers.ViTForImageClassification):
    """ViT whose head pools all tokens, or all but the CLS token, by attention."""

    def __init__(self, config, fused=True, queries=1, skip=0):
        super().__init__(config)
        self.skip = skip
        self.pooler = Pooler(config.hidden_size, 4, fused, queries)
        for parameter in self.pooler.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, pixel_values, labels=None, **kwargs):
        tokens = self.vit(pixel_values).last_hidden_state[:, self.skip :]
        logits = self.classifier(self.pooler(tokens))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def build(**settings):
    torch.manual_seed(0)
    return AttentionPooled(models.build("vit").config, **settings).eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("skip", [0, 1])
def test_locations_are_scored_by_the_pooler_as_sequences_of_one(fused, skip):
    model, inputs = build(fused=fused, skip=skip), models.batch("vit", b=3)
    plan = probe(model, inputs)
    assert (plan.pool, plan.chain) == ("module[0:]", ("pooler", "classifier")) and plan.prefix == 1 - skip
    fresh = models.batch("vit", b=5, seed=9)
    error, locations = pooled_error(model, plan, fresh)
    assert error <= 1e-6 and locations == 16
    with torch.no_grad():
        output = extract(model, **fresh)
        tokens = model.vit(**fresh).last_hidden_state
        for j in range(16):
            alone = model.classifier(model.pooler(tokens[:, j + 1 : j + 2]))
            torch.testing.assert_close(output.token_logits[:, j], alone)
        query, key, _ = model.pooler.weights(tokens[:, skip:])
        expected = (query @ key.mT / math.sqrt(8)).softmax(dim=-1)[:, :, 0].mean(dim=1)[:, 1 - skip :]
    torch.testing.assert_close(output.attention, expected / expected.sum(dim=1, keepdim=True))


def test_several_queries_weigh_the_labels_by_their_mean():
    model, inputs = build(queries=3), models.batch("vit", b=3)
    assert probe(model, inputs).query == "mean"
    with torch.no_grad():
        output = extract(model, attention="mean", **inputs)
        query, key, _ = model.pooler.weights(model.vit(**inputs).last_hidden_state)
        expected = (query @ key.mT / math.sqrt(8)).softmax(dim=-1).mean(dim=(1, 2))[:, 1:]
    torch.testing.assert_close(output.attention, expected / expected.sum(dim=1, keepdim=True))


class MaxPooled(transformers.ViTForImageClassification):
    """ViT whose head reads the maximum, or the mean of the maximum and the mean, of each feature."""

    mean = False

    def forward(self, pixel_values, labels=None, **kwargs):
        patches = self.vit(pixel_values).last_hidden_state[:, 1:]
        pooled = patches.amax(dim=1)
        return ImageClassifierOutput(
            logits=self.classifier((pooled + patches.mean(dim=1)) / 2 if self.mean else pooled)
        )


@pytest.mark.parametrize(("mean", "pool"), [(False, "max[1:]"), (True, "avgmax[1:]")])
def test_maximum_of_the_tokens_is_found(mean, pool):
    model, inputs = MaxPooled(models.build("vit").config).eval(), models.batch("vit", b=3)
    model.mean = mean
    plan = probe(model, inputs)
    assert (plan.pool, plan.prefix) == (pool, 1) and pooled_error(model, plan, models.batch("vit", seed=7))[0] <= 1e-6
    with torch.no_grad():
        expected = model.classifier(model.vit(**inputs).last_hidden_state[:, 1:])
        torch.testing.assert_close(extract(model, **inputs).token_logits, expected)


class Norm(nn.Module):
    """Generalized mean of each feature."""

    def forward(self, x):
        return x.abs().pow(3).mean(dim=(2, 3)).pow(1 / 3)


class ModulePooled(transformers.ViTForImageClassification):
    def forward(self, pixel_values, labels=None, **kwargs):
        tokens = self.vit(pixel_values).last_hidden_state[:, 1:]
        return ImageClassifierOutput(logits=self.classifier(self.pool(tokens.mT.unflatten(2, (4, 4)))))


class Sum(Norm):
    def forward(self, x):
        return x.sum(dim=(2, 3))


class First(Norm):
    """A pool that the order of the tokens matters to."""

    def forward(self, x):
        return x.mean(dim=(2, 3)) + 0.1 * x[:, :, 0, 0]


@pytest.mark.parametrize(("pool", "found"), [(Norm, True), (Sum, False), (First, False)])
def test_module_is_a_pool_if_neither_order_nor_copies_of_tokens_matter(pool, found):
    torch.manual_seed(0)
    model = ModulePooled(models.build("vit").config).eval()
    model.pool = pool()
    inputs = models.batch("vit", b=3)
    if not found:
        with pytest.raises(LocationError, match="gives no per-location logits"):
            probe(model, inputs)
        return
    plan = probe(model, inputs)
    assert (plan.pool, plan.chain, plan.layout, plan.query) == ("module[0:]", ("pool", "classifier"), "map", None)
    with torch.no_grad():
        output, tokens = extract(model, **inputs), model.vit(**inputs).last_hidden_state[:, 1:]
        torch.testing.assert_close(output.token_logits, model.classifier(tokens.abs()))


def test_dense_loss_trains_a_model_that_pools_by_attention():
    model, inputs = build().train(), models.batch("vit", b=4)
    with wrap_model(model, DenseMultiMix(num_mixed=5, clean_weight=0.0)) as handle:
        model(**inputs, labels=torch.arange(4)).loss.backward()
        assert handle.plan.pool == "module[0:]" and handle.plan.query == 0
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {"pooler.kv.weight", "pooler.mlp.weight", "classifier.weight"} <= reached


class ClassAttention(transformers.ViTForImageClassification):
    """ViT whose last block updates only the CLS token, by its attention to all tokens, as in CaiT."""

    def forward(self, pixel_values, labels=None, **kwargs):
        tokens = self.vit(pixel_values).last_hidden_state
        cls = self.attend(tokens)
        logits = self.classifier(self.norm(torch.cat([tokens[:, :1] + cls, tokens[:, 1:]], dim=1))[:, 0])
        return ImageClassifierOutput(logits=logits)


class Attend(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x[:, None, :1], x[:, None], x[:, None])[:, 0]


def test_attention_of_a_class_attention_block_is_read():
    torch.manual_seed(0)
    model = ClassAttention(models.build("vit").config)
    model.attend, model.norm = Attend(), nn.LayerNorm(32)
    inputs = models.batch("vit", b=3)
    plan = probe(model.eval(), inputs)
    assert (plan.source, plan.pool, plan.prefix, plan.attention, plan.query) == ("norm", "token[0]", 1, "attend", 0)
    with torch.no_grad():
        tokens = model.vit(**inputs).last_hidden_state
        expected = (tokens[:, :1] @ tokens.mT / math.sqrt(32)).softmax(dim=-1)[:, 0, 1:]
        attention = extract(model, attention="cls", **inputs).attention
    torch.testing.assert_close(attention, expected / expected.sum(dim=1, keepdim=True))


class Prefixed(transformers.ViTForImageClassification):
    """ViT with further tokens, which a last stage separates and concatenates again with half of the patches."""

    def forward(self, pixel_values, labels=None, **kwargs):
        patches = self.vit(pixel_values).last_hidden_state[:, 1:]
        tokens = self.mix(torch.cat((self.memory.expand(len(patches), -1, -1), patches), dim=1))
        memory, patches = tokens.split([3, 16], dim=1)
        tokens = self.norm(torch.cat((self.project(memory), patches.unflatten(1, (8, 2)).mean(dim=2)), dim=1))
        pooled = tokens[:, 3:].mean(dim=1) if self.mean else tokens[:, 0]
        return ImageClassifierOutput(logits=self.classifier(pooled))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("black", [False, True])
def test_tokens_before_the_patches_are_counted_whatever_their_parameter_is_called(mean, black):
    torch.manual_seed(0)
    model = Prefixed(models.build("vit").config)
    model.memory, model.mean = nn.Parameter(torch.randn(1, 3, 32)), mean
    model.mix = nn.TransformerEncoderLayer(32, 2, 32, batch_first=True)
    model.project, model.norm = nn.Linear(32, 32), nn.LayerNorm(32)
    inputs = models.batch("vit", b=3)
    if black:  # patches that are the same in all examples are locations all the same
        inputs["pixel_values"][:, :, :16] = 0
    plan = probe(model.eval(), inputs)
    assert plan.prefix == 3 and plan.pool == ("mean[3:]" if mean else "token[0]")
    assert extract(model, **inputs).token_logits.shape == (3, 8, 5)


@pytest.mark.parametrize("name", ["VJEPA2ForVideoClassification", "VideoPrismForVideoClassification"])
def test_pooler_of_video_models_is_found(name):
    model = zoo.build(name)
    inputs = zoo.batch(name, model)
    plan = probe(model, inputs)
    assert plan.pool == "module[0:]" and Plan.from_dict(plan.to_dict()) == plan == probe(model, inputs, plan=plan)
    error, _ = pooled_error(model, plan, zoo.batch(name, model, b=3, seed=7))
    assert error <= 1e-6


def test_head_that_reads_latents_is_rejected_with_this_reason():
    name = "PerceiverForImageClassificationLearned"
    model = zoo.build(name)
    with pytest.raises(LocationError, match=r"per-location logits: its head reads \d+ latents, which"):
        probe(model, zoo.batch(name, model))
