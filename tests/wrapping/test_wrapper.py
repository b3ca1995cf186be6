import inspect
import types

import accelerate
import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.nn import functional as F

from mm_hf import ERM, DenseMultiMix, LocationError, MultiMix, extract, wrap_model
from tests.helpers import digits, models

ALL = sorted(models.MODELS)


def snapshot(model):
    modules = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for m in model.modules()]
    configs = [id(m.config) for m in model.modules() if hasattr(m, "config")]
    return modules, configs, sorted(model.__dict__), model.forward.__func__


class Uniform(DenseMultiMix):
    """Dense MultiMix whose mixed examples are all the mean of the batch, for a computation by hand."""

    def sample(self, num_examples, device, generator=None):
        return torch.full((num_examples, 7), 1 / num_examples)


@pytest.mark.parametrize("name", ALL)
def test_training_loss_equals_a_computation_by_hand_and_evaluation_is_unchanged(name):
    model, inputs, labels = models.build(name), models.batch(name), models.labels()
    with torch.no_grad():
        plain = model(**inputs, labels=labels)
    with wrap_model(model, Uniform(dense_weight=2.0)):
        with torch.no_grad():
            again = model(**inputs, labels=labels)
        assert torch.equal(plain.loss, again.loss) and torch.equal(plain.logits, again.logits)
        model.training = True  # its submodules stay in evaluation mode, without dropout
        output = model(**inputs, labels=labels)
    assert list(output) == ["loss", "logits"]
    located = extract(model.eval(), **inputs)
    mixing = located.attention / located.attention.sum(0, keepdim=True).clamp(min=1e-30)  # (b, r)
    mixed = torch.einsum("br,brc->rc", mixing, located.token_logits)
    targets = torch.einsum("br,bc->rc", mixing, F.one_hot(labels, 5).float())
    occupied = located.attention.sum(0) > 0
    dense = -(targets * mixed.log_softmax(-1)).sum(-1)[occupied].mean()
    torch.testing.assert_close(output.loss, plain.loss + 2 * dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_remove_restores_the_model(name):
    model, inputs, labels = models.build(name), models.batch(name), models.labels()
    before = snapshot(model)
    handle = wrap_model(model.train(), DenseMultiMix(num_mixed=5))
    model(**inputs, labels=labels).loss.backward()
    assert handle.plan is not None and snapshot(model) != before
    handle.remove()
    handle.remove()  # a second call does nothing
    assert snapshot(model) == before
    torch.manual_seed(0)
    loss = model(**inputs, labels=labels).loss
    torch.manual_seed(0)
    assert torch.equal(loss, F.cross_entropy(model(**inputs).logits, labels))


def test_remove_after_accelerate_prepare():
    model = digits.vit()
    before = snapshot(model)
    handle = wrap_model(model, DenseMultiMix(num_mixed=5))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    accelerator.prepare(model)
    handle.remove()
    assert snapshot(model) == before


def test_accelerate_loop_with_wrap_model():
    data = digits.dataset(extra=False)[:]
    images, labels = data["pixel_values"], data["label"]
    model = digits.vit()
    handle = wrap_model(model, DenseMultiMix(num_mixed=20))  # the only added line
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    losses = []
    for _ in range(60):
        loss = model(pixel_values=images, labels=labels).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    logs = handle.pop_logs()
    assert logs["loss_clean"] + logs["loss_dense"] == pytest.approx(sum(losses) / 60, rel=1e-4)
    assert handle.pop_logs() == {}
    assert accelerator.unwrap_model(model) is model and "forward" in model.__dict__


def test_wrapped_forward_keeps_its_signature():
    model = models.build("bert")
    expected = inspect.signature(model.forward)
    with wrap_model(model, ERM()):
        assert inspect.signature(model.forward) == expected
        assert not hasattr(model.forward, "__wrapped__")
        assert isinstance(model.forward, types.MethodType)


def test_positional_arguments_tuple_outputs_and_missing_labels():
    model, inputs, labels = models.build("vit").train(), models.batch("vit"), models.labels()
    with wrap_model(model, MultiMix(num_mixed=5)):
        output = model(inputs["pixel_values"], labels)
        assert output.loss > F.cross_entropy(output.logits, labels)
        loss, logits = model(**inputs, labels=labels, return_dict=False)
        assert loss.shape == () and logits.shape == (6, 5)
        assert model(**inputs).loss is None


def test_soft_labels_of_classes_equal_class_indices():
    model, inputs = models.build("vit").train(), models.batch("vit")
    hard = models.labels()
    soft = F.one_hot(hard, 5).float()
    with wrap_model(model, DenseMultiMix(num_mixed=50)):
        losses = []
        for labels in (hard, soft):
            torch.manual_seed(0)
            losses.append(model(**inputs, labels=labels).loss)
    torch.testing.assert_close(*losses)
    assert model.config.problem_type == "single_label_classification"


def test_ignored_examples_have_no_influence():
    model, inputs, labels = models.build("vit"), models.batch("vit"), models.labels()
    labels[2] = -100
    rest = [0, 1, 3, 4, 5]
    losses = []
    for x, y in [(inputs["pixel_values"], labels), (inputs["pixel_values"][rest], labels[rest])]:
        with wrap_model(model, Uniform()):
            model.training = True
            losses.append(model(pixel_values=x, labels=y).loss)
            model.eval()
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", ["vit", "bert", "dinov2"])
def test_torch_compile_breaks_the_graph_only_for_the_loss(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = models.build(name).train()
    batches = [{**models.batch(name, seed=s), "labels": models.labels(seed=s)} for s in range(6)]
    wrap_model(model, DenseMultiMix(num_mixed=5), example_inputs=batches[0])
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for i, inputs in enumerate(batches):
        torch.manual_seed(i)
        expected = model(**inputs).loss
        torch.manual_seed(i)
        torch.testing.assert_close(compiled(**inputs).loss, expected)
        if i == 1:
            after_two = counter.frame_count
    assert counter.frame_count == after_two <= 2
    torch._dynamo.reset()


def test_model_compiled_before_probing():
    torch._dynamo.reset()
    model, inputs, labels = models.build("vit").train(), models.batch("vit"), models.labels()
    handle = wrap_model(model, DenseMultiMix(num_mixed=5))
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        torch.manual_seed(0)
        loss = compiled(**inputs, labels=labels).loss
        torch.manual_seed(0)
        torch.testing.assert_close(loss, model(**inputs, labels=labels).loss)
    assert handle.plan is not None and handle.pop_logs()["loss_dense"] > 0
    torch._dynamo.reset()


def test_invalid_models_and_batches_raise_a_value_error():
    model, inputs, labels = models.build("vit"), models.batch("vit"), models.labels()
    handle = wrap_model(model, ERM())
    with pytest.raises(ValueError, match="already wrapped with erm by wrap_model: call remove()"):
        wrap_model(model, DenseMultiMix())
    handle.remove()
    with pytest.raises(ValueError, match="mixing must be a mixing method"):
        wrap_model(model, "dense")
    with pytest.raises(ValueError, match="model must be a torch module"):
        wrap_model("vit", ERM())
    beit = models.build("beit")
    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
        )
    )
    with pytest.raises(LocationError, match='Use attention="gap", "cam" or "uniform"'):
        wrap_model(
            resnet, DenseMultiMix(attention="cls"), example_inputs={**models.batch("vit", side=64), "labels": labels}
        )
    assert "forward" not in resnet.__dict__  # a failed wrapping is undone
    wrap_model(beit, DenseMultiMix(attention="cls"), example_inputs={**models.batch("beit"), "labels": labels}).remove()
    prepared = digits.vit()
    Accelerator(mixed_precision="bf16", cpu=True).prepare(prepared)
    with pytest.raises(ValueError, match="must come before accelerator.prepare"):
        wrap_model(prepared, ERM())
    with pytest.raises(ValueError, match="copies of the model, which do not mix: wrap the model itself"):
        wrap_model(torch.nn.DataParallel(digits.vit()), ERM())
    with pytest.raises(ValueError, match="must come before torch.compile: wrap the original model"):
        wrap_model(torch.compile(digits.vit()), ERM())
    dispatched = accelerate.cpu_offload(digits.vit())
    with pytest.raises(ValueError, match="was dispatched over several devices or offloaded"):
        wrap_model(dispatched, ERM())
    with pytest.raises(ValueError, match="Label 5 does not fit"):
        wrap_model(model, DenseMultiMix(), example_inputs={**inputs, "labels": labels + 5 - labels})


class TanhHead(transformers.ViTForImageClassification):
    def forward(self, pixel_values, labels=None, **kwargs):
        output = super().forward(pixel_values, **kwargs)
        output["logits"] = output.logits.tanh()
        return output


@pytest.mark.parametrize("mixing", [MultiMix(num_mixed=3), DenseMultiMix(num_mixed=3)])
def test_nonlinear_heads_are_rejected(mixing):
    model = TanhHead(models.build("vit").config).train()
    wrap_model(model, mixing)
    with pytest.raises(LocationError, match="does not end in a linear layer"):
        model(**models.batch("vit"), labels=models.labels())
