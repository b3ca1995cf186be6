"""Kernels of the loss against the eager operations and the float64 reference."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mm_hf import DenseMultiMix, wrap_model
from mm_hf.functional import dense_multimix_loss, kernels, sample_factors
from mm_hf.functional.factors import sample_permutations, sample_sparse_factors
from tests.functional import literal
from tests.helpers import models

ROOT = Path(__file__).parents[2]
B, R, N = 7, 4, 40


def loss_and_grads(kernel, classes=5, sparse=False, need_confidence=False, labels=None, **options):
    torch.manual_seed(0)
    logits = torch.randn(B, R, classes, requires_grad=True)
    attention = torch.rand(B, R)
    attention[2, 1:] = 0
    attention.requires_grad_(need_confidence)
    labels = torch.randint(classes, (B,)) if labels is None else labels
    factors = sample_sparse_factors(B, N, 0.5, examples_per_mix=3) if sparse else sample_factors(B, N, 0.5)
    permutations = sample_permutations(R, B)
    loss = dense_multimix_loss(logits, labels, attention, factors, kernel=kernel, permutations=permutations, **options)
    leaves = [x for x in (logits, attention) if x.requires_grad]
    reference = literal.dense_multimix(
        logits.detach().double(), labels, attention.detach().double(),
        torch.stack([(factors.dense() if sparse else factors)[p] for p in permutations]).double(),
        options.get("label_smoothing", 0.0), options.get("confidence_weighted", True),
        options.get("criterion", "cross_entropy"),
    )  # fmt: skip
    return loss, torch.autograd.grad(loss, leaves), reference


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(kernels, "_is_equal", {})


CASES = {
    "cross-entropy": {},
    "label smoothing, unweighted": {"label_smoothing": 0.2, "confidence_weighted": False},
    "many classes": {"classes": 80},
    "few examples in a mixed example": {"sparse": True, "classes": 80},
    "gradient of the attention": {"need_confidence": True},
    "a share of the mixed examples": {"columns": slice(10, 25)},
    "binary": {"criterion": "binary_cross_entropy", "labels": torch.rand(B, 5)},
    "regression": {"criterion": "mse", "labels": torch.rand(B, 5)},
}


def test_compiled_kernel_equals_eager_operations(monkeypatch):
    """All cases in one test: the function is compiled again for each criterion only."""
    monkeypatch.setattr("mm_hf.functional.mixers.SPARSE_SHARE", 1.0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="kernel=")  # of a kernel that is not used
        for name, case in CASES.items():
            (loss, grads, reference), (expected, expected_grads, _) = (
                loss_and_grads(kernel, **case) for kernel in ("compile", "eager")
            )
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
            for a, b in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
            if "columns" not in case:
                torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
    assert {key[2] for key, equal in kernels._is_equal.items() if equal} == {
        "cross_entropy", "binary_cross_entropy", "mse",
    }  # fmt: skip


def test_compiled_kernel_is_one_graph_for_all_sizes():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(kernels.mixed_terms, dynamic=True, fullgraph=True, backend=counter)
    for q, c, n in ((3, 5, 11), (4, 6, 12), (2, 9, 7)):
        z, y = torch.randn(q, c, n), torch.rand(q, c, n)
        compiled("cross_entropy", z, y, torch.rand(q, 1, n), torch.rand(q, 1, n), False)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_compiled_kernel_is_replaced_by_eager_operations_in_a_dispatch_mode():
    """A counter of operations observes the eager ones, before and after the first use of the kernel."""
    with FlopCounterMode(display=False) as counter:
        expected, expected_grads, _ = loss_and_grads("eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="kernel=")
        for _ in range(2):
            with FlopCounterMode(display=False) as found:
                loss, grads, _ = loss_and_grads("compile")
            assert found.get_total_flops() == counter.get_total_flops() > 0
            assert torch.equal(loss, expected) and torch.equal(grads[0], expected_grads[0])
            loss_and_grads("compile")
        assert kernels._is_equal == {("compile", "cpu", "cross_entropy"): True}
        model, inputs = models.build("vit").train(), {**models.batch("vit"), "labels": models.labels()}
        with wrap_model(model, DenseMultiMix(kernel="compile", num_mixed=9)):
            for mode in (contextlib.nullcontext(), FlopCounterMode(display=False), contextlib.nullcontext()):
                with mode:
                    model(**inputs).loss.backward()


@pytest.mark.parametrize("reason", ["fails", "differs"])
def test_kernel_that_fails_or_differs_is_replaced_with_one_warning(monkeypatch, reason):
    def broken(*args):
        if reason == "fails":
            raise RuntimeError("no compiler")
        terms = kernels.mixed_terms(*args)
        return terms._replace(logits_grad=2 * terms.logits_grad)

    monkeypatch.setattr("mm_hf.functional.kernels.compiled_terms", broken)
    with pytest.warns(UserWarning, match="kernel='compile' is not used on cpu for cross_entropy") as caught:
        results = [loss_and_grads("compile") for _ in range(3)]
    assert len(caught) == 1 and ("no compiler" in str(caught[0].message)) == (reason == "fails")
    expected, grads, _ = loss_and_grads("eager")
    for loss, found, _ in results:
        assert torch.equal(loss, expected) and torch.equal(found[0], grads[0])


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_eager_operations_are_used():
    with pytest.warns(UserWarning, match="kernel='triton' is not used.*No module named 'triton'"):
        loss, _, reference = loss_and_grads("triton")
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernel_equals_the_reference_in_the_interpreter():
    """In a process of its own, because Triton reads TRITON_INTERPRET when it is imported."""
    program = "from tests.functional.test_kernels import check_triton; check_triton()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


def check_triton():
    """Compare the Triton kernel with the eager operations and the reference."""
    for name, case in CASES.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="kernel=")
            (loss, grads, reference), (expected, expected_grads, _) = (
                loss_and_grads(kernel, **case) for kernel in ("triton", "eager")
            )
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        if "columns" not in case:
            torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
    assert kernels._is_equal == {("triton", "cpu", "cross_entropy"): True}


def test_kernel_is_a_setting_of_the_methods():
    with pytest.raises(ValueError, match="kernel must be one of eager, compile, triton, got 'fast'"):
        DenseMultiMix(kernel="fast")
    with pytest.raises(ValueError, match="kernel must be one of eager, compile, triton, got 'fast'"):
        loss_and_grads("fast")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mm_hf.functional.kernels.compiled_terms", lambda *a: calls.append(1) or kernels.mixed_terms(*a))
        model = models.build("vit").train()
        with wrap_model(model, DenseMultiMix(kernel="compile", num_mixed=9)):
            model(**models.batch("vit"), labels=models.labels()).loss.backward()
    assert calls
