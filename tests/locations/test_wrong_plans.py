"""Wrong plans, planted: each must be found out before training. And models that the probe has to be taught."""

import copy
import doctest
import importlib
from dataclasses import replace

import pytest
import torch
import transformers

from mm_hf import DenseMultiMix, LocationError, MultiMix, MultiMixTrainer, Plan, extract, probe, wrap_model
from mm_hf.locations import register as register_function
from mm_hf.training.hub import load_plan
from tests.helpers import models, zoo

register_module = importlib.import_module("mm_hf.locations.registry")
DENSE = DenseMultiMix(num_mixed=5)


def refused(model, inputs, plan, message):
    labels = models.labels(len(next(iter(inputs.values()))))
    with pytest.raises(LocationError, match=message):
        wrap_model(
            model.train(),
            DENSE,
            plan=plan,
            example_inputs={**inputs, "labels": labels},
        )
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_a_right_plan_from_elsewhere_is_taken(name):
    model, inputs = models.build(name), models.batch(name)
    plan = Plan.from_dict(probe(model, inputs).to_dict())
    again = models.build(name, seed=3).train()
    with wrap_model(again, DENSE, plan=plan, example_inputs={**inputs, "labels": models.labels()}) as handle:
        assert handle.plan == plan
        assert again(**inputs, labels=models.labels()).loss.isfinite()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", {"pool": "mean[0:]"}, "are not those of the pool 'mean"),
        ("vit", {"pool": "token[-1]"}, "are not those of the pool"),
        ("vit", {"prefix": 0}, "has prefix=0, but the model has 1"),
        ("deit", {"prefix": 1}, "has prefix=1, but the model has 2"),
        ("vit", {"source": "vit.layers.0"}, "no module .vit.layers.0. with such an output"),
        ("vit", {"source": "vit.nothing"}, "calls, no module 'vit.nothing'"),
        ("vit", {"attention": "vit.layers.0.attention"}, "has attention='vit.layers.0.attention', but the model has"),
        ("vit", {"query": "mean"}, "has query='mean'"),
        ("beit", {"pool": "mean[0:]"}, "misses its logits|are not those of the pool"),
        ("dinov2", {"pool": "token[0]"}, "misses its logits|are not those of the pool"),
        ("bert", {"chain": ("dropout", "classifier")}, "misses its logits"),
        ("bert", {"text": False}, "has text=False"),
        ("distilbert", {"chain": ("pre_classifier", "dropout", "classifier")}, "misses its logits"),
    ],
)
def test_planted_faults(name, change, message):
    model, inputs = models.build(name), models.batch(name)
    refused(model, inputs, replace(probe(model, inputs), **change), message)


def test_a_plan_of_another_model_is_refused():
    plan = probe(models.build("vit"), models.batch("vit"))
    refused(models.build("bert"), models.batch("bert"), plan, "no module 'vit'")


def test_the_end_of_a_sentence_is_told_from_the_last_word_in_a_batch_without_padding():
    """Every row of this batch ends in its last word: only a changed batch tells the pools apart."""
    for name, pool in [
        ("BartForSequenceClassification", "token[last==2]"),
        ("LlamaForSequenceClassification", "token[last!=0]"),
        ("XLNetForSequenceClassification", "token[-1]"),
        ("EuroBertForSequenceClassification", "mean[mask]"),
        ("Wav2Vec2ForSequenceClassification", "mean[nonzero]"),
    ]:
        model = zoo.build(name)
        plan = probe(model, zoo.batch(name, model, padding=None))
        assert plan.pool == pool, name
        padded = zoo.batch(name, model, b=3, seed=7)
        with torch.no_grad():
            extract(model, attention="uniform", **padded)  # checks the identity


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_a_head_that_starts_at_zero(name):
    model, inputs = models.build(name), models.batch(name)
    expected = probe(model, inputs)
    last = next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear))
    torch.nn.init.zeros_(last.weight)
    assert probe(model, inputs) == expected and not last.weight.any()


