import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_bidirectional_mask

from mm_hf import LocationError, ManifoldMixup, wrap_model
from mm_hf.locations import Blocks, find_blocks
from tests.helpers import models, zoo

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
LAYERS = 3


def build(name, **changes):
    return models.build(name, num_hidden_layers=LAYERS, **changes)


def drawn(seed, model, alpha=2.0):
    """Return the block, the factor and the partners that the method draws."""
    torch.manual_seed(seed)
    step = ManifoldMixup(alpha=alpha).for_batch({}, torch.arange(4))
    step.mix_inputs({}, LABELS, model)
    how = step.block_mixing
    return int(how.depth * LAYERS), 1 - float(how.share), how.partner


def by_hand(name, model, inputs, seed):
    """Compute the logits and the loss by calling the layers one by one."""
    block, factor, partner = drawn(seed, model)
    if name == "vit":
        hidden, mask = model.vit.embeddings(inputs["pixel_values"]), None
        layers = model.vit.layers
    else:
        both = torch.stack(
            [torch.maximum(a, b) for a, b in zip(inputs["attention_mask"], inputs["attention_mask"][partner])]
        )
        hidden, layers = model.bert.embeddings(inputs["input_ids"]), model.bert.encoder.layer
        mask = create_bidirectional_mask(config=model.config, inputs_embeds=hidden, attention_mask=both)
    for i, layer in enumerate(layers):
        if i == block:
            hidden = factor * hidden + (1 - factor) * torch.stack([hidden[j] for j in partner])
        hidden = layer(hidden, mask)
    if name == "vit":
        logits = model.classifier(model.vit.layernorm(hidden)[:, 0])
    else:
        logits = model.classifier(model.bert.pooler(hidden))
    losses = logits.log_softmax(dim=1)
    own, other = (-losses.gather(1, y[:, None])[:, 0] for y in (LABELS, LABELS[partner]))
    return logits, (factor * own + (1 - factor) * other).mean()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_logits_loss_and_gradients_equal_a_computation_by_hand(name, seed):
    model, inputs = build(name), models.batch(name)
    model.training = True  # its submodules stay in evaluation mode, without dropout
    logits, loss = by_hand(name, model, inputs, seed)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with wrap_model(model, ManifoldMixup(), example_inputs={**inputs, "labels": LABELS}) as handle:
        torch.manual_seed(seed)
        output = model(**inputs, labels=LABELS)
        output.loss.backward()
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, loss)
    assert expected
    for n, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(n).grad, gradient, rtol=1e-4, atol=1e-6)
    assert handle.pop_logs() == {"loss_manifold_mixup": pytest.approx(float(loss.detach()), rel=1e-4)}


def test_blocks_are_drawn_uniformly():
    model = build("vit")
    count = torch.bincount(torch.tensor([drawn(seed, model)[0] for seed in range(600)]), minlength=LAYERS)
    assert len(count) == LAYERS and (count - 200).abs().max() < 50


def test_evaluation_and_calls_without_labels_are_not_mixed():
    model, inputs = build("vit"), models.batch("vit")
    with torch.no_grad():
        expected, features = model(**inputs, labels=LABELS), model.vit(**inputs)[0]
        with wrap_model(model, ManifoldMixup(), example_inputs={**inputs, "labels": LABELS}):
            model.training = True
            model(**inputs, labels=LABELS)
            torch.testing.assert_close(model(**inputs).logits, expected.logits, rtol=0, atol=0)
            torch.testing.assert_close(model.vit(**inputs)[0], features, rtol=0, atol=0)
            again = model.eval()(**inputs, labels=LABELS)
    assert torch.equal(again.logits, expected.logits) and torch.equal(again.loss, expected.loss)


