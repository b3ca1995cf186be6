"""Tests of the state on a wrapped model: copies, pickles and later trainings are free of it."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from mm_hf import ERM, DenseMultiMix, ManifoldMixup, Mixup, MultiMixTrainer, wrap_model
from tests.helpers import digits, models
from tests.helpers.digits import run

DENSE = DenseMultiMix(num_mixed=5, input_mixing="none")
WRAPPED = [(name, DENSE) for name in sorted(models.MODELS)] + [("vit", ManifoldMixup()), ("bert", Mixup())]
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}


def traces(model):
    """Return what mm_hf has left on any module of a model."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}.{key}" for key in vars(module) if key.startswith("mm_hf") or key == "__getstate__"]
        found += [f"{name} hook" for hook in (module._forward_hooks | module._forward_pre_hooks).values() if ours(hook)]
        found += [f"{name}.forward"] if "forward" in vars(module) and ours(module.forward) else []
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
        found += [f"{name}.config"] if "mm_hf" in implementation else []
    return found


def ours(function):
    return str(getattr(function, "__module__", "")).startswith("mm_hf")


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


@pytest.mark.parametrize(("name", "mixing"), WRAPPED, ids=lambda value: getattr(value, "name", value))
def test_copies_and_pickles_of_a_wrapped_model_are_plain_models(name, mixing):
    model, inputs, labels = models.build(name), models.batch(name), models.labels()
    wrap_model(model.train(), mixing)
    model(**inputs, labels=labels).loss.backward()
    model.eval()
    plain = models.build(name)
    plain.load_state_dict(model.state_dict())
    assert traces(model) and b"mm_hf" not in pickle.dumps(model)
    for copied in (function(model) for function in COPIES.values()):
        assert not traces(copied)
        assert [type(m) for m in copied.modules()] == [type(m) for m in plain.modules()]
        assert torch.equal(copied(**inputs).logits, plain(**inputs).logits)
        losses = []
        for trained in (copied, plain):
            torch.manual_seed(0)
            losses.append(trained.train()(**inputs, labels=labels).loss)
        assert torch.equal(*losses)
        plain.eval()
        wrap_model(copied, mixing).remove()  # a copy can be wrapped itself


@pytest.mark.parametrize("module", ["vit", "vit.layers.1", "vit.layers.1.attention"])
def test_copies_of_submodules_are_plain_modules(module):
    model = models.build("vit").train()
    wrap_model(model, DENSE, example_inputs={**models.batch("vit"), "labels": models.labels()})
    assert not traces(copy.deepcopy(model.get_submodule(module)))


def test_attention_implementation_is_replaced_only_during_the_forward():
    model = models.build("vit").train()
    config = model.vit.layers[1].attention.config
    seen = []
    model.vit.layers[1].attention.register_forward_pre_hook(
        lambda module, args: seen.append(module.config._attn_implementation)
    )
    handle = wrap_model(model, DENSE, example_inputs={**models.batch("vit"), "labels": models.labels()})
    seen.clear()
    model(**models.batch("vit"), labels=models.labels())
    assert seen == ["mm_hf_sdpa"] and model.vit.layers[1].attention.config is config
    with pytest.raises(RuntimeError):
        model(pixel_values=torch.zeros(6, 3, 32, 32), labels=models.labels(), interpolate_pos_encoding=torch.ones(2))
    assert model.vit.layers[1].attention.config is config and handle.installed


def test_deep_copy_of_a_prepared_model_computes_in_the_same_precision():
    model = models.build("vit").train()
    wrap_model(model, DENSE)
    Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    inputs, labels = models.batch("vit"), models.labels()
    model(**inputs, labels=labels).loss.backward()
    copied = copy.deepcopy(model.eval())
    assert torch.equal(copied(**inputs).logits, model(**inputs).logits)
    loss = copied.train()(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(copied(**inputs).logits, labels))
    assert model.classifier.weight.grad is not None and copied.classifier.weight is not model.classifier.weight