def test_small_numbers_are_not_taken_for_their_own_tanh():
    class Tanh(transformers.ViTForImageClassification):
        def forward(self, pixel_values, labels=None, **kwargs):
            hidden = self.vit(pixel_values).last_hidden_state[:, 0]
            logits = self.classifier(torch.tanh(self.dense(hidden)))
            return transformers.modeling_outputs.ImageClassifierOutput(logits=logits)

    model = Tanh(models.build("vit").config)
    model.dense = torch.nn.Linear(32, 32)
    torch.nn.init.normal_(model.dense.weight, std=1e-5)
    assert probe(model.eval(), models.batch("vit")).chain == ("dense", "tanh", "classifier")


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(models.build("vit"), config)
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_another_adapter_is_seen_and_its_head_is_used(lora):
    inputs, labels = models.batch("vit"), models.labels()
    model = lora.train()
    with wrap_model(model, DenseMultiMix(num_mixed=5), example_inputs={**inputs, "labels": labels}) as handle:
        first = handle.plan
        assert "modules_to_save" not in " ".join(first.chain)  # the wrapper, which calls the adapter in use
        for adapter in ("other", "default", "other"):
            model.set_adapter(adapter)
            model.zero_grad()
            model(**inputs, labels=labels).loss.backward()
            trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            assert any("modules_to_save" in n for n in trained)
            assert all(f".{adapter}" in n for n in trained if "modules_to_save" in n or "lora" in n)
    model.eval()
    with torch.no_grad():
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            seen = extract(model, **inputs)
            hidden = model.get_base_model().vit(**inputs).last_hidden_state[:, 1:]
            head = model.get_base_model().classifier.modules_to_save[adapter]
            torch.testing.assert_close(seen.token_logits, head(hidden))


def test_a_stale_plan_after_set_adapter_is_caught(lora):
    """A plan that names the first adapter's own head would score locations by it for ever."""
    inputs = models.batch("vit")
    plan = probe(lora, inputs)
    stale = replace(plan, chain=("base_model.model.classifier.modules_to_save.default",))
    lora.set_adapter("other")
    refused(lora, inputs, stale, "misses its logits")


def test_merged_adapters(lora):
    inputs = models.batch("vit")
    with torch.no_grad():
        lora.eval()
        before = extract(lora, **inputs)
        merged = lora.merge_and_unload()
        after = extract(merged, **inputs)
    torch.testing.assert_close(after.token_logits, before.token_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.attention, before.attention, rtol=1e-4, atol=1e-6)


def test_a_module_that_is_no_longer_called_is_reported():
    model, inputs, labels = models.build("vit").train(), models.batch("vit"), models.labels()
    with wrap_model(model, DENSE, example_inputs={**inputs, "labels": labels}):
        model.vit = copy.deepcopy(model.vit)  # the hook went along with a copy that has another name for it
        model.vit._forward_hooks.clear()
        with pytest.raises(LocationError, match="did not call 'vit' in this forward"):
            model(**inputs, labels=labels)


def test_the_plan_is_saved_with_the_checkpoint_and_proved_when_it_is_used_again(tmp_path):
    from tests.helpers import digits

    args = digits.arguments(tmp_path, max_steps=1)
    trainer = MultiMixTrainer(digits.vit(), args, mixing=DENSE, train_dataset=digits.dataset())
    trainer.train()
    trainer.save_model()
    plan = load_plan(tmp_path)
    assert plan == trainer.mixing_handle.plan and plan.pool == "token[0]"
    batch = digits.dataset(0, 8, extra=False)[:]
    batch = {"pixel_values": batch["pixel_values"], "labels": batch["label"]}
    wrap_model(digits.vit(seed=4), DENSE, plan=plan, example_inputs=batch)


# ---- models that have to be taught ----


@pytest.fixture
def clean_registry():
    saved = dict(register_module._registered)
    yield
    register_module._registered.clear()
    register_module._registered.update(saved)


