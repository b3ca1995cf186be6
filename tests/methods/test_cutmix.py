import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mm_hf import CutMix, LocationError, TransMix, wrap_model
from mm_hf.methods.cutmix import area, draw_box
from mm_hf.methods.transmix import grid_of, patches_of
from tests.helpers import models, zoo

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def pasted(images, seed, alpha=1.0):
    """Return the mixed images, the partners, and the rectangle (top, bottom, left, right) that CutMix draws."""
    torch.manual_seed(seed)
    result = CutMix(alpha=alpha).paste({"pixel_values": images}, Model())
    height, width = images.shape[-2:]
    box = (*result.spans.get(-2, (0, height)), *result.spans.get(-1, (0, width)))
    return result.inputs["pixel_values"], result.partner, box


class Model:
    class config:  # noqa: N801
        num_labels = 5


@pytest.mark.parametrize("side", [32, (24, 48)])
@pytest.mark.parametrize("seed", range(4))
def test_cutmix_equals_kornia_on_the_same_draws(side, seed):
    kornia = pytest.importorskip("kornia.augmentation")
    images, model = models.batch("vit", side=side)["pixel_values"], models.build("vit")
    torch.manual_seed(seed)
    inputs, targets = CutMix().mix_inputs({"pixel_values": images}, LABELS, model)
    _, partner, (top, bottom, left, right) = pasted(images, seed)
    corners = [[left, top], [right - 1, top], [right - 1, bottom - 1], [left, bottom - 1]]
    params = {
        "mix_pairs": partner[None],
        "crop_src": torch.tensor(corners).expand(1, 6, 4, 2).float(),
        "image_shape": torch.tensor(images.shape[-2:]),
        "batch_prob": torch.ones(6),
        "dtype": torch.tensor(0),
    }
    method = kornia.RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True)
    theirs, classes = method(images, LABELS, params=params)
    torch.testing.assert_close(inputs["pixel_values"], theirs)
    first, second, kept = classes[0].T
    expected = F.one_hot(first.long(), 5) * kept[:, None] + F.one_hot(second.long(), 5) * (1 - kept[:, None])
    torch.testing.assert_close(targets, expected)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000), st.floats(0.1, 4))
def test_labels_weigh_the_exact_share_of_pixels(height, width, seed, alpha):
    """All pixels of image i are i, so that the share of each image can be counted."""
    images = torch.arange(5.0)[:, None, None, None].expand(5, 2, height, width)
    mixed, partner, box = pasted(images, seed, alpha)
    torch.manual_seed(seed)
    _, targets = CutMix(alpha=alpha).mix_inputs({"pixel_values": images}, torch.arange(5), Model())
    for i in range(5):
        counted = torch.stack([(mixed[i] == j).float().mean() for j in range(5)])
        torch.testing.assert_close(targets[i], counted)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(5))
    assert 0 <= area(box) <= height * width and sorted(partner.tolist()) == list(range(5))


def test_box_area_lies_between_nothing_and_the_complete_image():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        assert area(draw_box(20, 30, 1.0, generator)) == 0
        assert 0 < area(draw_box(20, 30, 0.0, generator)) <= 600


def test_frames_of_a_video_share_one_box():
    videos = models.batch("vit")["pixel_values"][:, None].repeat(1, 3, 1, 1, 1) + torch.arange(3)[:, None, None, None]
    mixed, _, _ = pasted(videos, 3)
    images, _, _ = pasted(videos[:, 0], 3)
    torch.testing.assert_close(mixed[:, 0], images)
    torch.testing.assert_close(mixed[:, 2] - 2, images)


def test_video_models_train_with_cutmix_and_reject_transmix():
    name = "VivitForVideoClassification"
    model = zoo.build(name).train()
    inputs = zoo.batch(name, model)
    with wrap_model(model, CutMix()):
        model(**inputs, labels=models.labels(4)).loss.backward()
    with wrap_model(model, TransMix()), pytest.raises(ValueError, match="cuts and pastes images .batch, channels"):
        model(**inputs, labels=models.labels(4))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (CutMix(), "bert"),
        (CutMix(), "LayoutLMv3ForSequenceClassification"),
        (TransMix(), "bert"),
        (TransMix(), "ASTForAudioClassification"),
    ],
    ids=str,
)
def test_inputs_that_cannot_be_cut_are_rejected_before_training(method, name):
    model = models.build(name) if name in models.MODELS else zoo.build(name)
    inputs = models.batch(name, b=4) if name in models.MODELS else zoo.batch(name, model)
    message = f"{type(method).__name__} cuts and pastes images .* this batch has .*: use Mixup"
    with pytest.raises(ValueError, match=message):
        wrap_model(model.train(), method, example_inputs={**inputs, "labels": models.labels(4)})
    assert "forward" not in model.__dict__


# ---- Sequences and audio ----

SEQUENCES = {
    "raw audio (batch, time)": ((40,), None),
    "(batch, features, time)": ((3, 40), None),
    "(batch, time, features)": ((40, 3), None),
    "image of height 1": ((2, 1, 40), None),
    "image of width 1": ((2, 40, 1), None),
    "video of height 1": ((2, 3, 1, 40), None),
    "more mel bins than frames": ((64, 40), 64),
    "fewer frames than mel bins": ((40, 64), 64),
}


