import copy
import json
import math

import pytest
import torch
import transformers
from torch import nn

from mm_hf.locations import LocationError, Plan, extract, probe
from mm_hf.locations.recording import Call
from tests.helpers import models

ALL = sorted(models.MODELS)


def reference_tokens(name, model, inputs):
    """Compute per-location logits by hand for each architecture, with its own modules."""
    body = getattr(model, model.base_model_prefix)
    hidden = body(**inputs).last_hidden_state
    if name in ("vit", "beit-cls"):
        return model.classifier(hidden[:, 1:])
    if name == "deit":
        return model.classifier(hidden[:, 2:])
    if name == "dinov2":
        patches = hidden[:, 1:]
        return model.classifier(torch.cat([hidden[:, :1].expand_as(patches), patches], dim=-1))
    if name == "beit":
        return model.classifier(model.beit.pooler.layernorm(hidden[:, 1:]))
    if name == "bert":
        return model.classifier(torch.tanh(model.bert.pooler.dense(hidden)))
    if name == "roberta":
        return model.classifier.out_proj(torch.tanh(model.classifier.dense(hidden)))
    return model.classifier(torch.relu(model.pre_classifier(hidden)))


def eager_row(model, inputs, row=0):
    """Return the attention of one query in the last block from Transformers' eager implementation."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager(**inputs, output_attentions=True).attentions[-1].mean(dim=1)[:, row]


@pytest.mark.parametrize("name", ALL)
def test_extract_returns_logits_token_logits_and_mask(name):
    model = models.build(name)
    for inputs in (models.batch(name), models.batch(name, b=3, seed=5, length=9)):
        output = extract(model, **inputs)
        torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=0, atol=0)
        torch.testing.assert_close(output.token_logits, reference_tokens(name, model, inputs), rtol=1e-5, atol=1e-5)
        if name in models.TEXT_MODELS:
            ids = inputs["input_ids"]
            words = inputs["attention_mask"].bool() & (ids >= 10)
            # Some configs name <s> and </s>, others do not; a tokenizer always does (see the next test).
            unknown = (ids == 3) if name != "roberta" else (ids == 2) | (ids == 3)
            assert torch.equal(output.mask & ~unknown, words)
        else:
            assert output.mask.all()
        torch.testing.assert_close(output.attention.sum(dim=1), torch.ones(len(output.logits)))
        assert not output.attention[~output.mask].any()


def test_tokenizer_adds_special_tokens_to_those_of_the_config():
    class Tokenizer:
        all_special_ids = [0, 2, 3]

    model, inputs = models.build("bert"), models.batch("bert")
    assert probe(model, inputs).special_ids == (0,)
    assert probe(model, inputs, Tokenizer()).special_ids == (0, 2, 3)


@pytest.mark.parametrize("name", ["dinov2", "beit"])
def test_mean_of_token_logits_equals_logits_of_mean_heads(name):
    model, inputs = models.build(name), models.batch(name)
    output = extract(model, **inputs)
    if name == "dinov2":  # a linear head: the mean of the logits equals the logits of the mean
        torch.testing.assert_close(output.token_logits.mean(dim=1), output.logits, rtol=1e-5, atol=1e-5)
    else:
        assert probe(model, inputs).pool == "mean[1:]"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ALL)
def test_cls_attention_equals_eager_attention(name, attn):
    model = models.build(name)
    inputs = models.batch(name)
    expected = eager_row(model, inputs)
    model.set_attn_implementation(attn)
    output = extract(model, attention="cls", **inputs)
    skipped = expected.shape[1] - output.mask.shape[1]
    expected = expected[:, skipped:] * output.mask
    torch.testing.assert_close(output.attention, expected / expected.sum(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert model.config._attn_implementation == attn


@pytest.mark.parametrize("name", sorted(models.TEXT_MODELS))
def test_padding_does_not_change_the_other_tokens(name):
    model = models.build(name)
    short = models.batch(name, b=1, length=8)
    padded = {
        k: nn.functional.pad(v, (0, 5), value=1 if (k, name) == ("input_ids", "roberta") else 0)
        for k, v in short.items()
    }
    one, other = (extract(model, **inputs) for inputs in (short, padded))
    assert not other.mask[:, 8:].any()
    torch.testing.assert_close(other.token_logits[:, :8], one.token_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.attention[:, :8], one.attention, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "beit-cls"])
@pytest.mark.parametrize("side", [48, (24, 40)])
def test_image_size_may_change_after_the_probe(name, side):
    model = models.build(name)
    extract(model, **models.batch(name))
    inputs = models.batch(name, side=side)
    if name != "dinov2":  # always interpolates
        inputs["interpolate_pos_encoding"] = True
    output = extract(model, **inputs)
    height, width = side if isinstance(side, tuple) else (side, side)
    assert output.token_logits.shape[1] == height * width // 64
    torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=0, atol=0)
    torch.testing.assert_close(output.token_logits, reference_tokens(name, model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gap", "cam", "uniform"])
def test_gap_cam_and_uniform_attention(kind):
    model, inputs, labels = models.build("vit"), models.batch("vit"), models.labels()
    output = extract(model, attention=kind, **inputs, labels=labels)
    tokens = model.vit(**inputs).last_hidden_state[:, 1:]
    expected = {
        "gap": torch.einsum("brd,bd->br", tokens, tokens.mean(dim=1)).relu(),
        "cam": output.token_logits[torch.arange(6), :, labels].relu(),
        "uniform": torch.ones(6, 16),
    }[kind]
    expected = expected / expected.sum(dim=1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(output.attention, expected)
    if kind == "cam":
        soft = nn.functional.one_hot(labels, 5).float()
        torch.testing.assert_close(extract(model, attention=kind, **inputs, labels=soft).attention, expected)


def test_auto_attention_is_cls_for_token_heads_and_gap_for_mean_heads():
    for name, kind in [("vit", "cls"), ("dinov2", "cls"), ("bert", "cls"), ("beit", "gap")]:
        model, inputs = models.build(name), models.batch(name)
        assert torch.equal(extract(model, **inputs).attention, extract(model, attention=kind, **inputs).attention)


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_decoder_and_convolutional_heads(name):
    """Probe a decoder that scores every token and selects the last one, and a CNN that averages a feature map."""
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, num_labels=5, pad_token_id=0)
        model, inputs = transformers.GPT2ForSequenceClassification(config).eval(), models.batch("bert")
    else:
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
        )
        model, inputs = transformers.ResNetForImageClassification(config).eval(), models.batch("vit", side=64)
    plan = probe(model, inputs)
    output = extract(model, **inputs)
    if name == "gpt2":
        assert plan.pool == "token[last!=0]"
        last = inputs["attention_mask"].sum(dim=1) - 1
        picked = output.token_logits[torch.arange(6), last]
        torch.testing.assert_close(picked, output.logits)
        row = eager_row(model, inputs, last)  # (b, b, n): the row of each example's own last token
        expected = row[torch.arange(6), torch.arange(6)] * output.mask
        torch.testing.assert_close(output.attention, expected / expected.sum(dim=1, keepdim=True))
    else:
        assert plan.pool == "mean[0:]"
        torch.testing.assert_close(output.token_logits.mean(dim=1), output.logits, rtol=1e-5, atol=1e-5)
        with pytest.raises(LocationError, match='Use attention="gap"'):
            extract(model, attention="cls", **inputs)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_extract_without_gradients(context):
    model = models.build("beit")
    with context():
        inputs = models.batch("beit")
        output = extract(model, **inputs)
        assert torch.equal(output.logits, extract(model, **inputs).logits)
    assert not output.token_logits.requires_grad


def snapshot(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), m.training, sorted(m.__dict__)) for m in model.modules()
    ]
    configs = [id(m.config) for m in model.modules() if hasattr(m, "config")]
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return hooks, configs, flags, model.config.to_dict(), model.config._attn_implementation


@pytest.mark.parametrize("name", ["vit", "bert", "beit"])
def test_probe_and_extract_restore_the_model(name):
    model = models.build(name, hidden_dropout_prob=0.3).train()
    body = getattr(model, model.base_model_prefix)
    body.requires_grad_(False)  # a frozen backbone can be probed
    body.embeddings.eval()
    before, random = snapshot(model), torch.get_rng_state()
    probe(model, models.batch(name))
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()
    extract(model, **models.batch(name))
    model.train()
    body.embeddings.eval()
    assert snapshot(model) == before
    assert transformers.AttentionInterface._global_mapping["sdpa"].__module__.startswith("transformers")
    assert "eager" not in transformers.AttentionInterface._global_mapping


def test_plan_prints_its_chain_and_round_trips_through_json():
    plan = probe(models.build("distilbert"), models.batch("distilbert"))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "pre_classifier -> relu -> dropout -> classifier" in str(plan)
    assert "token[0]" in str(plan) and "DistilBertForSequenceClassification" in str(plan)


def test_extract_probes_a_changed_model_again():
    model, inputs = models.build("bert"), models.batch("bert")
    extract(model, **inputs)
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))
    model.bert.pooler.activation = nn.ReLU()
    output = extract(model, **inputs)
    hidden = model.bert(**inputs).last_hidden_state
    torch.testing.assert_close(
        output.token_logits, model.classifier(model.bert.pooler.dense(hidden).relu()), rtol=1e-5, atol=1e-5
    )


def test_bfloat16_weights_and_half_precision_masks():
    model = models.build("bert").to(torch.bfloat16)
    inputs = models.batch("bert")
    output = extract(model, attention="cls", **inputs)
    assert output.token_logits.dtype == torch.bfloat16 and output.attention.dtype == torch.float32
    torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=0, atol=0)


class TanhLogits(transformers.ViTForImageClassification):
    """A ViT whose head ends in a nonlinear function."""

    def forward(self, pixel_values, labels=None, **kwargs):
        output = super().forward(pixel_values, **kwargs)
        output["logits"] = torch.tanh(output.logits)
        return output


class SmoothMaximum(transformers.ViTForImageClassification):
    """A ViT whose head reads a smooth maximum of each feature, so that no token gives its logits."""

    def forward(self, pixel_values, labels=None, **kwargs):
        hidden = self.vit(pixel_values, **{k: v for k, v in kwargs.items() if k != "return_dict"}).last_hidden_state
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.classifier(hidden.logsumexp(dim=1)))


def test_errors_name_the_cause_and_the_alternative():
    config = models.build("vit").config
    with pytest.raises(LocationError, match="does not end in a linear layer: its logits are tanh of the output of"):
        probe(TanhLogits(config), models.batch("vit"))
    with pytest.raises(
        LocationError, match=r"(?s)SmoothMaximum gives no per-location logits.*MultiMix\(\) needs the logits only"
    ):
        probe(SmoothMaximum(config), models.batch("vit"))
    nonlinear = models.build("vit")
    nonlinear.classifier = nn.Sequential(nn.Linear(32, 5), nn.Softmax(dim=-1))
    with pytest.raises(LocationError, match="does not end in a linear layer"):
        probe(nonlinear, models.batch("vit"))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99))
    with pytest.raises(LocationError, match=r"logits of shape \(4, 12, 99\).*classification models"):
        probe(gpt2, models.batch("bert"))
    with pytest.raises(ValueError, match="attention must be one of auto, cls, mean, gap, cam, uniform, got 'best'"):
        extract(models.build("vit"), attention="best", **models.batch("vit"))
    with pytest.raises(ValueError, match="pass labels"):
        extract(models.build("vit"), attention="cam", **models.batch("vit"))


def test_nonlinear_head_is_rejected_in_bfloat16():
    """The tolerance of half precision is capped, so that a softmax is not mistaken for a linear layer."""
    model = models.build("vit")
    model.classifier = nn.Sequential(nn.Linear(32, 5), nn.Softmax(dim=-1))
    inputs = {k: v.to(torch.bfloat16) for k, v in models.batch("vit").items()}
    with pytest.raises(LocationError, match="does not end in a linear layer"):
        probe(model.to(torch.bfloat16), inputs)


def test_probe_accepts_functions_that_return_tuples_of_one():
    class Nonzero(transformers.ViTForImageClassification):
        def forward(self, pixel_values, labels=None, **kwargs):
            (kept,) = torch.ones(len(pixel_values)).nonzero(as_tuple=True)
            return super().forward(pixel_values[kept], **kwargs)

    inputs = models.batch("vit")
    assert probe(Nonzero(models.build("vit").config).eval(), inputs).pool == "token[0]"


def test_output_with_as_many_numbers_and_another_shape_is_no_match():
    call = Call("head", 0, 1, None, {None: torch.ones(2, 6)})
    target = torch.ones(4, 3)
    assert call.error(target) == math.inf and call.scale_to(target) is None and not call.returns(target)
