"""Wrong plans are rejected before training; registered models; plans of several processes."""

import copy
import doctest
import importlib
from dataclasses import replace

import pytest
import torch
import transformers

from mm_hf import DenseMultiMix, LocationError, MultiMix, MultiMixTrainer, Plan, extract, probe, wrap_model
from mm_hf.locations import register
from mm_hf.training.hub import load_plan
from tests.helpers import models, zoo

registry = importlib.import_module("mm_hf.locations.registry")
DENSE = DenseMultiMix(num_mixed=5)


def assert_rejected(model, inputs, plan, message):
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
def test_plan_of_another_instance_is_accepted(name):
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
        ("vit", {"keys": "repeat[2]"}, "has keys='repeat.2.', but the model has ''"),
        ("beit", {"pool": "mean[0:]"}, "misses its logits|are not those of the pool"),
        ("dinov2", {"pool": "token[0]"}, "misses its logits|are not those of the pool"),
        ("bert", {"chain": ("dropout", "classifier")}, "misses its logits"),
        ("bert", {"text": False}, "has text=False"),
        ("distilbert", {"chain": ("pre_classifier", "dropout", "classifier")}, "misses its logits"),
    ],
)
def test_wrong_field_is_rejected(name, change, message):
    model, inputs = models.build(name), models.batch(name)
    assert_rejected(model, inputs, replace(probe(model, inputs), **change), message)


def test_plan_of_another_model_is_rejected():
    plan = probe(models.build("vit"), models.batch("vit"))
    assert_rejected(models.build("bert"), models.batch("bert"), plan, "no module 'vit'")


def test_pool_is_found_from_a_batch_without_padding():
    """All of these pools read the same token in such a batch; the probe varies it."""
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
def test_zero_initialized_head_has_the_same_plan(name):
    model, inputs = models.build(name), models.batch(name)
    expected = probe(model, inputs)
    last = next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear))
    torch.nn.init.zeros_(last.weight)
    assert probe(model, inputs) == expected and not last.weight.any()


def test_tanh_of_small_numbers_is_found():
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


def test_active_adapter_and_its_head_are_used(lora):
    inputs, labels = models.batch("vit"), models.labels()
    model = lora.train()
    with wrap_model(model, DenseMultiMix(num_mixed=5), example_inputs={**inputs, "labels": labels}) as handle:
        first = handle.plan
        assert "modules_to_save" not in " ".join(first.chain)  # the wrapper, which calls the active adapter
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
            output = extract(model, **inputs)
            hidden = model.get_base_model().vit(**inputs).last_hidden_state[:, 1:]
            head = model.get_base_model().classifier.modules_to_save[adapter]
            torch.testing.assert_close(output.token_logits, head(hidden))


def test_plan_of_an_inactive_adapter_is_rejected(lora):
    """A plan that names one adapter's head would apply this head whichever adapter is active."""
    inputs = models.batch("vit")
    plan = probe(lora, inputs)
    stale = replace(plan, chain=("base_model.model.classifier.modules_to_save.default",))
    lora.set_adapter("other")
    assert_rejected(lora, inputs, stale, "misses its logits")


def test_merged_adapter_gives_the_same_output(lora):
    inputs = models.batch("vit")
    with torch.no_grad():
        lora.eval()
        before = extract(lora, **inputs)
        merged = lora.merge_and_unload()
        after = extract(merged, **inputs)
    torch.testing.assert_close(after.token_logits, before.token_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.attention, before.attention, rtol=1e-4, atol=1e-6)


def test_source_that_is_not_called_is_reported():
    model, inputs, labels = models.build("vit").train(), models.batch("vit"), models.labels()
    with wrap_model(model, DENSE, example_inputs={**inputs, "labels": labels}):
        model.vit = copy.deepcopy(model.vit)  # replaces the module with the hook
        model.vit._forward_hooks.clear()
        with pytest.raises(LocationError, match="did not call 'vit' in this forward"):
            model(**inputs, labels=labels)


def test_plan_of_a_checkpoint_is_saved_and_verified(tmp_path):
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


# ---- registered models ----


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


class SmoothMaximum(transformers.ViTForImageClassification):
    """A ViT whose head reads a smooth maximum of each feature, so that no token gives its logits."""

    def forward(self, pixel_values, labels=None, **kwargs):
        logits = self.classifier(self.vit(pixel_values).last_hidden_state.logsumexp(dim=1))
        return transformers.modeling_outputs.ImageClassifierOutput(logits=logits)


def register_smooth_maximum():
    register(
        "smooth maximum",
        source="vit.layernorm",
        score=lambda model, tokens: model.classifier(tokens),
        pooled=lambda model, tokens: model.classifier(tokens.logsumexp(dim=1)),
        prefix=1,
    )