def literal_cut(x, time_axis, start, end, partner):
    """Replace one moment of one example at a time."""
    mixed = x.clone()
    for i in range(len(x)):
        for t in range(start, end):
            mixed[i].select(time_axis, t).copy_(x[partner[i]].select(time_axis, t))
    return mixed


class AudioModel(Model):
    def __init__(self, num_mel_bins):
        self.config = type("Config", (), {"num_labels": 5, "num_mel_bins": num_mel_bins})


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_stretch_of_time_is_replaced_and_labels_weigh_its_exact_share(kind, alpha):
    shape, mel_bins = SEQUENCES[kind]
    x, model, method = torch.randn(5, *shape), AudioModel(mel_bins), CutMix(alpha=alpha)
    axis, shares = shape.index(40), []
    for seed in range(20):
        torch.manual_seed(seed)
        result = method.paste({"input_values": x}, model)
        ((cut_axis, (start, end)),) = result.spans.items()
        assert len(shape) + cut_axis == axis
        expected = literal_cut(x, axis, start, end, result.partner)
        torch.testing.assert_close(result.inputs["input_values"], expected, rtol=0, atol=0)
        torch.manual_seed(seed)
        _, targets = method.mix_inputs({"input_values": x}, torch.arange(5), model)
        expected = torch.zeros(5, 5)
        for i, j in enumerate(result.partner):
            for t in range(40):
                expected[i, j if start <= t < end else i] += 1 / 40
        torch.testing.assert_close(targets, expected)
        shares.append(result.share)
    assert sum(share > 0 for share in shares) >= 12  # a rectangle in one row of pixels would be empty


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", ["raw audio (batch, time)", "(batch, features, time)", "(batch, time, features)"])
def test_only_time_that_is_valid_in_both_examples_is_replaced(kind, padding):
    shape, _ = SEQUENCES[kind]
    x, lengths = torch.randn(5, *shape), torch.tensor([40, 31, 22, 13, 4])
    mask = (torch.arange(40) < lengths[:, None]).long()
    mask = mask.flip(1) if padding == "left" else mask
    axis = shape.index(40)
    for seed in range(10):
        inputs = {"input_values": x, "attention_mask": mask}
        torch.manual_seed(seed)
        result = CutMix().paste(inputs, Model())
        torch.manual_seed(seed)
        mixed, targets = CutMix().mix_inputs(inputs, torch.arange(5), Model())
        (start, end), partner = next(iter(result.spans.values())), result.partner
        expected, weights = x.clone(), torch.zeros(5, 5)
        for i, j in enumerate(partner):
            for t in range(40):
                replaced = start <= t < end and mask[i, t] and mask[j, t]
                if replaced:
                    expected[i].select(axis, t).copy_(x[j].select(axis, t))
                if mask[i, t]:
                    weights[i, j if replaced else i] += 1 / mask[i].sum()
        torch.testing.assert_close(mixed["input_values"], expected, rtol=0, atol=0)
        torch.testing.assert_close(targets, weights)
        assert torch.equal(mixed["attention_mask"], mask)


@pytest.mark.parametrize(
    "name",
    [
        "ASTForAudioClassification",
        "HubertForSequenceClassification",
        "Wav2Vec2BertForSequenceClassification",
        "Wav2Vec2ForSequenceClassification",
        "WhisperForAudioClassification",
    ],
)
def test_audio_models_train_with_cutmix(name):
    model = zoo.build(name).train()
    inputs = zoo.batch(name, model)
    with wrap_model(model, CutMix()) as handle:
        for _ in range(3):
            model(**inputs, labels=models.labels(len(next(iter(inputs.values()))), 2)).loss.backward()
    assert handle.pop_logs()["loss_cutmix"] > 0


def test_an_unclear_time_axis_is_an_error():
    with pytest.raises(ValueError, match=r"CutMix cannot tell time from features in input_features \(4, 64, 64\)"):
        CutMix().check_inputs({"input_features": torch.zeros(4, 64, 64)}, Model())
    CutMix().check_inputs({"input_features": torch.zeros(4, 64, 32)}, Model())
    with pytest.raises(ValueError, match="CutMix cuts and pastes .* this batch has inputs_embeds"):
        CutMix().check_inputs({"inputs_embeds": torch.zeros(4, 64, 32)}, Model())


# ---- TransMix ----


