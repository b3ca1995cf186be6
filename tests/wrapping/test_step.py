"""Cost of a training step: one forward, no synchronization with a GPU, one row of attention."""

import contextlib
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mm_hf import DenseMultiMix, MultiMix, wrap_model
from mm_hf.methods import base
from mm_hf.wrapping import state, step
from tests.helpers import models, zoo

METHODS = {
    "dense": DenseMultiMix(num_mixed=20),
    "dense, all examples": DenseMultiMix(num_mixed=20, alpha=0.5),
    "dense, pooled": DenseMultiMix(num_mixed=20, pooled_weight=1.0, attention="gap"),
    "multimix": MultiMix(num_mixed=20),
}


class Shapes(TorchDispatchMode):
    """Recorder of the shapes of all tensors, and of the operations that return them."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.made.append((str(function), tuple(tensor.shape)))
        return result


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("name", ["vit", "bert", "dinov2", "LlamaForSequenceClassification"])
def test_training_step_does_not_synchronize_the_device(name, method, monkeypatch):
    """Meta tensors have no values, so that every operation that reads one (`item`, boolean indexing) fails."""
    if name in models.MODELS:
        model, inputs = models.build(name).train(), models.batch(name, b=16)
    else:
        model = zoo.build(name).train()
        inputs = zoo.batch(name, model, b=16)
    # The meta device has no generators and no autocast.
    for module in ("multimix", "terms"):
        monkeypatch.setattr(f"mm_hf.methods.{module}.rank_generator", lambda device: None)
    with wrap_model(model, method, example_inputs={**inputs, "labels": models.labels(16)}):
        model.to("meta")
        for name_ in (
            "_ignore_causal_mask_sdpa",
            "_ignore_bidirectional_mask_sdpa",
        ):  # Transformers reads the mask itself
            monkeypatch.setattr(f"transformers.masking_utils.{name_}", lambda *_, **__: False)
        monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())
        loss = model(**{k: v.to("meta") for k, v in inputs.items()}, labels=models.labels(16).to("meta")).loss
        loss.backward()
    assert loss.device.type == "meta" and all(p.grad is not None for p in list(model.parameters())[-2:])


def test_synchronizing_operations_fail_on_meta_tensors():
    x = torch.ones(3, device="meta")
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


@pytest.mark.parametrize("name", models.MODELS)
def test_backbone_runs_once_per_step(name):
    model, inputs = models.build(name).train(), models.batch(name)
    backbone = getattr(model, model.base_model_prefix)
    calls = []
    with wrap_model(model, DenseMultiMix(num_mixed=20), example_inputs={**inputs, "labels": models.labels()}):
        hook = backbone.register_forward_hook(lambda *_: calls.append(1))
        model(**inputs, labels=models.labels()).loss.backward()
        hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["vit", "bert", "dinov2"])
def test_attention_costs_one_row(name):
    # With dropout, PyTorch's own attention computes the complete matrix on a CPU.
    model = models.build(name, attention_probs_dropout_prob=0.0).train()
    inputs = models.batch(name, b=3)
    n = (32 // 8) ** 2 + 1 if name in models.IMAGE_MODELS else inputs["input_ids"].shape[1]
    example = {**inputs, "labels": models.labels(3)}
    with wrap_model(model, DenseMultiMix(num_mixed=5), example_inputs=example), Shapes() as shapes:
        model(**example)
    rows = [(op, s) for op, s in shapes.made if s == (3, 4, 1, n)]
    matrices = [(op, s) for op, s in shapes.made if len(s) == 4 and s[-2:] == (n, n) and s[1] > 1]
    assert rows and not matrices, matrices


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_mixed_features_are_never_materialized(method):
    """Tensors with a dimension of mixed examples have the width of the logits, not of the features."""
    model, inputs = models.build("vit").train(), models.batch("vit", b=16)
    width = model.config.hidden_size
    method = method.with_num_mixed(777)
    example = {**inputs, "labels": models.labels(16)}
    with wrap_model(model, method, example_inputs=example), Shapes() as shapes:
        model(**example).loss.backward()
    mixed = [s for _, s in shapes.made if 777 in s]
    assert mixed and all(width not in s for s in mixed)


@pytest.mark.parametrize("name", ["vit", "bert", "LlamaForSequenceClassification"])
def test_probing_keeps_no_tensors(name):
    """The activations of a batch may take gigabytes: they are freed without garbage collection."""
    model, inputs = (models.build(name), models.batch(name)) if name in models.MODELS else (zoo.build(name), None)
    inputs = zoo.batch(name, model, b=6) if inputs is None else inputs
    example = {**inputs, "labels": models.labels()}
    with wrap_model(model.train(), DenseMultiMix()) as handle:
        gc.collect()
        gc.disable()
        try:
            before = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
            handle.prepare(example)
            after = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
        finally:
            gc.enable()
    assert after <= before


def record_calls(monkeypatch, owner, names, calls):
    """Append the name of each function of a class or module to a list when it is called."""

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(owner, name, recorded(name, getattr(owner, name)))


def test_hooks_are_called_in_the_order_of_the_life_of_a_batch(monkeypatch):
    calls, hooks, model = [], ["check_inputs", "for_batch", "mix_inputs", "loss"], models.build("vit").train()
    record_calls(monkeypatch, MultiMix, hooks, calls)
    with wrap_model(model, MultiMix(num_mixed=5)):
        for _ in range(2):
            model(**models.batch("vit"), labels=models.labels())
        model.eval()(**models.batch("vit"), labels=models.labels())
    assert calls == [*hooks, *hooks[1:]]
    drawing = base.__doc__
    places = [drawing.index(f".{name}(") for name in hooks]
    assert places == sorted(places)


def test_kind_of_labels_is_determined_once_and_labels_are_converted_in_each_step(monkeypatch):
    calls, model = [], models.build("vit").train()
    record_calls(monkeypatch, state, ["label_kind"], calls)
    record_calls(monkeypatch, step, ["check_shapes"], calls)
    record_calls(monkeypatch, state.MixingState, ["is_ready"], calls)
    with wrap_model(model, DenseMultiMix(num_mixed=5)):
        record_calls(monkeypatch, state.MixingState, ["convert_labels"], calls)
        for _ in range(3):
            model(**models.batch("vit"), labels=models.labels())
    first, later = calls[:-6], calls[-6:]
    assert first == ["is_ready", "label_kind", "convert_labels", "convert_labels", "check_shapes"]
    assert later == ["is_ready", "convert_labels", "check_shapes"] * 2
