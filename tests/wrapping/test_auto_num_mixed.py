import copy
import json
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mm_hf import DenseMultiMix, Mixing, MultiMix, MultiMixTrainer, wrap_model
from mm_hf.functional.cost import ACCELERATOR, CPU, operations_of_locations, operations_per_mixed_example
from mm_hf.locations import operations
from mm_hf.locations.operations import ForwardSize, OperationCounter
from mm_hf.locations.probe import probe_with_size
from mm_hf.training.hub import load_num_mixed
from mm_hf.wrapping.auto_num_mixed import BUDGET, LEAST, MOST, AutoNumMixed, choose_num_mixed
from mm_hf.wrapping.state import MixingState
from tests.helpers import digits, models

AUTO = DenseMultiMix(num_mixed="auto")
NUMBERS = [LEAST, *range(40, 100, 10), *range(100, 1001, 100)]
WIDE = {"hidden_size": 128, "intermediate_size": 512}


def chosen(model, inputs, labels, method=AUTO, **options):
    """Return the number that a training step selects."""
    with wrap_model(model.train(), method, **options) as handle:
        model(**inputs, labels=labels).loss.backward()
        return handle.num_mixed


# ---- the number ----


@given(st.floats(1e3, 1e18), st.floats(1e-1, 1e15))
def test_number_is_the_largest_of_one_digit_within_the_budget(step, each):
    number = choose_num_mixed(step, each)
    assert number in NUMBERS
    if number > LEAST:
        assert number * each <= BUDGET * step
    if number < MOST:
        assert NUMBERS[NUMBERS.index(number) + 1] * each > BUDGET * step


@pytest.mark.parametrize(("classes", "number"), [(2, 400), (3, 200), (5, 100), (20, 32), (300, 32)])
def test_number_follows_from_counted_operations(classes, number):
    """The reference counts with PyTorch's own counter, in a complete forward of the mini-batch."""
    model, b, r = models.build("vit", num_labels=classes, **WIDE), 6, 16
    inputs, labels = models.batch("vit", b=b), models.labels(b, classes)
    model.set_attn_implementation("eager")  # PyTorch's counter omits its own attention on a CPU
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    each = r * ((6 * classes + 2) * b + 500 * classes)
    shared = b * r * (3 * 2 * WIDE["hidden_size"] * classes + 500 * classes)
    affordable = (0.03 * 3 * counter.get_total_flops() - shared) / each
    assert max((n for n in NUMBERS if n <= affordable), default=32) == number
    model.set_attn_implementation("sdpa")
    assert chosen(model, inputs, labels) == number


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["vit", "bert", "beit"])
def test_operations_of_a_probe_equal_those_of_pytorchs_counter(name, attention):
    model, inputs = models.build(name, attn_implementation="eager"), models.batch(name)
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    model.set_attn_implementation(attention)
    _, size = probe_with_size(model, inputs)
    locations = 16 if name in models.IMAGE_MODELS else inputs["input_ids"].shape[1]
    head = [model.classifier, *([model.bert.pooler.dense] if name == "bert" else [])]
    head_operations = 2.0 * sum(module.weight.numel() for module in head)
    assert size == ForwardSize(counter.get_total_flops() / 6, locations, 5, head_operations)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_cost_of_a_mixed_example(device, ranks):
    cost = CPU if device == "cpu" else ACCELERATOR
    found = operations_per_mixed_example(40, 49, 100, ranks=ranks, device=device)
    assert found == 49 * (602 * 40 * ranks * cost.product + 100 * cost.exponential) / ranks
    few = operations_per_mixed_example(40, 49, 100, examples_per_mix=4, device=device)
    assert few == (49 * (602 * 20 + 100 * CPU.exponential) if device == "cpu" else found * ranks) or ranks > 1


def test_terms_add_up():
    def locations(method):
        return method._mixed_locations(49)

    assert [locations(m) for m in (AUTO, DenseMultiMix(pooled_weight=1.0), MultiMix())] == [49, 50, 1]
    assert locations(DenseMultiMix(dense_weight=0.0, pooled_weight=1.0)) == 1
    assert locations(MultiMix(pooled_weight=0.0)) == 0 and choose_num_mixed(1e9, 0.0) == MOST


# ---- the same number in every run, on every rank, and after anything that takes time ----


def test_two_runs_and_evaluations_between_steps_agree():
    numbers = set()
    for evaluates in (False, True):
        model, inputs = models.build("vit", **WIDE).train(), models.batch("vit")
        with wrap_model(model, AUTO) as handle:
            for step in range(3):
                model(**inputs, labels=models.labels()).loss.backward()
                numbers.add(handle.num_mixed)
                if evaluates:
                    model.eval()(**inputs, labels=models.labels())
                    model.train()
                assert handle.pop_logs()["loss_terms"] == 6 + 16 * handle.num_mixed, step
    assert numbers == {100}