def by_hand(model, images, labels, seed, share, smoothing=0.0):
    """Compute the loss with eager attention and weights as in the authors' `transmix_label`."""
    mixed, partner, (top, bottom, left, right) = pasted(images, seed)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(pixel_values=mixed, output_attentions=True)
    prefix = output.attentions[-1].shape[-1] - (images.shape[-2] // 8) * (images.shape[-1] // 8)
    attention = output.attentions[-1].mean(dim=1)[:, 0, prefix:].detach()
    mask = torch.zeros(images.shape[-2:])
    mask[top:bottom, left:right] = 1
    mask = torch.nn.Upsample(size=(images.shape[-2] // 8, images.shape[-1] // 8))(mask[None, None]).int().view(1, -1)
    kept, new = ((1 - mask) * attention).sum(dim=1), (mask * attention).sum(dim=1)
    weight = (1 - share) * (bottom - top) * (right - left) / images[0, 0].numel() + share * new / (kept + new)
    one_hot = F.one_hot(labels, 5) * (1 - smoothing) + smoothing / 5
    targets = one_hot * (1 - weight[:, None]) + one_hot[partner] * weight[:, None]
    return -(targets * output.logits.log_softmax(dim=1)).sum(dim=1).mean()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["vit", "deit", "beit-cls"])
def test_transmix_equals_the_authors_formula(name, share):
    model, images = models.build(name), models.batch(name)["pixel_values"]
    twin = copy.deepcopy(model)
    expected = by_hand(twin, images, LABELS, 5, share, 0.1)
    with wrap_model(
        model,
        TransMix(attention_share=share),
        label_smoothing=0.1,
        example_inputs={"pixel_values": images, "labels": LABELS},
    ):
        model.training = True
        torch.manual_seed(5)
        loss = model(pixel_values=images, labels=LABELS).loss
    torch.testing.assert_close(loss, expected)
    if name == "vit":
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        by_hand(model, images, LABELS, 5, share, 0.1)  # of a copy of the model, which has its own gradients
        model.set_attn_implementation("eager")
        mixed, partner, _ = pasted(images, 5)
        weight = transmix_weight(model, mixed, images, share)
        one_hot = F.one_hot(LABELS, 5) * 0.9 + 0.02
        targets = one_hot * (1 - weight) + one_hot[partner] * weight
        F.cross_entropy(model(pixel_values=mixed).logits, targets).backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=1e-3, atol=1e-5)


def transmix_weight(model, mixed, images, share):
    _, _, box = pasted(images, 5)
    with torch.no_grad():
        attention = model(pixel_values=mixed, output_attentions=True).attentions[-1].mean(dim=1)[:, 0, 1:]
    attention = attention / attention.sum(dim=1, keepdim=True)
    by_attention = (attention * patches_of(box, (32, 32), 16)).sum(dim=1)
    return ((1 - share) * area(box) / 1024 + share * by_attention)[:, None]


def test_transmix_without_attention_equals_cutmix():
    losses = []
    for method in (CutMix(), TransMix(attention_share=0.0)):
        model, images = models.build("vit"), models.batch("vit")
        with wrap_model(model, method, example_inputs={**images, "labels": LABELS}):
            model.training = True
            torch.manual_seed(2)
            losses.append(model(**images, labels=LABELS).loss)
    torch.testing.assert_close(*losses)


def test_one_method_serves_several_mini_batches():
    method, images = TransMix(), models.batch("vit")
    first, second = method.for_batch(images, LABELS), method.for_batch(images, LABELS)
    torch.manual_seed(0)
    first.mix_inputs(dict(images), LABELS, models.build("vit"))
    kept = first.pasted
    second.mix_inputs(dict(images), LABELS, models.build("vit"))
    assert first.pasted is kept and method.pasted is None and first == second == method


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 32), st.data())
def test_grid_of_patches_follows_from_their_number(rows, columns, patch, data):
    height = rows * patch + data.draw(st.integers(0, (patch - 1) // 4))
    width = columns * patch + data.draw(st.integers(0, (patch - 1) // 4))
    found = grid_of((height, width), rows * columns)
    assert found[0] * found[1] == rows * columns
    if height == rows * patch and width == columns * patch:
        assert found == (rows, columns)


def test_transmix_rejects_invalid_settings_and_models_without_a_grid_or_a_cls_token():
    with pytest.raises(LocationError, match="10 locations are no grid of square patches of images of 32 x 32 pixels"):
        grid_of((32, 32), 10)
    with pytest.raises(ValueError, match=r"attention_share must lie in \[0, 1\], got 2"):
        TransMix(attention_share=2)
    model, images = zoo.build("SwinForImageClassification"), None
    images = zoo.batch("SwinForImageClassification", model)
    with pytest.raises(LocationError, match='attention="cls" needs a CLS token'):
        wrap_model(model.train(), TransMix(), example_inputs={**images, "labels": models.labels(4)})


def test_locations_are_not_scored_for_transmix():
    model, images = models.build("vit").train(), models.batch("vit")
    calls = []
    with wrap_model(model, TransMix(), example_inputs={**images, "labels": LABELS}):
        hook = model.classifier.register_forward_hook(lambda module, args, output: calls.append(output.shape))
        model(**images, labels=LABELS).loss.backward()
        hook.remove()
    assert calls == [(6, 5)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_transmix_under_autocast_and_checkpointing(dtype):
    losses = []
    for checkpointing in (False, True):
        model, images = models.build("vit").train(), models.batch("vit")
        if checkpointing:
            model.gradient_checkpointing_enable()
        with wrap_model(model, TransMix()), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            torch.manual_seed(1)
            losses.append(model(**images, labels=LABELS).loss)
            losses[-1].backward()
    torch.testing.assert_close(*losses)
    assert losses[0].dtype == torch.float32