def test_docstring_example_registers_smooth_maximum(empty_registry):
    model, inputs = SmoothMaximum(models.build("vit").config).eval(), models.batch("vit")
    with pytest.raises(LocationError, match=r"(?s)MultiMix\(\) needs the logits only.*locations.register"):
        probe(model, inputs)
    doctest.run_docstring_examples(register, vars(registry).copy(), name="register")
    plan = probe(model, inputs)
    assert Plan.from_dict(plan.to_dict()) == plan and "registered as 'smooth maximum'" in str(plan)
    model.train()
    with wrap_model(model, DenseMultiMix(num_mixed=5, clean_weight=0, attention="gap"), plan=plan):
        model(**inputs, labels=models.labels()).loss.backward()
    assert model.classifier.weight.grad.any()


def test_registered_mechanism_is_used_where_it_reproduces_the_logits(empty_registry):
    register_smooth_maximum()
    inputs = models.batch("vit")
    for cls in (SmoothMaximum, type("AnotherSmoothMaximum", (SmoothMaximum,), {})):
        model = cls(models.build("vit").config).eval()
        plan = probe(model, inputs)
        assert (plan.model_class, plan.pool, plan.chain) == (cls.__name__, "registered", ("smooth maximum",))
        output = extract(model, attention="uniform", **inputs)
        tokens = model.vit(**inputs).last_hidden_state
        torch.testing.assert_close(output.token_logits, model.classifier(tokens[:, 1:]))
    # A plain ViT has the source, too, but another head.
    assert probe(models.build("vit"), inputs).pool == "token[0]"


def test_registered_source_is_found_inside_of_an_adapter(empty_registry):
    peft = pytest.importorskip("peft")
    register_smooth_maximum()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(SmoothMaximum(models.build("vit").config), config)
    assert probe(model, models.batch("vit")).source == "base_model.model.vit.layernorm"


def test_plan_of_an_unregistered_mechanism_is_rejected(empty_registry, monkeypatch):
    register_smooth_maximum()
    model, inputs = SmoothMaximum(models.build("vit").config), models.batch("vit")
    plan = probe(model, inputs)
    assert probe(model, inputs, plan=plan) == plan
    monkeypatch.setattr(registry, "_registered", {})
    assert_rejected(model, inputs, plan, "not registered in this process: call mm_hf.locations.register")


def test_wrong_registration_is_rejected(empty_registry):
    score = lambda model, tokens: model.classifier(tokens)  # noqa: E731
    pooled = lambda model, tokens: model.classifier(tokens.mean(dim=1))  # noqa: E731
    register("mean", source="vit.layernorm", score=score, pooled=pooled)
    with pytest.raises(LocationError, match=r"(?s)candidates.*nearest one misses"):
        probe(SmoothMaximum(models.build("vit").config), models.batch("vit"))


def test_multimix_trains_a_model_without_locations():
    name = "PerceiverForImageClassificationLearned"
    model = zoo.build(name).train()
    inputs = zoo.batch(name, model)
    with wrap_model(model, MultiMix(num_mixed=5)):
        assert model(**inputs, labels=models.labels(4)).loss.isfinite()
    with wrap_model(model, DENSE), pytest.raises(LocationError, match="gives no per-location logits"):
        model(**inputs, labels=models.labels(4))


def test_attention_hook_that_changes_logits_is_not_used():
    name = "AXK2ForSequenceClassification"
    model = zoo.build(name)
    inputs = zoo.batch(name, model)
    plan = probe(model, inputs)
    assert plan.attention_base == "scaled_dot_product_attention[0]"
    with torch.no_grad():
        assert torch.equal(extract(model, attention="cls", **inputs).logits, model(**inputs).logits)


@pytest.fixture
def message_of_rank_0(monkeypatch):
    """Simulate the second of two processes; the returned dictionary is what the first one sends."""
    sent = {}

    def gather(everywhere, own):
        everywhere[:] = [sent or own, own]

    monkeypatch.setattr("mm_hf.wrapping.state.is_distributed", lambda: True)
    monkeypatch.setattr("mm_hf.distributed.is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return sent


def test_ranks_use_the_plan_of_rank_0_after_verifying_it(message_of_rank_0):
    model, inputs = models.build("bert"), models.batch("bert")
    example = {**inputs, "labels": models.labels()}
    plan = probe(model, inputs)
    with wrap_model(model.train(), DENSE, example_inputs=example) as handle:
        assert handle.plan == plan
    # The tokenizer of rank 0 has more special tokens.
    message_of_rank_0.update(replace(plan, special_ids=(0, 2, 3)).to_dict())
    with wrap_model(model, DENSE, example_inputs=example) as handle:
        assert handle.plan.special_ids == (0, 2, 3)
    message_of_rank_0.update(replace(plan, pool="mean[0:]").to_dict())
    with pytest.raises(LocationError, match="does not fit"):
        wrap_model(model, DENSE, example_inputs=example)


def test_ranks_raise_the_error_of_rank_0(message_of_rank_0):
    message_of_rank_0["error"] = "rank 0 found no plan"
    with pytest.raises(LocationError, match="rank 0 found no plan"):
        wrap_model(models.build("vit"), DENSE, example_inputs={**models.batch("vit"), "labels": models.labels()})