def test_ranks_agree_on_the_smallest_number(monkeypatch):
    sizes = [(8, ForwardSize(2e9, 196, 100)), (8, ForwardSize(1e9, 98, 100)), (4, ForwardSize(1e9, 196, 100))]
    alone = []
    for size in sizes:
        auto = AutoNumMixed()
        auto.count(*size)
        alone.append(auto.select(AUTO, 6, torch.device("cpu")))
    assert len(set(alone)) > 1
    monkeypatch.setattr("mm_hf.wrapping.auto_num_mixed.all_gather_object", lambda size: sizes)
    for size in sizes:
        auto = AutoNumMixed()
        auto.count(*size)
        assert auto.select(AUTO, 6, torch.device("cpu")) == min(alone)
        assert auto.share == max(
            (
                AUTO.operations_per_mixed_example(b, s.num_locations, 100, torch.device("cpu")) * auto.num_mixed
                + operations_of_locations(b, s.num_locations, 100)
            )
            / (3 * b * s.operations)
            for b, s in sizes
        )


def test_first_mini_batch_decides_for_texts_of_all_lengths():
    model, numbers = models.build("bert").train(), []
    for lengths in ((12, 40), (40, 12)):
        with wrap_model(model, MultiMix()) as handle:
            for length in lengths:
                model(**models.batch("bert", length=length), labels=models.labels()).loss.backward()
                numbers.append(handle.num_mixed)
    assert numbers[0] == numbers[1] < numbers[2] == numbers[3]


def test_device_of_training_counts_and_not_that_of_the_example(monkeypatch):
    model, inputs = models.build("vit", **WIDE), models.batch("vit")
    with wrap_model(model.train(), AUTO, example_inputs={**inputs, "labels": models.labels()}) as handle:
        assert handle.num_mixed is None
        auto = model.mm_hf_state.auto_num_mixed
        on_gpu, on_cpu = copy.deepcopy(auto), copy.deepcopy(auto)
    assert on_gpu.select(AUTO, 6, torch.device("cuda")) == 32 and on_cpu.select(AUTO, 6, torch.device("cpu")) == 100
    assert on_gpu.share > on_cpu.share


def test_number_is_logged_with_its_cost(caplog):
    model = models.build("vit", **WIDE)
    with caplog.at_level(logging.INFO, "mm_hf.wrapping.auto_num_mixed"), wrap_model(model.train(), AUTO) as handle:
        model(**models.batch("vit"), labels=models.labels()).loss.backward()
    assert [record.getMessage() for record in caplog.records] == [
        f"num_mixed='auto': {handle.num_mixed} mixed examples per step, whose expected cost is "
        f"{handle.mixing_share:.1%} of the operations of a training step."
    ]
    assert 0 < handle.mixing_share <= BUDGET


# ---- models whose operations cannot be counted ----


@pytest.mark.parametrize("fails_in", ["probe", "loss"])
@pytest.mark.parametrize("method", [MultiMix, DenseMultiMix])
def test_number_follows_the_batch_size_that_trainer_finds(method, fails_in, tmp_path, monkeypatch):
    """The number equals that of a training run that begins with the batch size that fits."""

    def check_memory(examples):
        if examples > 12:
            raise RuntimeError("CUDA out of memory.")

    class RunsOut(method):
        def loss(self, output, labels, **options):
            check_memory(len(labels))
            return super().loss(output, labels, **options)

    def run(batch_size):
        sizes = {"num_channels": 1, "image_size": 8, "patch_size": 2, "hidden_size": 64, "intermediate_size": 256}
        model = models.build("vit", num_labels=10, **sizes)
        if fails_in == "probe":
            model.vit.embeddings.register_forward_pre_hook(lambda module, inputs: check_memory(len(inputs[0])))
        arguments = digits.arguments(
            tmp_path, per_device_train_batch_size=batch_size, max_steps=2, auto_find_batch_size=True, save_steps=2
        )
        mixing = RunsOut(input_mixing="none") if fails_in == "loss" else method(input_mixing="none")
        trainer = MultiMixTrainer(model, arguments, mixing=mixing, train_dataset=digits.dataset())
        trainer.train()
        return trainer

    probes = []
    monkeypatch.setattr(MixingState, "prepare", _counting(MixingState.prepare, probes))
    found = run(90)
    size = found.state.train_batch_size
    assert size <= 12 and (len(probes) == 1 or fails_in == "probe")
    expected, first = run(size).mixing_handle, found.mixing_handle
    assert first.num_mixed == expected.num_mixed and first.mixing_share == expected.mixing_share
    assert first.mixing_share > 0 and (first.mixing_share <= BUDGET or first.num_mixed == LEAST)
    terms = [entry["loss_terms"] for entry in found.state.log_history if "loss_terms" in entry]
    assert terms[-1] == size + first.num_mixed * (1 if method is MultiMix else 16)


def _counting(function, calls):
    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return counted


