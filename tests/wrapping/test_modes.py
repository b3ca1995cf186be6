"""The loss under mixed precision, compilation, checkpointing, frozen parts, attention implementations and masks."""

import time

import pytest
import torch
import transformers
from torch import nn

from mm_hf import DenseMultiMix, extract, probe, wrap_model
from mm_hf.locations.attention.weights import attention_rows
from tests.helpers import models, zoo

DENSE = DenseMultiMix(num_mixed=10)
# One model for each way to read attention: a registered function, a softmax, eager attention's output, PyTorch's fused
# call.
READINGS = [
    "vit",
    "bert",
    "BloomForSequenceClassification",
    "GptOssForSequenceClassification",
    "FalconForSequenceClassification",
]


def build(name):
    if name in models.MODELS:
        return models.build(name), models.batch(name, b=4)
    model = zoo.build(name)
    return model, zoo.batch(name, model)


def step(model, inputs, mixing=DENSE, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs, labels=models.labels(4)).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", READINGS)
def test_models_are_probed_in_full_precision_under_autocast(name):
    model, inputs = build(name)
    expected = probe(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert probe(model, inputs) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", READINGS)
def test_training_under_autocast(name, dtype):
    model, inputs = build(name)
    with wrap_model(model.train(), DENSE):
        model.apply(lambda m: m.eval() if isinstance(m, nn.Dropout) else None)
        expected, _ = step(model, inputs)
        with torch.autocast("cpu", dtype=dtype):
            torch.manual_seed(0)
            loss = model(**inputs, labels=models.labels(4)).loss
        loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name", READINGS)
def test_training_with_bfloat16_weights(name):
    model, inputs = build(name)
    model = model.to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    with wrap_model(model.train(), DenseMultiMix(num_mixed=10)) as handle:
        loss, gradients = step(model, inputs)
        assert handle.plan.attention is not None
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", READINGS)
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    if "GptOss" in name and reentrant:
        pytest.skip("its router's plain forward is not the checkpointed one, without mixing too")
    model, inputs = build(name)
    results = []
    for checkpointing in (False, True):
        with wrap_model(model.train(), DENSE):
            model.apply(lambda m: m.eval() if isinstance(m, nn.Dropout) else None)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            results.append(step(model, inputs))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name_, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name_], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", READINGS)
