"""Padding is no location, also in models that compute another number of tokens than the text has."""

import pytest
import torch
import transformers
from peft import PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers.modeling_outputs import SequenceClassifierOutput

from mm_hf import DenseMultiMix, LocationError, extract, probe, wrap_model
from tests.helpers import models, zoo


@pytest.mark.parametrize(
    ("name", "kind", "padding"),
    [
        ("FunnelForSequenceClassification", "strided", "right"),
        ("CanineForSequenceClassification", "windows", "right"),
        ("LayoutLMv3ForSequenceClassification", "first", "right"),
        ("LayoutLMv3ForSequenceClassification", "first", "left"),
    ],
)
def test_locations_do_not_depend_on_what_is_in_place_of_padding(name, kind, padding):
    model = zoo.build(name)
    assert probe(model, zoo.batch(name, model)).padding == kind
    inputs = zoo.batch(name, model, b=4, seed=7, length=16, padding=padding)
    mask = inputs["attention_mask"].bool()
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]

    def scramble(module, args, output):
        same = output.shape[:2] == mask.shape and args[0].ndim == 2
        return torch.where(mask[..., None], output, torch.randn_like(output)) if same else output

    with torch.no_grad():
        one = extract(model, attention="uniform", **inputs)
        handles = [module.register_forward_hook(scramble) for module in embeddings]
        two = extract(model, attention="uniform", **inputs)
    for handle in handles:
        handle.remove()
    assert not one.mask.all() and torch.equal(one.mask, two.mask)
    changed = (one.token_logits - two.token_logits).abs().amax(dim=-1) > 1e-4
    assert torch.equal(changed, ~one.mask)
    assert not one.attention[~one.mask].any()


class Shuffled(transformers.BertForSequenceClassification):
    """BERT whose head reads every second token in another order, so that no map of the mask is known."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        tokens = self.bert(input_ids, attention_mask).last_hidden_state
        tokens = self.norm(tokens[:, torch.arange(input_ids.shape[1] - 2).flip(0)])
        return SequenceClassifierOutput(logits=self.classifier(tokens[:, -1]))


def test_padding_of_unknown_tokens_is_rejected():
    model = Shuffled(models.build("bert").config).eval()
    model.norm = torch.nn.LayerNorm(32)
    with pytest.raises(
        LocationError, match="computes 10 tokens of texts of 12, and which of them are padding is unknown"
    ):
        probe(model, models.batch("bert"))


VIRTUAL = 3
PROMPTS = {
    "prompt": PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=VIRTUAL),
    "p-tuning": PromptEncoderConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_virtual_tokens_and_padding_are_no_locations(name, config, padding):
    model = get_peft_model(zoo.build(name), config).eval()
    inputs = models.batch("bert", padding=padding)
    with wrap_model(model.train(), DenseMultiMix(num_mixed=5)) as handle:
        model(**inputs, labels=models.labels()).loss.backward()
    special = torch.isin(inputs["input_ids"], torch.tensor(handle.plan.special_ids))
    output = extract(model.eval(), attention="gap", **inputs)
    assert output.mask.shape == inputs["input_ids"].shape  # the virtual tokens are left out
    assert torch.equal(output.mask, inputs["attention_mask"].bool() & ~special) and special.any()
    assert not output.attention[~output.mask].any() and (output.attention.sum(dim=1) > 0.99).all()


def test_plan_with_virtual_tokens_fits_a_mini_batch_without_padding():
    model = get_peft_model(zoo.build("BertForSequenceClassification"), PROMPTS["prompt"]).eval()
    plan = probe(model, models.batch("bert"))
    assert (plan.padding, plan.prefix) == ("last", VIRTUAL)
    full = {k: v[:1].repeat(4, 1) for k, v in models.batch("bert").items()}
    assert probe(model, full, plan=plan) == plan