@pytest.mark.distributed
def test_pickled_and_spawned_models_do_not_need_the_package(tmp_path):
    model, inputs = models.build("vit").train(), models.batch("vit")
    wrap_model(model, DENSE, example_inputs={**inputs, "labels": models.labels()})
    torch.save((model.eval(), inputs, model(**inputs).logits), tmp_path / "model.pt")
    code = f"""
import sys
sys.modules["mm_hf"] = None
import torch
model, inputs, logits = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(model(**inputs).logits, logits)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(traces, (model,)) == []


# ---- a second training of the same model ----


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))


def merged(model):
    return lora(model).merge_and_unload()


def trained_adapter_unloaded(model):
    """Train an adapter with mixing, and return the model inside without it."""
    adapted = lora(model)
    run("outputs/unused", model=adapted, trainer_args={"mixing": DENSE}, max_steps=1, label_names=["labels"]).train()
    return adapted.unload()


CHANGES = {"same": lambda m: m, "lora": lora, "merged": merged, "unloaded": trained_adapter_unloaded}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mixing", [ERM(), DENSE, ManifoldMixup()], ids=lambda mixing: mixing.name)
@pytest.mark.parametrize("first", ["DENSE", "ManifoldMixup()"])
def test_second_trainer_removes_the_mixing_of_the_first(tmp_path, change, mixing, first):
    """Its training equals that of a model with the same weights that no trainer has seen."""
    results = []
    for fresh in (False, True):
        model = digits.vit()
        run(tmp_path, model=model, trainer_args={"mixing": eval(first)}, max_steps=1).train()
        torch.manual_seed(0)
        model = CHANGES[change](model)
        if fresh:
            model = pickle.loads(pickle.dumps(model))
        trainer_class = Trainer if fresh and type(mixing) is ERM else MultiMixTrainer
        extra = {} if trainer_class is Trainer else {"mixing": mixing}
        options = {"max_steps": 2, "label_names": ["labels"]}
        trainer = run(tmp_path, trainer_class, model, trainer_args=extra, **options)
        trainer.train()
        results.append(digits.weights(model))
        if trainer_class is MultiMixTrainer and type(mixing) is not ERM:
            trainer.mixing_handle.remove()
        assert traces(model) == []
    digits.same_weights(*results)


def test_model_trains_without_mixing_outside_of_its_trainer(tmp_path):
    model, images = digits.vit(), digits.dataset(extra=False)[:]
    trainer = run(tmp_path, model=model, trainer_args={"mixing": DENSE}, max_steps=1)
    trainer.train()
    inputs = {"pixel_values": images["pixel_values"], "labels": images["label"]}
    loss = model.train()(**inputs).loss
    assert torch.equal(loss, torch.nn.functional.cross_entropy(model(**inputs).logits, inputs["labels"]))
    assert trainer.compute_loss(model, inputs) > 1.5 * loss  # the sum of a clean and a dense term
    del trainer
    weights = []
    for trained in (model, pickle.loads(pickle.dumps(model))):
        run(tmp_path, Trainer, trained, max_steps=2).train()
        weights.append(digits.weights(trained))
    digits.same_weights(*weights)


def test_wrap_model_replaces_the_wrapping_of_a_trainer_and_rejects_that_of_a_handle(tmp_path):
    model = digits.vit()
    run(tmp_path, model=model, trainer_args={"mixing": DENSE}, max_steps=1).train()
    adapted = lora(model)
    handle = wrap_model(adapted, Mixup())
    for again in (adapted, model):
        with pytest.raises(ValueError, match="already wrapped with mixup by wrap_model: call remove"):
            wrap_model(again, DENSE)
        for mixing in (DENSE, ERM()):
            with pytest.raises(ValueError, match="already wrapped with mixup by wrap_model"):
                run(tmp_path, model=again, trainer_args={"mixing": mixing})
    handle.remove()
    assert traces(adapted) == []
    run(tmp_path, model=model, trainer_args={"mixing": DENSE}, max_steps=1).train()
