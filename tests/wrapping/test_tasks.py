"""Labels other than one class per example: several classes, numbers, a label for every token or pixel."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from mm_hf import ERM, DenseMultiMix, LocationError, Mixup, MultiMix, MultiMixTrainer, extract, wrap_model
from mm_hf.distributed import rank_generator
from mm_hf.methods import pairs
from tests.helpers import digits, models, zoo


class Mean(MultiMix):
    """MultiMix whose mixed examples are all the mean of the batch, for a computation by hand."""

    def sample(self, num_examples, device, generator=None):
        return torch.full((num_examples, 7), 1 / num_examples)


class DenseMean(DenseMultiMix):
    sample = Mean.sample


PROBLEMS = {
    "multi_label_classification": (lambda: (torch.rand(6, 5) < 0.4).float(), F.binary_cross_entropy_with_logits),
    "regression": (lambda: torch.randn(6, 5), F.mse_loss),
}


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("problem", sorted(PROBLEMS))
def test_losses_of_other_problem_types_equal_a_computation_by_hand(problem, name):
    torch.manual_seed(0)
    make, criterion = PROBLEMS[problem]
    model, inputs, labels = models.build(name, problem_type=problem), models.batch(name), make()
    clean = model(**inputs, labels=labels).loss
    for mixing in (Mean(), DenseMean(attention="uniform"), ERM()):
        with wrap_model(model, mixing):
            model.training = True  # its submodules stay in evaluation mode, without dropout
            loss = model(**inputs, labels=labels).loss
            model.training = False
        output = extract(model, attention="uniform", **inputs)
        expected = clean
        if isinstance(mixing, Mean):
            expected = clean + criterion(output.logits.mean(0), labels.mean(0))
        elif isinstance(mixing, DenseMean):
            share = output.attention / output.attention.sum(0, keepdim=True).clamp(min=1e-30)
            occupied = output.attention.sum(0) > 0
            logits, targets = torch.einsum("br,brc->rc", share, output.token_logits), share.T @ labels
            expected = clean + criterion(logits[occupied], targets[occupied])
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert model.config.problem_type == problem


def test_regression_with_one_output_trains(tmp_path):
    """The label is the amount of ink in an image of a digit."""
    data = digits.dataset(0, 96, extra=False).remove_columns("label")
    data = data.add_column("labels", [float(image.mean()) for image in data["pixel_values"]]).with_format("torch")
    model = digits.vit(num_labels=1)
    args = digits.arguments(tmp_path, num_train_epochs=20, learning_rate=3e-3)
    trainer = MultiMixTrainer(model, args, mixing=DenseMultiMix(num_mixed=20), train_dataset=data)
    trainer.train()
    losses = [entry["loss_clean"] for entry in trainer.state.log_history if "loss_clean" in entry]
    assert losses[-1] < 0.3 * losses[0] and model.config.problem_type == "regression"


def test_mixup_mixes_real_valued_labels():
    torch.manual_seed(0)
    model, inputs = models.build("vit"), models.batch("vit")
    numbers = torch.randn(6, 5)
    torch.manual_seed(1)
    _, mixed = Mixup().mix_inputs(inputs, numbers, model, "mse")
    torch.manual_seed(1)
    generator = rank_generator("cpu")
    factor = pairs.draw_factor(1.0, generator)
    torch.testing.assert_close(mixed, numbers.lerp(numbers[torch.randperm(6, generator=generator)], 1 - factor))


# ---- a label for every location ----

TOKENS = ["BertForTokenClassification", "RobertaForTokenClassification", "GPT2ForTokenClassification"]


def token_model(name):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if "GPT2" in name else models.TEXT
    config = cls.config_class(**{**sizes, "vocab_size": 99, "num_labels": 5, "pad_token_id": 0})
    model = cls(config).eval()
    batch = models.batch("bert")
    labels = torch.randint(5, batch["input_ids"].shape)
    labels[batch["input_ids"] < 10] = -100
    return model, batch, labels


@pytest.mark.parametrize("name", TOKENS)
def test_token_classification_mixes_labels_of_locations(name):
    model, inputs, labels = token_model(name)
    clean = model(**inputs, labels=labels).loss
    with wrap_model(model, DenseMean(dense_weight=2.0)) as handle:
        model.training = True
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        model.training = False
        assert handle.plan.pool == "every"
    logits, dense = model(**inputs).logits, []
    for j in range(labels.shape[1]):
        there = labels[:, j] != -100
        if there.any():
            target = F.one_hot(labels[there, j], 5).float().mean(0)
            dense.append(-(target * logits[there, j].mean(0).log_softmax(-1)).sum())
    torch.testing.assert_close(loss, clean + 2 * torch.stack(dense).mean(), rtol=1e-4, atol=1e-5)
    output = extract(model, **inputs)
    torch.testing.assert_close(output.token_logits, output.logits)
    assert torch.equal(output.mask, inputs["attention_mask"].bool())


def test_mean_attention_weights_tokens():
    model, inputs, _ = token_model("BertForTokenClassification")
    output = extract(model, attention="mean", **inputs)
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True).attentions[-1].mean(dim=(1, 2)) * output.mask
    torch.testing.assert_close(output.attention, expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    with pytest.raises(LocationError, match='labels every location.*Use "uniform" or "mean"'):
        extract(model, attention="cls", **inputs)


def test_segmentation_mixes_labels_of_pixels():
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[1, 2], sr_ratios=[2, 1],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    images = torch.randn(4, 3, 16, 16)
    labels = torch.randint(4, (4, 16, 16))
    labels[:, :3] = 255
    clean = model(images, labels=labels).loss
    with wrap_model(model, DenseMean()) as handle:
        model.training = True
        loss = model(images, labels=labels).loss
        loss.backward()
        model.training = False
        assert "segformer" in str(handle.plan) or "decode_head" in str(handle.plan)
    logits = model(images).logits
    small = F.interpolate(labels[:, None].double(), size=logits.shape[-2:], mode="nearest-exact")[:, 0].long()
    dense = []
    for y in range(small.shape[1]):
        for x in range(small.shape[2]):
            there = small[:, y, x] != 255
            if there.any():
                target = F.one_hot(small[there, y, x], 4).float().mean(0)
                dense.append(-(target * logits[there, :, y, x].mean(0).log_softmax(-1)).sum())
    torch.testing.assert_close(loss, clean + torch.stack(dense).mean(), rtol=1e-4, atol=1e-5)
    with pytest.raises(LocationError, match='Use "uniform"'):
        extract(model, attention="mean", pixel_values=images)


def test_token_classification_trains(tmp_path):
    """The label of a token is 1 if its id lies in the upper half of the vocabulary."""
    model, _, _ = token_model("BertForTokenClassification")
    batch = models.batch("bert", b=64)
    labels = (batch["input_ids"] > 50).long().masked_fill(batch["input_ids"] < 10, -100)
    rows = [{"labels": labels[i], **{k: v[i] for k, v in batch.items()}} for i in range(64)]
    args = digits.arguments(tmp_path, num_train_epochs=20, learning_rate=3e-3)
    trainer = MultiMixTrainer(model, args, mixing=DenseMultiMix(num_mixed=20), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss_clean"] for entry in trainer.state.log_history if "loss_clean" in entry]
    assert losses[-1] < 0.5 * losses[0]
    plain = transformers.Trainer(model, args, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_labels_that_do_not_fit_raise_a_value_error():
    def raises(message, model, inputs, labels, mixing, error=ValueError, **more):
        with pytest.raises(error, match=message), wrap_model(model.train(), mixing, **more):
            model(**inputs, labels=labels)

    model, inputs, labels = token_model("BertForTokenClassification")
    raises("label for every location.*DenseMultiMix", model, inputs, labels, MultiMix(num_mixed=5))
    raises("label for every location", model, inputs, labels, DenseMultiMix(num_mixed=5, preset="paper"))
    vit, images = models.build("vit"), models.batch("vit")
    raises("one class per example.*multi_label", vit, images, torch.ones(6, 5).long(), DenseMultiMix(num_mixed=5))
    raises("integer labels have the shape", model, inputs, labels[:, :4], DenseMultiMix(num_mixed=5))
    several = (torch.rand(6, 5) < 0.5).float()
    several[0] = 1
    single = models.build("vit", problem_type="single_label_classification")
    raises('no class probabilities.*problem_type = "multi_label', single, images, several, DenseMultiMix(num_mixed=5))
    multi = models.build("vit", problem_type="multi_label_classification")
    raises("labels lie in", multi, images, several * 3, DenseMultiMix(num_mixed=5))
    raises("label_smoothing spreads", multi, images, several, DenseMultiMix(num_mixed=5), label_smoothing=0.1)
    generator = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, num_labels=5)
    )
    words = models.batch("bert")
    for mixing in (MultiMix(num_mixed=5), DenseMultiMix(num_mixed=5)):
        raises("Models for generation", generator, words, torch.zeros(6, dtype=torch.long), mixing, LocationError)
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**{**models.TEXT, "num_labels": 5}))
    raises(
        "masked language modeling",
        masked,
        words,
        torch.zeros(6, dtype=torch.long),
        DenseMultiMix(num_mixed=5),
        LocationError,
    )


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"])
def test_decoders_with_one_output_have_locations(name):
    """Their head scores each token, and the model takes the score of the last one."""
    model, inputs = zoo.build(name, num_labels=1, pad_token_id=0), models.batch("bert")
    output = extract(model, **inputs)
    last = inputs["attention_mask"].sum(dim=1) - 1
    torch.testing.assert_close(output.token_logits[torch.arange(6), last], output.logits)
    with wrap_model(model.train(), DenseMultiMix(num_mixed=5)):
        assert model(**inputs, labels=torch.randn(6)).loss.isfinite()


def test_attention_of_a_skipped_layer_is_an_error_that_names_the_setting():
    model = zoo.build("WavLMForSequenceClassification", layerdrop=0.0).train()
    inputs = {**zoo.batch("WavLMForSequenceClassification", model, b=4), "labels": torch.arange(4)}
    with wrap_model(model, DenseMultiMix(num_mixed=5, attention="mean"), example_inputs=inputs):
        model.config.layerdrop = 1.0
        with pytest.raises(LocationError, match="did not compute the attention of .*layerdrop.*set it to 0"):
            model(**inputs)