def test_remove_removes_the_hooks_and_an_error_ends_the_mixing():
    model, inputs = build("vit").train(), models.batch("vit")
    handle = wrap_model(model, ManifoldMixup(), example_inputs={**inputs, "labels": LABELS})
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == LAYERS
    pickle.loads(pickle.dumps(handle._state.blocks))
    hook = model.vit.layernorm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, labels=LABELS)
    hook.remove()
    assert handle._state.blocks.mixing is None
    handle.remove()
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    results = []
    for checkpointing in (False, True):
        model, inputs = build(name).train(), models.batch(name)
        model.apply(lambda m: m.eval() if isinstance(m, nn.Dropout) else None)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with wrap_model(model, ManifoldMixup()):
            losses = []
            for seed in range(4):  # several forwards before the backward pass
                torch.manual_seed(seed)
                losses.append(model(**inputs, labels=LABELS).loss)
            sum(losses).backward()
        results.append((losses, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_hooks_is_rejected(reentrant):
    model, inputs = build("vit").train(), models.batch("vit")
    layers = model.vit.layers
    layer_call = type(layers[0]).__call__

    class Checkpointed(type(layers[0])):
        def __call__(self, *args, **kwargs):  # hooks are called within
            return checkpoint(layer_call, self, *args, use_reentrant=reentrant, **({} if reentrant else kwargs))

    for layer in layers:
        layer.__class__ = Checkpointed
    with wrap_model(model, ManifoldMixup()):
        loss = model(**inputs, labels=LABELS).loss
        with pytest.raises(ValueError, match="recomputed in the backward pass, where its input is not mixed"):
            loss.backward()


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_compiled_model_mixes_alike_and_is_not_recompiled_per_block(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs = build(name).train(), models.batch(name)
    model.apply(lambda m: m.eval() if isinstance(m, nn.Dropout) else None)
    counter = CompileCounter()
    with wrap_model(model, ManifoldMixup(), example_inputs={**inputs, "labels": LABELS}):
        compiled = torch.compile(model, backend=counter)
        blocks, frames = set(), []
        for seed in range(8):
            blocks.add(drawn(seed, model)[0])
            torch.manual_seed(seed)
            expected = model(**inputs, labels=LABELS).loss
            torch.manual_seed(seed)
            torch.testing.assert_close(compiled(**inputs, labels=LABELS).loss, expected, rtol=1e-4, atol=1e-5)
            frames.append(counter.frame_count)
    assert blocks == set(range(LAYERS)) and frames[-1] == frames[0] <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_manifold_mixup_in_half_precision(name):
    model, inputs = build(name).train(), models.batch(name)
    model.apply(lambda m: m.eval() if isinstance(m, nn.Dropout) else None)
    with wrap_model(model, ManifoldMixup()):
        torch.manual_seed(0)
        expected = model(**inputs, labels=LABELS).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.manual_seed(0)
            loss = model(**inputs, labels=LABELS).loss
        loss.backward()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.1)
        model.to(torch.bfloat16)
        inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
        torch.manual_seed(0)
        torch.testing.assert_close(model(**inputs, labels=LABELS).loss, expected, rtol=0.05, atol=0.2)


def test_manifold_mixup_under_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False
    )
    model, inputs = peft.get_peft_model(build("vit"), config).train(), models.batch("vit")
    with wrap_model(model, ManifoldMixup()) as handle:
        model(**inputs, labels=LABELS).loss.backward()
        assert handle._state.blocks.blocks.names[0] == "base_model.model.vit.layers.0"
        model.add_adapter("second", config)
        model.set_adapter("second")
        model(**inputs, labels=LABELS).loss.backward()
        inside = [m for m in model.modules() if m is not model.get_base_model()]
        assert sum(len(m._forward_pre_hooks) for m in inside) == LAYERS


# ---- the search for blocks ----


@pytest.mark.parametrize(
    ("name", "first", "calls"),
    [
        ("SwinForImageClassification", "swin.encoder.layers.0", 2),
        ("ResNetForImageClassification", "resnet.encoder.stages.0", 4),
        ("AlbertForSequenceClassification", "albert.encoder.albert_layer_groups.0", 2),  # one module, called twice
        ("ModernBertForSequenceClassification", "model.layers.0", 2),
        ("ASTForAudioClassification", "audio_spectrogram_transformer.layers.0", 2),
        ("VivitForVideoClassification", "vivit.layers.0", 2),
    ],
)
def test_blocks_of_other_architectures_are_found_and_train(name, first, calls):
    model = zoo.build(name)
    inputs = zoo.batch(name, model)
    blocks = find_blocks(model, inputs)
    assert (blocks.names[0], blocks.calls) == (first, calls)
    with wrap_model(model.train(), ManifoldMixup()):
        model(**inputs, labels=models.labels(4)).loss.backward()


# Paths around: a second stack or input, boxes, pooled and reversible streams, embeddings that every layer reads.
REFUSED = {
    *("Bart", "BigBirdPegasus", "MBart", "MT5", "Mvp", "PLBart", "T5", "T5Gemma", "T5Gemma2", "UMT5"),
    *(
        "Funnel",
        "LayoutLMv3",
        "Lilt",
        "Reformer",
        "ShieldGemma2",
        "SqueezeBert",
        "VideoPrism",
        "XLNet",
        "Zamba",
        "Zamba2",
    ),
}
LONGER = {"ReformerForSequenceClassification": {"length": 64, "padding": None}}


@pytest.mark.zoo
@pytest.mark.skipif(transformers.__version__ < "5.23", reason="the list of classes is that of Transformers 5.23")
@pytest.mark.parametrize("name", zoo.class_names())
@pytest.mark.filterwarnings("ignore")
def test_every_class_trains_or_is_rejected(name):
    try:
        model = zoo.build(name)
    except zoo.Unavailable as error:
        pytest.skip(str(error))
    inputs = zoo.batch(name, model, **LONGER.get(name, {"padding": "left"}))
    if name.split("For")[0] in REFUSED:
        with pytest.raises(LocationError, match="has no list of blocks"):
            find_blocks(model, inputs)
        return
    if hasattr(model.config, "layerdrop"):
        model.config.layerdrop = 0.0
    with wrap_model(model.train(), ManifoldMixup()) as handle:
        for seed in range(2):
            torch.manual_seed(seed)
            loss = model(**inputs, labels=models.labels(4)).loss
            loss.backward()
            assert loss.isfinite() and handle._state.blocks.calls == handle._state.blocks.blocks.calls


def test_layerdrop_is_rejected():
    name = "Wav2Vec2BertForSequenceClassification"
    model = zoo.build(name, layerdrop=1.0)
    with (
        wrap_model(model.train(), ManifoldMixup()),
        pytest.raises(ValueError, match=r"skips each layer with probability 1 in training \(layerdrop\)"),
    ):
        model(**zoo.batch(name, model), labels=models.labels(4))


def test_decoders_require_left_padding():
    name = "LlamaForSequenceClassification"
    model = zoo.build(name)
    assert find_blocks(model, zoo.batch(name, model, padding="left")).calls == 2
    assert find_blocks(model, zoo.batch(name, model, padding=None)).calls == 2
    with pytest.raises(LocationError, match="the position of the last word .then pad on the left"):
        find_blocks(model, zoo.batch(name, model, padding="right"))


@pytest.mark.parametrize("name", ["BartForSequenceClassification", "T5ForSequenceClassification"])
def test_paths_around_the_blocks_are_detected(name):
    model = zoo.build(name)
    inputs = {**zoo.batch(name, model), "labels": models.labels(4)}
    with pytest.raises(LocationError, match="has no list of blocks .tried: .*decoder.* such that its logits"):
        wrap_model(model.train(), ManifoldMixup(), example_inputs=inputs)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_search_for_blocks_leaves_the_model_unchanged():
    model, inputs = build("vit").train(), models.batch("vit")
    state = torch.get_rng_state()
    assert find_blocks(model, inputs) == Blocks(tuple(f"vit.layers.{i}" for i in range(LAYERS)), LAYERS)
    assert torch.equal(state, torch.get_rng_state()) and model.training and model.vit.layers[0].training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with torch.no_grad():  # zero-initialized heads give equal logits
        model.classifier.weight.zero_()
    assert find_blocks(model, inputs).calls == LAYERS and not model.classifier.weight.any()
    with pytest.raises(LocationError, match="pass a mini-batch of at least 2"):
        find_blocks(model, {"pixel_values": inputs["pixel_values"][:1]})


def test_loss_is_the_soft_cross_entropy():
    """With label smoothing and ignored labels."""
    model, inputs = build("vit"), models.batch("vit")
    labels = torch.tensor([0, 1, -100, 3, 4, 0])
    with wrap_model(model, ManifoldMixup(), label_smoothing=0.1, example_inputs={**inputs, "labels": labels}):
        model.training = True
        torch.manual_seed(1)
        output = model(**inputs, labels=labels)
    _, factor, partner = drawn(1, model)
    one_hot = F.one_hot(labels.clamp(min=0), 5) * (labels >= 0)[:, None]
    targets = factor * one_hot + (1 - factor) * one_hot[partner]
    targets = 0.9 * targets + 0.02 * targets.sum(dim=1, keepdim=True)
    expected = -(targets * output.logits.log_softmax(dim=1)).sum() / targets.sum()
    torch.testing.assert_close(output.loss, expected)