def test_number_restored_from_a_checkpoint_is_selected_again_after_a_reset():
    model, inputs = models.build("vit", **WIDE).train(), models.batch("vit")
    with wrap_model(model, AUTO) as handle:
        handle.num_mixed = 77
        model(**inputs, labels=models.labels()).loss.backward()
        assert handle.num_mixed == 77 and handle.mixing_share is None
        handle.num_mixed = None
        model(**inputs, labels=models.labels()).loss.backward()
        assert handle.num_mixed == 100 and handle.mixing_share <= BUDGET


def test_model_of_custom_kernels_gets_the_smallest_number(monkeypatch, caplog):
    monkeypatch.setattr(operations, "_FORMULAS", {})
    with caplog.at_level(logging.INFO, "mm_hf.wrapping.auto_num_mixed"):
        assert chosen(models.build("vit", **WIDE), models.batch("vit"), models.labels()) == LEAST
    assert "32 mixed examples per step, the smallest number, because PyTorch cannot count" in caplog.text


def test_operations_that_cannot_be_counted_never_raise_the_number(monkeypatch):
    def fails(*args, **kwargs):
        raise TypeError("no formula for this call")

    model, inputs, labels = models.build("vit", **WIDE), models.batch("vit"), models.labels()
    numbers = [chosen(model, inputs, labels)]
    monkeypatch.setitem(operations._FORMULAS, torch.ops.aten.addmm, fails)
    numbers.append(chosen(model, inputs, labels))
    assert LEAST <= numbers[1] < numbers[0]


class OneGraph(torch.nn.GELU):
    """Activation that raises as a function compiled to one graph does, such as flex attention."""

    def forward(self, x):
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("non-infra torch dispatch mode present, this is not supported today in torch.compile")
        return super().forward(x)


def test_model_that_accepts_no_counter_is_probed_without():
    model, inputs = models.build("vit", **WIDE), models.batch("vit")
    plain, size = probe_with_size(model, inputs)
    parents = [m for m in model.modules() if any("GELU" in type(child).__name__ for child in m.children())]
    for parent in parents:
        name = next(name for name, child in parent.named_children() if "GELU" in type(child).__name__)
        setattr(parent, name, OneGraph())
    plan, uncounted = probe_with_size(model, inputs)
    assert parents and plan == plain and uncounted == ForwardSize(0, 16, 5, 2.0 * 128 * 5) and size.operations > 0
    assert chosen(model, inputs, models.labels()) == LEAST


def test_counter_changes_no_result():
    x = torch.randn(3, 4, requires_grad=True)
    with OperationCounter() as counter:
        y = torch.linalg.qr(x @ x.T)[1].sum()
    assert counter.operations == 2 * 3 * 4 * 3
    assert torch.equal(y, torch.linalg.qr(x @ x.T)[1].sum()) and torch.autograd.grad(y, x)[0].isfinite().all()


# ---- given, saved and restored numbers ----


@pytest.mark.parametrize("method", [MultiMix, DenseMultiMix])
def test_auto_is_the_default_and_a_number_is_used_as_given(method):
    assert method().num_mixed == "auto" and method().is_auto and Mixing.from_dict(method().to_dict()) == method()
    assert method(preset="paper").num_mixed == 1000 and method(preset="paper", num_mixed=7).num_mixed == 7
    assert method(num_mixed=3).is_auto is False and method().with_num_mixed(7).num_mixed == 7
    model = models.build("vit").train()
    with wrap_model(model, method(num_mixed=5000, clean_weight=0.0)) as handle:
        model(**models.batch("vit"), labels=models.labels()).loss.backward()
        assert handle.num_mixed is None and handle.mixing_share is None
        assert handle.pop_logs()["loss_terms"] == 5000 * (16 if method is DenseMultiMix else 1)


def trainer(directory, **arguments):
    arguments = digits.arguments(directory, num_train_epochs=4, save_strategy="steps", save_steps=3, **arguments)
    return MultiMixTrainer(digits.vit(), arguments, mixing="multimix", train_dataset=digits.dataset())


def test_resumed_training_uses_the_saved_number(tmp_path):
    first = trainer(tmp_path)
    first.train()
    number, file = first.mixing_handle.num_mixed, tmp_path / "checkpoint-6" / "mixing.json"
    assert LEAST < number < MOST and load_num_mixed(tmp_path / "checkpoint-6") == number
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.mixing_handle.num_mixed == number
    digits.same_weights(digits.weights(first.model), digits.weights(again.model))
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "num_mixed": 77}))  # as another version or device would have selected
    (file.parent / "SHA256SUMS").unlink()  # the checkpoint is edited
    other = trainer(tmp_path)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert other.mixing_handle.num_mixed == 77 == load_num_mixed(tmp_path / "checkpoint-12")
    terms = [entry["loss_terms"] for entry in other.state.log_history if "loss_terms" in entry]
    assert math.isclose(terms[-1], 32 + 77)


@pytest.mark.parametrize("value", [0, -3, 2.5, "most", True])
def test_num_mixed_is_an_integer_or_auto(value):
    with pytest.raises(ValueError, match="num_mixed must be an integer of at least 1 or 'auto'"):
        MultiMix(num_mixed=value)