def test_the_lines_in_the_documentation_teach_v_jepa_2(clean_registry):
    name = "VJEPA2ForVideoClassification"
    model = zoo.build(name)
    inputs = zoo.batch(name, model)
    with pytest.raises(
        LocationError, match=r"(?s)nearest one misses.*MultiMix\(\) needs the logits only.*locations.register"
    ):
        probe(model, inputs)
    results = doctest.run_docstring_examples(register_function, vars(register_module).copy(), name="register")
    assert results is None and register_module.is_registered(name)
    plan = probe(model, inputs)
    assert plan.pool == "registered" and Plan.from_dict(plan.to_dict()) == plan
    seen = extract(model, attention="uniform", **inputs)
    assert seen.token_logits.shape == (len(seen.logits), seen.mask.shape[1], 5)
    one = model.vjepa2(**inputs).last_hidden_state[:, 3:4]
    torch.testing.assert_close(seen.token_logits[:, 3], model.classifier(model.pooler(one)), rtol=1e-4, atol=1e-5)
    model.train()
    with wrap_model(model, DenseMultiMix(num_mixed=5, clean_weight=0, attention="gap"), plan=plan):
        model(**inputs, labels=models.labels(len(seen.logits))).loss.backward()
    assert model.classifier.weight.grad.any()


def test_a_registration_that_is_wrong_is_found_out(clean_registry):
    name = "VJEPA2ForVideoClassification"
    model = zoo.build(name)
    score = lambda model, tokens: model.classifier(tokens)  # noqa: E731
    pooled = lambda model, tokens: model.classifier(tokens.mean(dim=1))  # noqa: E731
    register_function(name, source="vjepa2", key="last_hidden_state", score=score, pooled=pooled)
    with pytest.raises(LocationError, match="nearest one misses"):
        probe(model, zoo.batch(name, model))


def test_multimix_needs_no_locations():
    name = "PerceiverForImageClassificationLearned"
    model = zoo.build(name).train()
    inputs = zoo.batch(name, model)
    with wrap_model(model, MultiMix(num_mixed=5)):
        assert model(**inputs, labels=models.labels(4)).loss.isfinite()
    with wrap_model(model, DENSE), pytest.raises(LocationError, match="gives no per-location logits"):
        model(**inputs, labels=models.labels(4))


def test_a_tap_that_would_change_the_model_is_not_used():
    name = "AXK2ForSequenceClassification"
    model = zoo.build(name)
    inputs = zoo.batch(name, model)
    plan = probe(model, inputs)
    assert plan.attention_base == "scaled_dot_product_attention[0]"
    with torch.no_grad():
        assert torch.equal(extract(model, attention="cls", **inputs).logits, model(**inputs).logits)


@pytest.fixture
def first_of_two(monkeypatch):
    """As if this were the second of two processes, of which the first one says what the test says."""
    said = {}

    def gather(everywhere, own):
        everywhere[:] = [said or own, own]

    monkeypatch.setattr("mm_hf.wrapping.state.is_distributed", lambda: True)
    monkeypatch.setattr("mm_hf.distributed.is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return said


def test_all_processes_take_the_plan_of_the_first_if_it_is_right_for_them(first_of_two):
    model, inputs = models.build("bert"), models.batch("bert")
    example = {**inputs, "labels": models.labels()}
    plan = probe(model, inputs)
    with wrap_model(model.train(), DENSE, example_inputs=example) as handle:
        assert handle.plan == plan
    # The first one's tokenizer knew more special tokens.
    first_of_two.update(replace(plan, special_ids=(0, 2, 3)).to_dict())
    with wrap_model(model, DENSE, example_inputs=example) as handle:
        assert handle.plan.special_ids == (0, 2, 3)
    first_of_two.update(replace(plan, pool="mean[0:]").to_dict())
    with pytest.raises(LocationError, match="does not fit"):
        wrap_model(model, DENSE, example_inputs=example)


def test_all_processes_stop_if_one_finds_nothing(first_of_two):
    first_of_two["error"] = "the first process found nothing"
    with pytest.raises(LocationError, match="the first process found nothing"):
        wrap_model(models.build("vit"), DENSE, example_inputs={**models.batch("vit"), "labels": models.labels()})
