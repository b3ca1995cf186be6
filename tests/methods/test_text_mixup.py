"""Mixup of texts: the head reads the token that it reads of the longer text, with padding on either side."""

import copy

import pytest
import torch

from mm_hf import DenseMultiMix, LocationError, Mixup, MultiMix, wrap_model
from mm_hf.methods import mixup
from tests.helpers import zoo

DECODERS = [
    "LlamaForSequenceClassification",
    "GPT2ForSequenceClassification",
    "GPTNeoXForSequenceClassification",
    "OPTForSequenceClassification",
    "MistralForSequenceClassification",
    "Qwen2ForSequenceClassification",
    "GemmaForSequenceClassification",
    "BloomForSequenceClassification",
]
ENCODERS = ["BertForSequenceClassification", "RobertaForSequenceClassification", "DebertaV2ForSequenceClassification"]
LENGTHS = torch.tensor([12, 7, 9, 6])
METHODS = {
    "mixup": Mixup(),
    "multimix": MultiMix(num_mixed=5, input_mixing="mixup", input_mixing_prob=1.0, input_mixing_start=0.0),
    "dense": DenseMultiMix(
        num_mixed=5, input_mixing="mixup", input_mixing_prob=1.0, input_mixing_start=0.0, pooled_weight=1.0
    ),
}


def text_model(name):
    return zoo.build(name, pad_token_id=1 if "Roberta" in name else 0)


def text_batch(model, padding, mask=True):
    torch.manual_seed(0)
    real = torch.arange(12) < LENGTHS[:, None] if padding == "right" else torch.arange(12) >= 12 - LENGTHS[:, None]
    ids = torch.randint(10, 90, (4, 12)).masked_fill(~real, model.config.pad_token_id)
    return {"input_ids": ids, **({"attention_mask": real.long()} if mask else {})}


def fix_draws(monkeypatch, factor, partner):
    monkeypatch.setattr(mixup, "draw_factor", lambda *_: factor)
    monkeypatch.setattr(mixup, "draw_partners", lambda *_: partner)


def mixed_logits(model, inputs, method):
    with wrap_model(model, method), torch.no_grad():
        model.training = True  # its submodules stay in evaluation mode, without dropout
        logits = model(**inputs, labels=torch.arange(len(inputs["input_ids"]))).logits
        model.training = False
    return logits


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_texts_mixed_with_themselves_give_their_own_logits(name, padding, mask, monkeypatch):
    fix_draws(monkeypatch, 0.3, torch.arange(4))
    model = text_model(name)
    inputs = text_batch(model, padding, mask)
    torch.testing.assert_close(mixed_logits(model, inputs, Mixup()), model(**inputs).logits.detach())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_read_the_last_token_of_the_longer_text(name, method, monkeypatch):
    """The reference mixes one pair at a time, without padding after the longer text."""
    partner = torch.tensor([1, 2, 3, 0])
    fix_draws(monkeypatch, 0.3, partner)
    model = text_model(name)
    inputs = text_batch(model, "right")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    expected = []
    for i, j in enumerate(partner):
        pair = embeddings[[i, j], : max(LENGTHS[i], LENGTHS[j])]
        expected.append(model(inputs_embeds=0.3 * pair[:1] + 0.7 * pair[1:]).logits)
    torch.testing.assert_close(mixed_logits(model, inputs, method), torch.cat(expected).detach(), rtol=1e-4, atol=1e-4)


def test_models_that_accept_no_embeddings_are_rejected():
    """BART and T5Gemma embed the ids a second time, for the decoder, and CANINE hashes them."""
    for name in (
        "BartForSequenceClassification",
        "CanineForSequenceClassification",
        "T5GemmaForSequenceClassification",
    ):
        model = zoo.build(name).train()
        inputs = {**zoo.batch(name, model, b=4), "labels": torch.arange(4)}
        with pytest.raises(LocationError, match="Mixup mixes the embeddings of token ids.*use MultiMix"):
            wrap_model(model, Mixup(), example_inputs=inputs)
        wrap_model(model, MultiMix(), example_inputs=inputs).remove()


def test_embedding_hook_is_removed_and_belongs_to_a_copy():
    model = text_model("LlamaForSequenceClassification").train()
    inputs = {**text_batch(model, "right"), "labels": torch.arange(4)}
    hooks = model.model.embed_tokens._forward_hooks
    with wrap_model(model, Mixup(), example_inputs=inputs):
        assert len(hooks) == 1
        twin = copy.deepcopy(model)
        twin(**inputs).loss.backward()
        assert model.model.embed_tokens.weight.grad is None and twin.model.embed_tokens.weight.grad.any()
        plain = model.eval()(**inputs).logits
    assert not hooks
    assert torch.equal(plain, model(**inputs).logits)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "BertForSequenceClassification"])
def test_mixup_of_texts_in_a_compiled_model(name):
    torch._dynamo.reset()
    model = text_model(name).train()
    batches = [{**text_batch(model, side), "labels": torch.arange(4)} for side in ("right", "left", "right")]
    wrap_model(model, Mixup(), example_inputs=batches[0])
    compiled = torch.compile(model, backend="eager")
    for i, inputs in enumerate(batches):
        torch.manual_seed(i)
        expected = model(**inputs).loss
        torch.manual_seed(i)
        torch.testing.assert_close(compiled(**inputs).loss, expected)
    torch._dynamo.reset()