def test_compiled_model_has_the_same_loss_and_is_not_recompiled(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs = build(name)
    counter = CompileCounter()
    with wrap_model(model.train(), DENSE, example_inputs={**inputs, "labels": models.labels(4)}):
        model.apply(lambda m: m.eval() if isinstance(m, nn.Dropout) else None)
        compiled = torch.compile(model, backend=counter)
        frames = []
        for i in range(4):
            expected, _ = step(model, inputs, seed=i)
            torch.manual_seed(i)
            loss = compiled(**inputs, labels=models.labels(4)).loss
            torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
            frames.append(counter.frame_count)
    assert frames[-1] == frames[1]
    torch._dynamo.reset()


def test_input_mixing_of_a_compiled_model():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs, counter = models.build("vit").train(), models.batch("vit"), CompileCounter()
    model.apply(lambda m: m.eval() if isinstance(m, nn.Dropout) else None)
    mixing = DenseMultiMix(num_mixed=10, input_mixing_start=1.0, min_fit=0.01)
    losses, frames = [], []
    for call in (model, torch.compile(model, backend=counter)):
        torch.manual_seed(0)
        with wrap_model(model, mixing) as handle:
            for i in range(16):
                handle.epoch = i / 2
                losses.append(float(call(**inputs, labels=models.labels()).loss.detach()))
                frames.append((counter.frame_count, "loss_cutmix" in handle.pop_logs()))
    assert losses[16:] == pytest.approx(losses[:16], rel=1e-4)
    assert frames[-1][0] == frames[-8][0] and {mixed for _, mixed in frames[-8:]} == {False, True}
    torch._dynamo.reset()


@pytest.mark.parametrize("name", READINGS)
def test_linear_probing(name):
    model, inputs = build(name)
    getattr(model, model.base_model_prefix).requires_grad_(False)
    with wrap_model(model.train(), DENSE):
        _, gradients = step(model, inputs)
    assert gradients and all(not n.startswith(model.base_model_prefix + ".") for n in gradients)


@pytest.mark.parametrize("name", ["bert", "roberta", "LlamaForSequenceClassification", "BartForSequenceClassification"])
def test_missing_attention_mask_equals_a_mask_of_ones(name):
    model, _ = build(name)
    inputs = models.batch(name) if name in models.MODELS else zoo.batch(name, model, padding=None)
    if name in models.MODELS:
        inputs = {k: v[:1] for k, v in inputs.items()}  # the first row is not padded
    with_mask, without = extract(model, **inputs), extract(model, input_ids=inputs["input_ids"])
    torch.testing.assert_close(with_mask.token_logits, without.token_logits)
    torch.testing.assert_close(with_mask.attention, without.attention)
    assert torch.equal(with_mask.mask, without.mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name", ["GPT2ForSequenceClassification", "LlamaForSequenceClassification", "Qwen3ForSequenceClassification"]
)
def test_decoders_with_left_and_right_padding(name, side):
    model = zoo.build(name)
    inputs = zoo.batch(name, model, padding=side)
    output = extract(model, attention="cls", **inputs)  # checks the identity
    words = inputs["attention_mask"].bool()
    assert not output.attention[~words].any()
    one = {k: v[1:2][:, words[1]] for k, v in inputs.items()}
    if side == "right":
        alone = extract(model, attention="cls", **one)
        torch.testing.assert_close(output.attention[1:2][:, words[1]], alone.attention, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("first", "then"), [("sdpa", "eager"), ("eager", "sdpa")])
@pytest.mark.parametrize("name", ["vit", "bert", "LlamaForSequenceClassification"])
def test_attention_implementation_changes_after_wrapping(name, first, then):
    model, inputs = build(name)
    model.set_attn_implementation(first)
    with torch.no_grad():
        expected = model(**inputs).logits
        with wrap_model(model.train(), DENSE, example_inputs={**inputs, "labels": models.labels(4)}):
            output = extract(model.eval(), attention="cls", **inputs)
            model.set_attn_implementation(then)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
            again = extract(model, attention="cls", **inputs)
    torch.testing.assert_close(again.attention, output.attention, rtol=1e-4, atol=1e-5)


def test_block_masks_of_flex_attention():
    """Flex attention trains only on GPUs, but the row is computed from its mask function on any device."""
    from torch.nn.attention.flex_attention import create_block_mask

    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8)
    lengths = torch.tensor([10, 16])

    def allowed(b, h, q, k):
        return (k <= q) & (k < lengths[b])

    block = create_block_mask(allowed, 2, None, 16, 16, device="cpu")
    dense = torch.ones(16, 16).tril().bool() & (torch.arange(16) < lengths[:, None])[:, None]
    for index in (0, 7, -1, torch.tensor([9, 15]), None):
        rows = attention_rows(nn.Module(), query, key, block, index)
        torch.testing.assert_close(rows, attention_rows(nn.Module(), query, key, dense[:, None], index))


def test_padding_masks_of_flash_attention():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    module = nn.Module()
    module.is_causal = False
    rows = attention_rows(module, query, key, padding, 0)
    expected = attention_rows(module, query, key, padding[:, None, None].bool(), 0)
    torch.testing.assert_close(rows, expected)
    assert rows.shape == (2, 4, 1, 6) and not rows[0, ..., 4:].any()


def test_batch_normalization_in_the_head_keeps_its_statistics():
    name = "LevitForImageClassification"
    model = zoo.build(name).train()
    inputs = zoo.batch(name, model, b=8)
    norm = model.classifier.batch_norm
    before = norm.running_mean.clone()
    model(**inputs)
    plain = norm.running_mean.clone()
    norm.running_mean.copy_(before)
    with wrap_model(model, DENSE, example_inputs={**inputs, "labels": models.labels(8)}):
        assert torch.equal(norm.running_mean, before)
        model(**inputs, labels=models.labels(8)).loss.backward()
    torch.testing.assert_close(norm.running_mean, plain, rtol=1e-4, atol=1e-5)
    assert norm.training


def test_probing_costs_less_than_two_ordinary_forwards():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=96, num_labels=10
    )
    model = transformers.ViTForImageClassification(config).eval()
    inputs = {"pixel_values": torch.randn(32, 3, 96, 96)}

    def seconds(call):
        start = time.process_time()
        call()
        return time.process_time() - start

    with torch.no_grad():
        forward = min(seconds(lambda: model(**inputs)) for _ in range(4))
    probing = min(seconds(lambda: probe(model, inputs)) for _ in range(4))
    assert probing < 2 * forward
