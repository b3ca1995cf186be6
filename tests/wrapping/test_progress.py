"""Logged values and counts of a training, which take no operation and wait for no device in a step."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mm_hf import DenseMultiMix, wrap_model
from mm_hf.wrapping import progress, step
from mm_hf.wrapping.progress import LoggedMeans
from tests.helpers import models

FINITE = st.floats(-1e6, 1e6, width=32)
KINDS = {
    "number": float,
    "float32": lambda x: torch.tensor(x, dtype=torch.float32),
    "float64": lambda x: torch.tensor(x, dtype=torch.float64),
    "int64": lambda x: torch.tensor(int(x)),
    "with gradient": lambda x: torch.tensor(x, requires_grad=True),
}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), FINITE), max_size=20), st.sampled_from([1, 3, 1000]))
@pytest.mark.parametrize("kind", KINDS)
def test_logged_means_are_those_of_the_values_since_the_last_call(kind, batches, kept):
    logs, convert = LoggedMeans(), KINDS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "KEPT", kept)
        for values in batches:
            logs.add({name: convert(x) for name, x in values.items()})
    expected = {}
    for values in batches:
        for name, x in values.items():
            expected.setdefault(name, []).append(float(torch.as_tensor(convert(x)).detach()))
    assert logs.pop() == pytest.approx(
        {name: math.fsum(x) / len(x) for name, x in expected.items()}, rel=1e-12, abs=1e-8
    )
    assert logs.pop() == {}


def test_numbers_and_tensors_of_several_types_have_one_mean():
    values = (1.0, torch.tensor(3), torch.tensor(2.25), torch.tensor(4.5, dtype=torch.float64))
    for ordered in itertools.permutations(values):
        logs = LoggedMeans()
        for value in ordered:
            logs.add({"x": value})
        assert logs.pop() == {"x": 2.6875}


def test_mean_of_values_that_are_not_finite_is_not_finite():
    logs = LoggedMeans()
    for value in (math.inf, -math.inf, math.nan, 1.0):
        logs.add({"x": torch.tensor(value), "y": torch.tensor(abs(value)).nan_to_num(posinf=math.inf)})
    means = logs.pop()
    assert math.isnan(means["x"]) and means["y"] == math.inf


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_logging_takes_no_operation():
    logs, values = LoggedMeans(), {"a": torch.tensor(1.0), "b": 2.0, "c": torch.tensor(3.0, requires_grad=True)}
    with Operations() as operations:
        logs.add(values)
        logs.add(values)
    assert operations.count == 0


def test_values_that_are_kept_are_bounded_and_have_no_graph(monkeypatch):
    monkeypatch.setattr(progress, "KEPT", 3)
    logs, weight = LoggedMeans(), torch.ones((), requires_grad=True)
    for i in range(100):
        logs.add({"x": weight * i})
        kept = [value for values in logs._kept.values() for value in values]
        assert len(kept) <= 3 and not any(value.requires_grad for value in kept)
    assert logs.pop() == {"x": 49.5}


def test_valid_labels_are_counted_until_a_mini_batch_was_mixed(monkeypatch):
    calls, count = [], step.count_valid
    monkeypatch.setattr(step, "count_valid", lambda *args: calls.append(1) or count(*args))
    model, images = models.build("vit").train(), models.batch("vit")["pixel_values"]
    ignored = torch.full((6,), -100)
    with wrap_model(model, DenseMultiMix(num_mixed=9), example_inputs={"pixel_values": images, "labels": ignored}):
        for labels, expected in ((ignored, 1), (ignored, 2), (models.labels(), 3), (models.labels(), 3)):
            model(pixel_values=images, labels=labels)
            assert len(calls) == expected
